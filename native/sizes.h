/*
 * sizes: the logical sizes of files that are longer on the device than what
 * was written to them, in persistent memory.
 *
 * The file `sizes` on a fast device is an array of slots.  A slot is tied to
 * its file by a random nonce, which the file has in an xattr; the inode number
 * only says where to look.
 *
 * Invariant: whenever a file may be longer than its logical size, a slot with
 * its nonce is durable, and the nonce is in the file's xattr durably.  So a
 * slot is filled before its nonce is stored, and cleared after the file was
 * cut to its size and fsynced.
 */
#ifndef PAFKAFS_SIZES_H
#define PAFKAFS_SIZES_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* One cache line, so that the stores into a slot become durable in program
 * order when they are drained one after the other. */
struct slot {
	_Atomic uint64_t nonce; /* 0: free */
	_Atomic uint64_t size;
	_Atomic uint64_t mtime_ns;
	_Atomic uint64_t ino;
	_Atomic uint64_t grown; /* the file was made no longer than this, by us */
	uint64_t unused[3];
};

_Static_assert(sizeof(struct slot) == 64, "a slot is one cache line");

struct sizes {
	struct slot *slots; /* the first is the header */
	bool sync;
	unsigned count;
	pthread_mutex_t lock;
	unsigned next; /* where to look for a free one */
};

#define SIZES_MAGIC 0x315a495346415031u /* "1PAFSIZ1" and the format */

/* Maps the file `sizes` of a device, made if it is missing.  sync: with
 * MAP_SYNC; else the device is no DAX, for tests and measurements.  NULL with
 * errno; EINVAL when it is not such a file. */
struct sizes *sizes_open(int dir_fd, unsigned count, bool sync);
void sizes_close(struct sizes *s);

/* A slot for a file; its number, or -ENOSPC. */
int sizes_take(struct sizes *s, uint64_t nonce, uint64_t ino, uint64_t size, uint64_t mtime_ns);
/* Makes the slots durable where the mapping is not (no DAX); 0 or -errno. */
int sizes_sync(struct sizes *s);
/* The file is as long as its slot says, durably, or is gone. */
void sizes_give_back(struct sizes *s, unsigned number);

#endif

/*
 * sizes: the logical sizes of files that are longer on the device than what
 * was written to them, in persistent memory.
 *
 * The file `sizes` on a fast device is an array of slots.  A slot is tied to
 * its file by a random nonce, which the file has in an xattr; the inode number
 * only says where to look.
 *
 * Invariant: while a file may be longer than its logical size, a slot with its
 * nonce is durable, and so is the nonce in its xattr.  So a slot is durable
 * before a file is tied to it, and a file is tied before it is made longer.
 *
 * Invariant: a file without a nonce is as long as it should be, and no mount
 * ever cuts it.  So the nonce is removed right after the file was cut, before
 * anything else can change its size.  ext4 and xfs make changes of metadata
 * durable in the order in which they were made: after a power cut the file is
 *
 *   as it grew             nonce and slot: recovery cuts it
 *   cut                    nonce and slot: recovery finds nothing to cut
 *   cut, nonce removed     a slot that is nobody's; so it is also when the
 *                          file was served and appended to meanwhile
 *
 * and the slot is cleared once the last of these is durable, by an fsync of
 * the file or a syncfs for many: cleared before, the first would be left
 * without a slot.
 */
#ifndef PAFKAFS_SIZES_H
#define PAFKAFS_SIZES_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* One cache line: a write dirties one. */
struct slot {
	_Atomic uint64_t nonce; /* 0: free */
	_Atomic uint64_t size;
	_Atomic uint64_t mtime_ns;
	_Atomic uint64_t ino;
	/* Lengths that are our doing: settled, and whole pages from there up to
	 * grown, while the file is made longer.  One of any other length was
	 * changed by somebody else, by a Kafka on tree/ say. */
	_Atomic uint64_t grown;
	_Atomic uint64_t settled;
	uint64_t unused[2];
};

_Static_assert(sizeof(struct slot) == 64, "a slot is one cache line");

/* The xattr that ties a file to its slot: the 8 bytes of the nonce,
 * little-endian. */
#define NONCE_ATTRIBUTE "user.pafkafs.nonce"

struct sizes {
	struct slot *slots; /* the first is the header */
	_Atomic bool *failed; /* by slot: a media error; not used again in this mount */
	bool sync;
	unsigned count;
	pthread_mutex_t lock; /* of who has which slot; stores into one are its owner's */
	unsigned next; /* where to look for a free one */
	_Atomic unsigned used;
};

struct slot_values {
	uint64_t nonce, size, mtime_ns, ino, grown, settled;
};

#define SIZES_MAGIC 0x315a495346415031u /* "1PAFSIZ1" and the format */

/* Maps the file `sizes` of a device, made if it is missing.  sync: with
 * MAP_SYNC; else the device is no DAX, for tests and measurements.  NULL with
 * errno; EINVAL when it is not such a file. */
struct sizes *sizes_open(int dir_fd, unsigned count, bool sync);
void sizes_close(struct sizes *s);

/* 0, or -EIO: a media error. */
int sizes_load(struct sizes *s, unsigned number, struct slot_values *values);

/* A slot for a file, durable when it returns; its number, or -ENOSPC. */
int sizes_take(struct sizes *s, uint64_t nonce, uint64_t ino, uint64_t size, uint64_t mtime_ns);
/* The file is as long as its slot says and has no nonce, durably, or is gone. */
void sizes_give_back(struct sizes *s, unsigned number);

/* Stores into a slot that was taken, durable when they return.  0 or -EIO: a
 * media error, and the slot fails from then on. */
int sizes_store_grown(struct sizes *s, unsigned number, uint64_t grown, uint64_t settled);
/* size 0: it stays as it is. */
int sizes_store_written(struct sizes *s, unsigned number, uint64_t mtime_ns, uint64_t size);

/* Makes the slots durable where the mapping is not (no DAX); 0 or -errno. */
int sizes_sync(struct sizes *s);

#endif

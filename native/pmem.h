/*
 * pmem: a file that grows in persistent memory.
 *
 * Its file is longer than what was written: allocated and zeroed ahead of the
 * writer, mapped, and populated, so that an append is a copy and two drains,
 * and no system call.  The logical size is in a slot of sizes; it is stored
 * after the bytes are durable, so a write is there whole or not at all.
 *
 * Writers of one file are expected to be one at a time (the kernel holds the
 * inode); the lock is for those that are not.
 */
#ifndef PAFKAFS_PMEM_H
#define PAFKAFS_PMEM_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "sizes.h"

struct pmem;

/* The growing file of fd, which is tied to a slot and as long as that says.  The
 * slot is taken over, on failure (NULL, errno) too; fd is not, and the file is
 * not changed yet.  sync: map with MAP_SYNC. */
struct pmem *pmem_open(int fd, struct sizes *sizes, unsigned number, bool sync);
/* Unmaps.  The slot stays, for recovery, when the file may be longer than its
 * size and is not gone. */
void pmem_close(struct pmem *p);

/* The file is durable as it was, or with the whole write.  -EAGAIN: it has to
 * grow to offset + len first; -EIO: a media error, of the file or its slot. */
int pmem_write(struct pmem *p, const void *data, size_t len, uint64_t offset);
/* Makes room up to end: allocates, zeroes, maps, populates.  Slow. */
int pmem_grow(struct pmem *p, uint64_t end);
/* Cuts the file to its logical size, with its times, and gives the slot back:
 * from now on it is a file as any other.  No write may be under way. */
int pmem_seal(struct pmem *p);

/* Durable when it returns 0; the next write sets it again.  Or -EIO. */
int pmem_set_mtime(struct pmem *p, uint64_t mtime_ns);
uint64_t pmem_size(const struct pmem *p);
uint64_t pmem_mtime_ns(const struct pmem *p);
/* Up to where it may be written without growing. */
uint64_t pmem_capacity(struct pmem *p);

/* Where offset 0 of the file is mapped; for tests. */
char *pmem_window(struct pmem *p);

#endif

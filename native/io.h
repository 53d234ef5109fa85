/*
 * io: the operations on the contents of open files: READ, WRITE, FSYNC,
 * GETATTR, FALLOCATE, LSEEK, COPY_FILE_RANGE.
 *
 * What can only take microseconds is answered in the thread that read the
 * request; what may block goes to the workers of the device it blocks on.
 */
#ifndef PAFKAFS_IO_H
#define PAFKAFS_IO_H

#include <linux/fuse.h>
#include <stdbool.h>

#include "file.h"
#include "front.h"

/* True when the request was for an open file and is, or will be, answered.
 * scratch holds IO_BYTES_MAX bytes. */
bool io_dispatch(struct front *f, const struct fuse_in_header *in, char *scratch);

/* A parked request goes on, on the file's backing of now. */
void io_resubmit(struct request *r);

/* Sets the size; 0, -EAGAIN while the gate is closed, -EBUSY while the file
 * grows in persistent memory, or -errno.  May block on a slow device. */
int io_truncate(struct file *file, int64_t size);

/* What FSYNC does, without a handle, and for an object the times of its
 * shadow; 0, -EAGAIN while the gate is closed, or -errno.  May block. */
int io_sync(struct file *file);
/* fsync of what has changed, for who has closed the gate; 0 or -errno. */
int io_sync_at_gate(struct file *file);

/* Makes room in a growing file up to end; 0 or -errno.  May block. */
int io_grow(struct file *file, uint64_t end);
/* Both only with the gate closed and quiet; 0 or -errno.  They may block, and
 * take effect with file_switch. */
/* Makes a plain file one that grows in persistent memory, with this slot,
 * which has its size. */
int io_start_growing(struct file *file, unsigned number);
/* Makes a growing file one as any other. */
int io_seal(struct file *file);

#endif

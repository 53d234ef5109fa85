/*
 * object: opens, creates and keeps durable the data of a file that is not in
 * the home tree itself.  All of it may block: call it from workers only.
 */
#ifndef PAFKAFS_OBJECT_H
#define PAFKAFS_OBJECT_H

#include <sys/types.h>

#include "file.h"

/* Opens the data of a backing if that was not done yet; 0 or -errno.
 *
 * An object that was changed behind its shadow (a Kafka started on tree/)
 * wins: when its size differs, size and mtime go to the shadow. */
int object_open(struct file *file, struct backing *b);

/* The object has grown to end, or was changed below it, just now: the shadow
 * learns of it.  *grew tells whether the size changed.  0 or -errno.
 *
 * **Invariant:** the shadow, which is on another device, has a length only when
 * the object's entries are durable: object_sync_entries goes first.  After a
 * power cut a name may have lost data that nobody has fsynced, but not lead to
 * nothing. */
int object_touch_shadow(struct file *file, struct backing *b, int64_t end, bool *grew);

/* The directory entries of a new object, up to objects/; 0 or -errno. */
int object_sync_entries(struct backing *b);

/* Makes the directories above path, below dir_fd; 0 or -errno. */
int object_make_dirs(int dir_fd, const char *path);

#endif

/*
 * sys: system calls that neither glibc 2.36 nor Python 3.11 wraps.
 */
#ifndef PAFKAFS_SYS_H
#define PAFKAFS_SYS_H

#include <stdbool.h>
#include <sys/types.h>

/* openat2 that never leaves dir_fd and follows no symlink: a descriptor or
 * -errno. */
int sys_open_beneath(int dir_fd, const char *path, int flags, mode_t mode);

/* True when a file in the directory can be mapped MAP_SYNC: it is on DAX.
 * -errno when that could not be tried. */
int sys_is_dax(int dir_fd);

/* Copies [offset, end) to the same place; 0 or -errno.  keep_holes: leaves
 * them out, for a target that has nothing there yet.
 * Write-back of the copy has begun when it returns, and is not finished. */
int sys_copy_data(int from_fd, int to_fd, off_t offset, off_t end, bool keep_holes);

#endif

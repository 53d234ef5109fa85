/*
 * sys: system calls as they are needed, and those that neither glibc 2.36 nor
 * Python 3.11 wraps.
 */
#ifndef PAFKAFS_SYS_H
#define PAFKAFS_SYS_H

#include <errno.h>
#include <sys/types.h>
#include <unistd.h>

/* openat2 that never leaves dir_fd and follows no symlink: a descriptor or
 * -errno. */
int sys_open_beneath(int dir_fd, const char *path, int flags, mode_t mode);

/* True when a file in the directory can be mapped MAP_SYNC: it is on DAX.
 * -errno when that could not be tried. */
int sys_is_dax(int dir_fd);

/* ftruncate that no signal interrupts: 0, or -1 with errno.  truncate(2) of
 * Python and others is not begun again. */
static inline int sys_truncate(int fd, off_t size)
{
	int err;

	do
		err = ftruncate(fd, size);
	while (err != 0 && errno == EINTR);
	return err;
}

#endif

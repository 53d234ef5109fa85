#define _GNU_SOURCE
#include "sys.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

int sys_open_beneath(int dir_fd, const char *path, int flags, mode_t mode)
{
	struct open_how how = {
		.flags = (unsigned)flags,
		.mode = flags & O_CREAT ? mode : 0,
		.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS,
	};
	long fd;

	do /* EAGAIN: a rename elsewhere raced with the walk */
		fd = syscall(SYS_openat2, dir_fd, path, &how, sizeof(how));
	while (fd < 0 && (errno == EAGAIN || errno == EINTR));
	return fd < 0 ? -errno : (int)fd;
}

int sys_is_dax(int dir_fd)
{
	int fd = openat(dir_fd, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);

	if (fd < 0)
		return -errno;
	int dax = 0;
	if (ftruncate(fd, 4096) == 0) {
		void *p = mmap(NULL, 4096, PROT_READ | PROT_WRITE,
			       MAP_SHARED_VALIDATE | MAP_SYNC, fd, 0);
		dax = p != MAP_FAILED;
		if (dax)
			munmap(p, 4096);
	}
	close(fd);
	return dax;
}

enum { COPY_BYTES = 1 << 20 };

static int copy_range(int from_fd, int to_fd, off_t offset, off_t end, char *buffer)
{
	while (offset < end) {
		size_t want = end - offset < COPY_BYTES ? (size_t)(end - offset) : COPY_BYTES;
		ssize_t got = pread(from_fd, buffer, want, offset);
		if (got == 0)
			return 0;
		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return -errno;
		for (ssize_t done = 0; done < got;) {
			ssize_t n = pwrite(to_fd, buffer + done, (size_t)(got - done),
					   offset + done);
			if (n < 0 && errno != EINTR)
				return -errno;
			done += n < 0 ? 0 : n;
		}
		/* Start writing it back now, so that the fsync at the end has
		 * little left to wait for. */
		sync_file_range(to_fd, offset, got, SYNC_FILE_RANGE_WRITE);
		offset += got;
	}
	return 0;
}

int sys_copy_data(int from_fd, int to_fd, off_t offset, off_t end, bool keep_holes)
{
	char *buffer = malloc(COPY_BYTES);
	int err = buffer == NULL ? -ENOMEM : 0;

	if (err == 0 && !keep_holes)
		err = copy_range(from_fd, to_fd, offset, end, buffer);
	while (err == 0 && keep_holes && offset < end) {
		off_t data = lseek(from_fd, offset, SEEK_DATA);
		if (data < 0 && errno == ENXIO)
			break; /* only a hole is left */
		if (data < 0)
			data = offset;
		off_t hole = lseek(from_fd, data, SEEK_HOLE);
		if (hole < 0 || hole > end)
			hole = end;
		err = copy_range(from_fd, to_fd, data, hole, buffer);
		offset = hole;
	}
	free(buffer);
	return err;
}

#define _GNU_SOURCE
#include "copy.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/ioprio.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
	/* Blocks of all disks are this long, or divide it. */
	BLOCK_BYTES = 4096,
	/* Enough to keep a disk busy; and no lock is held for longer than it takes. */
	STEP_BYTES = 1 << 20,
	NICE = 19, /* more than the daemon's */
};

struct copy {
	const struct copy_request *request;
	int from_direct_fd, to_direct_fd; /* those of the request where there is no O_DIRECT */
	char *buffer;
	bool at_source; /* whose the error is */
};

static off_t block_floor(off_t offset)
{
	return offset / BLOCK_BYTES * BLOCK_BYTES;
}

static off_t block_ceil(off_t offset)
{
	return block_floor(offset + BLOCK_BYTES - 1);
}

/* The same file past the page cache.  A description of its own: the flags of
 * the one at fd are those of the open file. */
static int open_direct(int fd, int flags)
{
	char path[32];

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	int direct = open(path, flags | O_DIRECT | O_CLOEXEC);
	return direct < 0 ? fd : direct;
}

/* Which of the two the kernel takes for what is left at done. */
static int fd_for(int direct_fd, int fd, size_t done, bool refused)
{
	return refused || done % BLOCK_BYTES != 0 ? fd : direct_fd;
}

/* Less than bytes only at the end of the file. */
static ssize_t read_step(const struct copy *c, size_t bytes, off_t offset)
{
	size_t done = 0;
	bool refused = false;

	while (done < bytes) {
		int fd = fd_for(c->from_direct_fd, c->request->from_fd, done, refused);
		ssize_t n = pread(fd, c->buffer + done, bytes - done, offset + (off_t)done);
		if (n == 0)
			break;
		if (n < 0 && errno == EINVAL && fd != c->request->from_fd)
			refused = true; /* O_DIRECT wants larger blocks */
		else if (n < 0 && errno != EINTR)
			return -errno;
		if (n > 0 && fd == c->request->from_fd)
			posix_fadvise(fd, offset, (off_t)bytes, POSIX_FADV_DONTNEED);
		done += n < 0 ? 0 : (size_t)n;
	}
	return (ssize_t)done;
}

static int write_step(const struct copy *c, size_t bytes, off_t offset)
{
	size_t done = 0;
	bool refused = false;

	while (done < bytes) {
		int fd = fd_for(c->to_direct_fd, c->request->to_fd, done, refused);
		ssize_t n = pwrite(fd, c->buffer + done, bytes - done, offset + (off_t)done);
		if (n == 0)
			return -EIO;
		if (n < 0 && errno == EINVAL && fd != c->request->to_fd)
			refused = true;
		else if (n < 0 && errno != EINTR)
			return -errno;
		done += n < 0 ? 0 : (size_t)n;
		/* Written back from now on, so that the fsync has little to wait
		 * for.  No flag that waits: those take the error from the fsync. */
		if (n > 0 && fd == c->request->to_fd)
			sync_file_range(fd, offset, (off_t)done, SYNC_FILE_RANGE_WRITE);
	}
	return 0;
}

/* Whole blocks. */
static int copy_range(struct copy *c, off_t offset, off_t end)
{
	for (; offset < end; offset += STEP_BYTES) {
		size_t bytes = end - offset < STEP_BYTES ? (size_t)(end - offset) : STEP_BYTES;
		ssize_t got = read_step(c, bytes, offset);
		c->at_source = got < 0;
		if (got <= 0)
			return (int)got;
		/* The last block is written whole; the caller sets the size. */
		size_t whole = (size_t)block_ceil(got);
		memset(c->buffer + got, 0, whole - (size_t)got);
		int err = write_step(c, whole, offset);
		if (err < 0)
			return err;
	}
	return 0;
}

/* Blocks for the data at once, in one piece: writes that do not extend the
 * file go on side by side.  A filesystem without it allocates as they come. */
static int allocate(int fd, off_t offset, off_t end)
{
	int err;

	do
		err = fallocate(fd, 0, offset, end - offset) == 0 ? 0 : errno;
	while (err == EINTR);
	return err == EOPNOTSUPP ? 0 : -err;
}

static int copy_all(struct copy *c)
{
	const struct copy_request *r = c->request;
	off_t offset = block_floor(r->offset), end = block_ceil(r->end);
	int err = 0;

	if (!r->keep_holes)
		return copy_range(c, offset, end);
	while (err == 0 && offset < r->end) {
		off_t data = lseek(r->from_fd, offset, SEEK_DATA);
		if (data < 0 && errno == ENXIO)
			return 0; /* only a hole is left */
		if (data > offset)
			offset = block_floor(data);
		if (offset >= r->end)
			return 0;
		off_t hole = lseek(r->from_fd, offset, SEEK_HOLE);
		if (hole <= offset || hole > r->end)
			hole = r->end;
		err = allocate(r->to_fd, offset, hole);
		if (err == 0)
			err = copy_range(c, offset, block_ceil(hole));
		offset = block_ceil(hole);
	}
	return err;
}

/* Of this thread.  Only if it can be undone, for which an ordinary user has
 * no right. */
static bool lower_priority(void)
{
	if (geteuid() != 0)
		return false;
	setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) + NICE);
	syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_PRIO_VALUE(IOPRIO_CLASS_BE, 7));
	return true;
}

static void restore_priority(void)
{
	setpriority(PRIO_PROCESS, 0, getpriority(PRIO_PROCESS, 0) - NICE);
	syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_PRIO_VALUE(IOPRIO_CLASS_NONE, 0));
}

int copy_data(const struct copy_request *request, bool *at_source)
{
	struct copy c = {.request = request};
	int err;

	*at_source = false;
	if (posix_memalign((void **)&c.buffer, BLOCK_BYTES, STEP_BYTES) != 0)
		return -ENOMEM;
	c.from_direct_fd = open_direct(request->from_fd, O_RDONLY);
	c.to_direct_fd = open_direct(request->to_fd, O_WRONLY);
	bool lowered = !request->urgent && lower_priority();
	err = copy_all(&c);
	if (lowered)
		restore_priority();
	if (c.from_direct_fd != request->from_fd)
		close(c.from_direct_fd);
	if (c.to_direct_fd != request->to_fd)
		close(c.to_direct_fd);
	free(c.buffer);
	*at_source = c.at_source;
	return err;
}

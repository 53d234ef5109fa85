#define _GNU_SOURCE
#include "fake_journal.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "check.h"
#include "fake_pmem.h"
#include "sizes.h"

enum { STATES = 256 };

static struct state states[STATES];
static unsigned count;
static int watched = -1;
static bool fsync_fails;

int __real_fsync(int fd);
int __real_fdatasync(int fd);
int __real_ftruncate(int fd, off_t length);
int __real_fallocate(int fd, int mode, off_t offset, off_t len);
int __real_futimens(int fd, const struct timespec times[2]);
int __real_fsetxattr(int fd, const char *name, const void *value, size_t size, int flags);
int __real_fremovexattr(int fd, const char *name);
int __wrap_fsync(int fd);
int __wrap_fdatasync(int fd);
int __wrap_ftruncate(int fd, off_t length);
int __wrap_fallocate(int fd, int mode, off_t offset, off_t len);
int __wrap_futimens(int fd, const struct timespec times[2]);
int __wrap_fsetxattr(int fd, const char *name, const void *value, size_t size, int flags);
int __wrap_fremovexattr(int fd, const char *name);

static bool same(const struct state *a, const struct state *b)
{
	return a->length == b->length && a->mtime_ns == b->mtime_ns && a->nonce == b->nonce &&
	       a->removed == b->removed;
}

static void note(uint64_t length)
{
	struct stat st;
	uint64_t nonce = 0;

	CHECK_EQ(fstat(watched, &st), 0);
	(void)fgetxattr(watched, NONCE_ATTRIBUTE, &nonce, sizeof(nonce));
	struct state now = {
		.length = length,
		.mtime_ns = (uint64_t)st.st_mtim.tv_sec * 1000000000u +
			    (uint64_t)st.st_mtim.tv_nsec,
		.nonce = le64toh(nonce),
		.removed = st.st_nlink == 0,
	};
	if (count > 0 && same(&now, &states[count - 1]))
		return;
	CHECK(count < STATES);
	states[count++] = now;
}

static void note_change(int fd)
{
	struct stat st;

	if (fd != watched)
		return;
	CHECK_EQ(fstat(fd, &st), 0);
	note((uint64_t)st.st_size);
	model_step();
}

static void note_sync(int fd)
{
	if (fd != watched)
		return;
	states[0] = states[count - 1];
	count = 1;
	model_step();
}

void journal_watch(int fd)
{
	watched = fd;
	count = 0;
	if (fd >= 0)
		note_change(fd);
}

void journal_note(void)
{
	note_change(watched);
}

const struct state *journal_states(unsigned *n)
{
	*n = count;
	return states;
}

void journal_fail_fsync(void)
{
	fsync_fails = true;
}

int __wrap_fsync(int fd)
{
	if (fd == watched && fsync_fails) {
		fsync_fails = false;
		errno = EIO;
		return -1;
	}
	int result = __real_fsync(fd);
	note_sync(fd);
	return result;
}

int __wrap_fdatasync(int fd)
{
	int result = __real_fdatasync(fd);

	note_sync(fd); /* a new length is data to it, and the journal has one order */
	return result;
}

int __wrap_ftruncate(int fd, off_t length)
{
	int result = __real_ftruncate(fd, length);

	note_change(fd);
	return result;
}

/* It may be durable page by page. */
int __wrap_fallocate(int fd, int mode, off_t offset, off_t len)
{
	int result = __real_fallocate(fd, mode, offset, len);

	if (fd == watched && result == 0) {
		note((uint64_t)(offset + len / 2) & ~4095ull);
		note_change(fd);
	}
	return result;
}

int __wrap_futimens(int fd, const struct timespec times[2])
{
	int result = __real_futimens(fd, times);

	note_change(fd);
	return result;
}

int __wrap_fsetxattr(int fd, const char *name, const void *value, size_t size, int flags)
{
	int result = __real_fsetxattr(fd, name, value, size, flags);

	note_change(fd);
	return result;
}

int __wrap_fremovexattr(int fd, const char *name)
{
	int result = __real_fremovexattr(fd, name);
	int error = errno;

	note_change(fd);
	errno = error;
	return result;
}

#define _GNU_SOURCE
#include "hooks.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "check.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t released = PTHREAD_COND_INITIALIZER;

static struct {
	bool hang;
	ino_t only; /* 0: any file */
	unsigned hanging, calls, releases;
	unsigned fail_times;
	int error;
	unsigned short_times;
	size_t short_bytes;
} hooks[HOOKS];

void hook_hang(enum hook hook, const char *path)
{
	struct stat st = {0};

	CHECK(path == NULL || stat(path, &st) == 0);
	pthread_mutex_lock(&lock);
	hooks[hook].hang = true;
	hooks[hook].only = st.st_ino;
	pthread_mutex_unlock(&lock);
}

void hook_fail(enum hook hook, unsigned times, int error)
{
	pthread_mutex_lock(&lock);
	hooks[hook].fail_times = times;
	hooks[hook].error = error;
	pthread_mutex_unlock(&lock);
}

void hook_short(enum hook hook, unsigned times, size_t bytes)
{
	pthread_mutex_lock(&lock);
	hooks[hook].short_times = times;
	hooks[hook].short_bytes = bytes;
	pthread_mutex_unlock(&lock);
}

static size_t shortened(enum hook hook, size_t bytes)
{
	pthread_mutex_lock(&lock);
	if (hooks[hook].short_times > 0 && bytes > hooks[hook].short_bytes) {
		hooks[hook].short_times--;
		bytes = hooks[hook].short_bytes;
	}
	pthread_mutex_unlock(&lock);
	return bytes;
}

void hook_pass(enum hook hook)
{
	pthread_mutex_lock(&lock);
	hooks[hook].hang = false;
	pthread_mutex_unlock(&lock);
}

void hook_release(enum hook hook)
{
	pthread_mutex_lock(&lock);
	hooks[hook].hang = false;
	hooks[hook].releases++;
	pthread_cond_broadcast(&released);
	pthread_mutex_unlock(&lock);
}

unsigned hook_hanging(enum hook hook)
{
	pthread_mutex_lock(&lock);
	unsigned n = hooks[hook].hanging;
	pthread_mutex_unlock(&lock);
	return n;
}

unsigned hook_calls(enum hook hook)
{
	pthread_mutex_lock(&lock);
	unsigned n = hooks[hook].calls;
	pthread_mutex_unlock(&lock);
	return n;
}

/* The error to fail with, or 0. */
static int enter(enum hook hook, int fd)
{
	struct stat st = {0};
	int error = 0;

	if (fd >= 0)
		CHECK(fstat(fd, &st) == 0);
	pthread_mutex_lock(&lock);
	hooks[hook].calls++;
	if (hooks[hook].fail_times > 0) {
		hooks[hook].fail_times--;
		error = hooks[hook].error;
	}
	bool hang = hooks[hook].hang && (hooks[hook].only == 0 || hooks[hook].only == st.st_ino);
	unsigned releases = hooks[hook].releases;
	hooks[hook].hanging += hang;
	while (hang && hooks[hook].releases == releases)
		pthread_cond_wait(&released, &lock);
	hooks[hook].hanging -= hang;
	pthread_mutex_unlock(&lock);
	errno = error;
	return error;
}

ssize_t __real_preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags);
ssize_t __wrap_preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags);
ssize_t __wrap_preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
	return enter(HOOK_READ, fd) ? -1 : __real_preadv2(fd, iov, count, offset, flags);
}

ssize_t __real_pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags);
ssize_t __wrap_pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags);
ssize_t __wrap_pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
	return enter(HOOK_WRITE, fd) ? -1 : __real_pwritev2(fd, iov, count, offset, flags);
}

ssize_t __real_pread(int fd, void *data, size_t len, off_t offset);
ssize_t __wrap_pread(int fd, void *data, size_t len, off_t offset);
ssize_t __wrap_pread(int fd, void *data, size_t len, off_t offset)
{
	if (enter(HOOK_COPY_READ, fd))
		return -1;
	return __real_pread(fd, data, shortened(HOOK_COPY_READ, len), offset);
}

ssize_t __real_pwrite(int fd, const void *data, size_t len, off_t offset);
ssize_t __wrap_pwrite(int fd, const void *data, size_t len, off_t offset);
ssize_t __wrap_pwrite(int fd, const void *data, size_t len, off_t offset)
{
	if (enter(HOOK_COPY_WRITE, fd))
		return -1;
	return __real_pwrite(fd, data, shortened(HOOK_COPY_WRITE, len), offset);
}

int __real_fsync(int fd);
int __wrap_fsync(int fd);
int __wrap_fsync(int fd)
{
	return enter(HOOK_FSYNC, fd) ? -1 : __real_fsync(fd);
}

int __real_fdatasync(int fd);
int __wrap_fdatasync(int fd);
int __wrap_fdatasync(int fd)
{
	return enter(HOOK_FSYNC, fd) ? -1 : __real_fdatasync(fd);
}

int __real_sys_open_beneath(int dir_fd, const char *path, int flags, mode_t mode);
int __wrap_sys_open_beneath(int dir_fd, const char *path, int flags, mode_t mode);
int __wrap_sys_open_beneath(int dir_fd, const char *path, int flags, mode_t mode)
{
	int error = enter(HOOK_OPEN, -1);

	return error ? -error : __real_sys_open_beneath(dir_fd, path, flags, mode);
}

/* A socketpair ends with 0 where the device says that it is gone. */
ssize_t __real_read(int fd, void *data, size_t len);
ssize_t __wrap_read(int fd, void *data, size_t len);
ssize_t __wrap_read(int fd, void *data, size_t len)
{
	ssize_t n = __real_read(fd, data, len);

	if (n == 0)
		errno = ENODEV;
	return n == 0 ? -1 : n;
}

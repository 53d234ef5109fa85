/* Devices and files for the tests: the part of kernel.h about what lies on a disk. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "kernel.h"
#include "request.h"

struct device *device_of(const char *name, enum device_kind kind)
{
	char objects[4096];

	strcpy(stpcpy(objects, check_path(name)), "/objects");
	CHECK(mkdir(check_path(name), 0700) == 0 && mkdir(objects, 0711) == 0);
	int fd = open(objects, O_PATH | O_DIRECTORY | O_CLOEXEC);
	CHECK(fd >= 0);
	struct device *d = device_new(fd, kind == SLOW || kind == SLOW_POWER,
				      kind == MEMORY || kind == MEMORY_POWER,
				      kind == MEMORY_POWER || kind == SLOW_POWER);
	CHECK(d != NULL);
	atomic_store(&d->limit_bytes, INT64_MAX);
	return d;
}

struct backing *plain_backing(struct device *d, const char *name)
{
	int fd = open(check_path(name), O_RDWR | O_CREAT | O_CLOEXEC, 0644);

	CHECK(fd >= 0);
	struct backing *b = backing_plain(d, fd);
	CHECK(b != NULL);
	return b;
}

struct file *open_plain(struct kernel *k, uint64_t ino, struct device *d, const char *name)
{
	struct file *file = file_open(k->front, ino, plain_backing(d, name));

	CHECK(file != NULL);
	return file;
}

struct file *open_object(struct kernel *k, uint64_t ino, struct device *d, const char *shadow,
			 const char *object, bool create)
{
	int fd = open(check_path(shadow), O_RDWR | O_CREAT | O_CLOEXEC, 0640);

	CHECK(fd >= 0);
	struct backing *b = backing_object(d, fd, -1, object, create, !create);
	CHECK(b != NULL);
	struct file *file = file_open(k->front, ino, b);
	CHECK(file != NULL);
	return file;
}

void put_file(const char *path, const void *data, size_t len, unsigned mode)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, mode);

	CHECK(fd >= 0);
	CHECK_EQ(write(fd, data, len), len);
	CHECK(fchmod(fd, mode) == 0 && close(fd) == 0);
}

int64_t allocated(const char *path)
{
	struct stat st;

	CHECK(stat(path, &st) == 0);
	return (int64_t)st.st_blocks * 512;
}

unsigned parked(struct file *file)
{
	unsigned count = 0;

	pthread_mutex_lock(&file->lock);
	for (struct request *r = file->parked; r != NULL; r = r->park_next)
		count++;
	pthread_mutex_unlock(&file->lock);
	return count;
}

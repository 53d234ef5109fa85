#define _GNU_SOURCE
#include "sizes.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "media.h"
#include "persist.h"

#define NAME "sizes"
#define NEW_NAME "sizes.new"

/* Written out, never a hole: a store must not meet an allocation. */
static int write_zeros(int fd, size_t len)
{
	static const char zeros[64 << 10];

	for (size_t done = 0; done < len;) {
		size_t want = len - done < sizeof(zeros) ? len - done : sizeof(zeros);
		ssize_t n = pwrite(fd, zeros, want, (off_t)done);
		if (n < 0 && errno != EINTR)
			return -errno;
		done += n < 0 ? 0 : (size_t)n;
	}
	return 0;
}

/* Under its name it is always whole: header and zeros. */
static int make(int dir_fd, unsigned count)
{
	uint64_t header = SIZES_MAGIC;

	(void)unlinkat(dir_fd, NEW_NAME, 0);
	int fd = openat(dir_fd, NEW_NAME, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
			0600);
	if (fd < 0)
		return -errno;
	int err = write_zeros(fd, count * sizeof(struct slot));
	if (err == 0 && pwrite(fd, &header, sizeof(header), 0) != sizeof(header))
		err = -EIO;
	if (err == 0 && (fsync(fd) != 0 || renameat(dir_fd, NEW_NAME, dir_fd, NAME) != 0 ||
			 fsync(dir_fd) != 0))
		err = -errno;
	if (err < 0) {
		close(fd);
		return err;
	}
	return fd;
}

static int open_or_make(int dir_fd, unsigned count)
{
	int fd = openat(dir_fd, NAME, O_RDWR | O_NOFOLLOW | O_CLOEXEC);

	if (fd >= 0)
		return fd;
	return errno == ENOENT ? make(dir_fd, count) : -errno;
}

static int map(struct sizes *s, int fd)
{
	int flags = s->sync ? MAP_SHARED_VALIDATE | MAP_SYNC : MAP_SHARED;
	struct slot_values header;
	struct stat st;

	if (fstat(fd, &st) != 0)
		return -errno;
	s->count = (unsigned)((size_t)st.st_size / sizeof(struct slot));
	if (s->count < 2)
		return -EINVAL;
	s->failed = calloc(s->count, sizeof(*s->failed));
	if (s->failed == NULL)
		return -ENOMEM;
	s->slots = mmap(NULL, s->count * sizeof(struct slot), PROT_READ | PROT_WRITE,
			flags | MAP_POPULATE, fd, 0);
	if (s->slots == MAP_FAILED)
		return -errno;
	int err = sizes_load(s, 0, &header);
	if (err == 0 && header.nonce != SIZES_MAGIC)
		err = -EINVAL;
	if (err < 0)
		munmap(s->slots, s->count * sizeof(struct slot));
	return err;
}

struct sizes *sizes_open(int dir_fd, unsigned count, bool sync)
{
	struct sizes *s = calloc(1, sizeof(*s));

	if (s == NULL)
		return NULL;
	s->sync = sync;
	s->next = 1;
	int err = media_catch_errors();
	int fd = err < 0 ? err : open_or_make(dir_fd, count);
	err = fd < 0 ? fd : map(s, fd);
	if (fd >= 0)
		close(fd);
	if (err < 0) {
		free(s->failed);
		free(s);
		errno = -err;
		return NULL;
	}
	pthread_mutex_init(&s->lock, NULL);
	for (unsigned i = 1; i < s->count; i++) {
		struct slot_values values;
		s->used += sizes_load(s, i, &values) != 0 || values.nonce != 0;
	}
	return s;
}

void sizes_close(struct sizes *s)
{
	munmap(s->slots, s->count * sizeof(struct slot));
	pthread_mutex_destroy(&s->lock);
	free(s->failed);
	free(s);
}

/* -- slots -------------------------------------------------------------------- */

struct access {
	struct slot *slot;
	struct slot_values values;
};

/* Runs touch on a slot; -EIO when it fails now, or did before. */
static int touch_slot(struct sizes *s, unsigned number, int (*touch)(void *), struct access *a)
{
	a->slot = &s->slots[number];
	if (s->failed[number])
		return -EIO;
	int err = media_touch(touch, a);
	if (err == -EIO)
		s->failed[number] = true;
	return err;
}

static int load(void *arg)
{
	struct access *a = arg;

	a->values = (struct slot_values){
		.nonce = atomic_load(&a->slot->nonce),
		.size = atomic_load(&a->slot->size),
		.mtime_ns = atomic_load(&a->slot->mtime_ns),
		.ino = atomic_load(&a->slot->ino),
		.grown = atomic_load(&a->slot->grown),
		.settled = atomic_load(&a->slot->settled),
	};
	return 0;
}

int sizes_load(struct sizes *s, unsigned number, struct slot_values *values)
{
	struct access a;
	int err = touch_slot(s, number, load, &a);

	if (err == 0)
		*values = a.values;
	return err;
}

static int fill(void *arg)
{
	struct access *a = arg;

	if (atomic_load(&a->slot->nonce) != 0)
		return -EBUSY;
	persist_store(&a->slot->size, a->values.size);
	persist_store(&a->slot->mtime_ns, a->values.mtime_ns);
	persist_store(&a->slot->ino, a->values.ino);
	persist_store(&a->slot->grown, a->values.size);
	persist_store(&a->slot->settled, a->values.size);
	persist_store(&a->slot->nonce, a->values.nonce);
	/* One drain: before it no file has this nonce, in whatever order they arrive. */
	persist_drain();
	return 0;
}

int sizes_take(struct sizes *s, uint64_t nonce, uint64_t ino, uint64_t size, uint64_t mtime_ns)
{
	struct access a = {.values = {
		.nonce = nonce, .ino = ino, .size = size, .mtime_ns = mtime_ns}};
	unsigned number = 0;
	int err = -ENOSPC;

	pthread_mutex_lock(&s->lock);
	for (unsigned i = 0; err < 0 && i < s->count - 1; i++) {
		number = 1 + (s->next - 1 + i) % (s->count - 1);
		err = touch_slot(s, number, fill, &a);
	}
	if (err == 0) {
		s->next = 1 + number % (s->count - 1);
		s->used++;
	}
	pthread_mutex_unlock(&s->lock);
	return err == 0 ? (int)number : -ENOSPC;
}

static int clear(void *arg)
{
	struct access *a = arg;

	a->values.nonce = atomic_load(&a->slot->nonce);
	persist_store(&a->slot->nonce, 0);
	persist_drain();
	return 0;
}

void sizes_give_back(struct sizes *s, unsigned number)
{
	struct access a;

	pthread_mutex_lock(&s->lock);
	/* One that fails keeps a nonce that no file has. */
	if (touch_slot(s, number, clear, &a) == 0 && a.values.nonce != 0)
		s->used--;
	pthread_mutex_unlock(&s->lock);
}

static int store_grown(void *arg)
{
	struct access *a = arg;

	persist_store(&a->slot->settled, a->values.settled);
	persist_store(&a->slot->grown, a->values.grown);
	persist_drain();
	return 0;
}

int sizes_store_grown(struct sizes *s, unsigned number, uint64_t grown, uint64_t settled)
{
	struct access a = {.values = {.grown = grown, .settled = settled}};

	return touch_slot(s, number, store_grown, &a);
}

static int store_written(void *arg)
{
	struct access *a = arg;

	persist_store(&a->slot->mtime_ns, a->values.mtime_ns);
	if (a->values.size != 0)
		persist_store(&a->slot->size, a->values.size);
	persist_drain();
	return 0;
}

int sizes_store_written(struct sizes *s, unsigned number, uint64_t mtime_ns, uint64_t size)
{
	struct access a = {.values = {.mtime_ns = mtime_ns, .size = size}};

	return touch_slot(s, number, store_written, &a);
}

int sizes_sync(struct sizes *s)
{
	if (s->sync)
		return 0;
	return msync(s->slots, s->count * sizeof(struct slot), MS_SYNC) == 0 ? 0 : -errno;
}

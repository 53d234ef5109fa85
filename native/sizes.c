#define _GNU_SOURCE
#include "sizes.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

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

struct sizes *sizes_open(int dir_fd, unsigned count, bool sync)
{
	struct sizes *s = calloc(1, sizeof(*s));
	struct stat st;

	if (s == NULL)
		return NULL;
	int fd = open_or_make(dir_fd, count);
	int err = fd < 0 ? fd : fstat(fd, &st) == 0 ? 0 : -errno;
	if (err == 0) {
		s->count = (unsigned)((size_t)st.st_size / sizeof(struct slot));
		int flags = sync ? MAP_SHARED_VALIDATE | MAP_SYNC : MAP_SHARED;
		s->slots = mmap(NULL, s->count * sizeof(struct slot), PROT_READ | PROT_WRITE,
				flags | MAP_POPULATE, fd, 0);
		if (s->slots == MAP_FAILED)
			err = -errno;
		else if (s->count < 2 || atomic_load(&s->slots[0].nonce) != SIZES_MAGIC)
			err = -EINVAL;
	}
	if (fd >= 0)
		close(fd);
	if (err < 0) {
		if (s->slots != NULL && s->slots != MAP_FAILED)
			munmap(s->slots, s->count * sizeof(struct slot));
		free(s);
		errno = -err;
		return NULL;
	}
	pthread_mutex_init(&s->lock, NULL);
	s->sync = sync;
	s->next = 1;
	return s;
}

void sizes_close(struct sizes *s)
{
	munmap(s->slots, s->count * sizeof(struct slot));
	pthread_mutex_destroy(&s->lock);
	free(s);
}

static unsigned find_free(struct sizes *s)
{
	for (unsigned i = 0; i < s->count - 1; i++) {
		unsigned number = 1 + (s->next - 1 + i) % (s->count - 1);
		if (atomic_load(&s->slots[number].nonce) == 0)
			return number;
	}
	return 0;
}

int sizes_take(struct sizes *s, uint64_t nonce, uint64_t ino, uint64_t size, uint64_t mtime_ns)
{
	pthread_mutex_lock(&s->lock);
	unsigned number = find_free(s);
	if (number != 0) {
		struct slot *slot = &s->slots[number];
		s->next = 1 + number % (s->count - 1);
		persist_store(&slot->size, size);
		persist_store(&slot->mtime_ns, mtime_ns);
		persist_store(&slot->ino, ino);
		persist_store(&slot->grown, size);
		persist_drain(); /* before the nonce, which makes it count */
		persist_store(&slot->nonce, nonce);
		persist_drain();
	}
	pthread_mutex_unlock(&s->lock);
	return number != 0 ? (int)number : -ENOSPC;
}

int sizes_sync(struct sizes *s)
{
	if (s->sync)
		return 0;
	return msync(s->slots, s->count * sizeof(struct slot), MS_SYNC) == 0 ? 0 : -errno;
}

void sizes_give_back(struct sizes *s, unsigned number)
{
	pthread_mutex_lock(&s->lock);
	persist_store(&s->slots[number].nonce, 0);
	persist_drain();
	pthread_mutex_unlock(&s->lock);
}

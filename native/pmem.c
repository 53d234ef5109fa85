#define _GNU_SOURCE
#include "pmem.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "persist.h"

/* Address space, not memory: the mapping grows in place, so that no writer
 * ever holds an address that has moved.  Kafka's segments end at 2 GiB. */
enum { WINDOW_SHIFT = 32 };
#define WINDOW_BYTES (1ull << WINDOW_SHIFT)

#define HUGE_PAGE (2ull << 20)

struct pmem {
	int fd;
	bool sync;
	struct sizes *sizes;
	unsigned number;
	bool sealed;
	struct slot *slot;
	char *window;
	pthread_mutex_t write_lock;
	pthread_mutex_t grow_lock;
	_Atomic uint64_t capacity; /* mapped and populated up to here */
	/* What the slot has, and still true when it belongs to another file. */
	_Atomic uint64_t size;
	_Atomic uint64_t mtime_ns;
};

/* -- media errors ------------------------------------------------------------- */

static _Thread_local sigjmp_buf *copying;
static struct sigaction before;

static void on_bus_error(int signal, siginfo_t *info, void *context)
{
	if (copying != NULL)
		siglongjmp(*copying, 1);
	if (before.sa_flags & SA_SIGINFO && before.sa_sigaction != NULL) {
		before.sa_sigaction(signal, info, context);
		return;
	}
	if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
		before.sa_handler(signal);
		return;
	}
	struct sigaction fatal = {.sa_handler = SIG_DFL};
	sigaction(SIGBUS, &fatal, NULL); /* the store is repeated, and kills */
}

int pmem_catch_media_errors(void)
{
	struct sigaction action = {.sa_sigaction = on_bus_error,
				   .sa_flags = SA_SIGINFO | SA_NODEFER};

	return sigaction(SIGBUS, &action, &before) == 0 ? 0 : -errno;
}

static int copy_caught(char *to, const void *from, size_t len)
{
	sigjmp_buf back;

	if (sigsetjmp(back, 0) != 0) {
		copying = NULL;
		return -EIO;
	}
	copying = &back;
	persist_copy(to, from, len);
	persist_drain();
	copying = NULL;
	return 0;
}

/* -- growing ------------------------------------------------------------------ */

/* Written zeros, and no unwritten extents: the first store into one of those
 * would wait for the journal. */
static int write_zeros(int fd, uint64_t from, uint64_t to)
{
	static const char zeros[256 << 10];

	while (from < to) {
		size_t want = to - from < sizeof(zeros) ? (size_t)(to - from) : sizeof(zeros);
		ssize_t n = pwrite(fd, zeros, want, (off_t)from);
		if (n < 0 && errno != EINTR)
			return -errno;
		from += n < 0 ? 0 : (uint64_t)n;
	}
	return 0;
}

static int map_range(struct pmem *p, uint64_t from, uint64_t to)
{
	int flags = p->sync ? MAP_SHARED_VALIDATE | MAP_SYNC : MAP_SHARED;
	void *at = mmap(p->window + from, to - from, PROT_READ | PROT_WRITE, flags | MAP_FIXED,
			p->fd, (off_t)from);

	return at == MAP_FAILED ? -errno : 0;
}

static uint64_t page_down(uint64_t bytes)
{
	return bytes & ~4095ull;
}

/* All that will be written next, also where an fsync has protected the pages
 * again: the first store into each of them would fault. */
static void populate(struct pmem *p, uint64_t to)
{
	uint64_t from = page_down(atomic_load(&p->size));

	/* Before Linux 5.14 they do. */
	if (from < to)
		(void)madvise(p->window + from, to - from, MADV_POPULATE_WRITE);
}

/* In one piece, so that huge pages can map it; and written zeros. */
static int lengthen(struct pmem *p, uint64_t length, uint64_t end)
{
	/* Before the file is longer: recovery leaves a file alone whose length
	 * is none that we gave it. */
	persist_store(&p->slot->grown, end);
	persist_drain();
	if (fallocate(p->fd, 0, (off_t)length, (off_t)(end - length)) != 0)
		return -errno;
	return write_zeros(p->fd, length, end);
}

static int grow_locked(struct pmem *p, uint64_t end)
{
	uint64_t capacity = atomic_load(&p->capacity);
	struct stat st;

	end = page_down(end + 4095);
	if (end <= capacity)
		return 0;
	if (end > WINDOW_BYTES)
		return -EFBIG;
	if (fstat(p->fd, &st) != 0)
		return -errno;
	int err = (uint64_t)st.st_size < end ? lengthen(p, (uint64_t)st.st_size, end) : 0;
	if (err < 0)
		return err;
	/* The journal is committed here, and not by the first stores. */
	if (fdatasync(p->fd) != 0)
		return -errno;
	err = map_range(p, capacity & ~(HUGE_PAGE - 1), end);
	if (err < 0)
		return err;
	populate(p, end);
	atomic_store(&p->capacity, end);
	return 0;
}

int pmem_grow(struct pmem *p, uint64_t end)
{
	pthread_mutex_lock(&p->grow_lock);
	int err = grow_locked(p, end);
	pthread_mutex_unlock(&p->grow_lock);
	return err;
}

/* -- a growing file ----------------------------------------------------------- */

struct pmem *pmem_open(int fd, struct sizes *sizes, unsigned number, bool sync)
{
	struct pmem *p = calloc(1, sizeof(*p));
	struct stat st;

	if (p == NULL)
		return NULL;
	p->fd = fd;
	p->sync = sync;
	p->sizes = sizes;
	p->number = number;
	p->slot = &sizes->slots[number];
	atomic_init(&p->size, atomic_load(&p->slot->size));
	atomic_init(&p->mtime_ns, atomic_load(&p->slot->mtime_ns));
	p->window = mmap(NULL, WINDOW_BYTES, PROT_NONE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	int err = p->window == MAP_FAILED ? -errno : 0;
	pthread_mutex_init(&p->write_lock, NULL);
	pthread_mutex_init(&p->grow_lock, NULL);
	if (err == 0)
		err = fstat(fd, &st) == 0 ? 0 : -errno;
	/* Whole pages that are there, as they are: the file is not changed before
	 * all its users know that it grows. */
	if (err == 0 && st.st_size >= 4096) {
		atomic_store(&p->capacity, page_down((uint64_t)st.st_size));
		err = map_range(p, 0, p->capacity);
	}
	if (err == 0)
		return p;
	if (p->window != MAP_FAILED)
		munmap(p->window, WINDOW_BYTES);
	free(p);
	errno = -err;
	return NULL;
}

void pmem_close(struct pmem *p)
{
	struct stat st;

	/* The removal has to be durable first: else a power cut brings back a
	 * name of a file that is too long, and no slot. */
	if (!p->sealed && fstat(p->fd, &st) == 0 && st.st_nlink == 0 && fsync(p->fd) == 0)
		sizes_give_back(p->sizes, p->number);
	munmap(p->window, WINDOW_BYTES);
	pthread_mutex_destroy(&p->write_lock);
	pthread_mutex_destroy(&p->grow_lock);
	free(p);
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME_COARSE, &now); /* as filesystems take theirs */
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The bytes are durable by now: the size may follow. */
static void note_written(struct pmem *p, uint64_t end)
{
	uint64_t now = now_ns();

	persist_store(&p->slot->mtime_ns, now);
	if (end > atomic_load(&p->size))
		persist_store(&p->slot->size, end);
	persist_drain();
	atomic_store(&p->mtime_ns, now);
	if (end > atomic_load(&p->size))
		atomic_store(&p->size, end);
}

int pmem_write(struct pmem *p, const void *data, size_t len, uint64_t offset)
{
	uint64_t end = offset + len;
	int err = -EAGAIN;

	pthread_mutex_lock(&p->write_lock);
	if (p->sealed)
		err = -ESTALE;
	else if (end <= atomic_load(&p->capacity))
		err = copy_caught(p->window + offset, data, len);
	if (err == 0)
		note_written(p, end);
	pthread_mutex_unlock(&p->write_lock);
	return err;
}

void pmem_set_mtime(struct pmem *p, uint64_t mtime_ns)
{
	pthread_mutex_lock(&p->write_lock);
	if (!p->sealed) {
		persist_store(&p->slot->mtime_ns, mtime_ns);
		persist_drain();
	}
	atomic_store(&p->mtime_ns, mtime_ns);
	pthread_mutex_unlock(&p->write_lock);
}

static int cut(struct pmem *p)
{
	uint64_t mtime = pmem_mtime_ns(p), size = pmem_size(p);
	struct timespec times[2] = {
		{.tv_nsec = UTIME_OMIT},
		{.tv_sec = (time_t)(mtime / 1000000000u), .tv_nsec = (long)(mtime % 1000000000u)},
	};

	/* If it fails half way, a later write has to grow again first. */
	atomic_store(&p->capacity, page_down(size));
	if (ftruncate(p->fd, (off_t)size) != 0 || futimens(p->fd, times) != 0 ||
	    fsync(p->fd) != 0)
		return -errno;
	return 0;
}

int pmem_seal(struct pmem *p)
{
	pthread_mutex_lock(&p->write_lock);
	int err = cut(p);
	if (err == 0) {
		/* From here on the slot may be another file's. */
		p->sealed = true;
		/* Invariant of sizes: not before the file is as long as it says. */
		sizes_give_back(p->sizes, p->number);
	}
	pthread_mutex_unlock(&p->write_lock);
	return err;
}

uint64_t pmem_size(const struct pmem *p)
{
	return atomic_load(&p->size);
}

uint64_t pmem_mtime_ns(const struct pmem *p)
{
	return atomic_load(&p->mtime_ns);
}

char *pmem_window(struct pmem *p)
{
	return p->window;
}

uint64_t pmem_capacity(struct pmem *p)
{
	return atomic_load(&p->capacity);
}

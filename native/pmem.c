#define _GNU_SOURCE
#include "pmem.h"

#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

#include "media.h"
#include "persist.h"
#include "sys.h"

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
	uint64_t nonce;
	bool sealed;
	bool tied;   /* the xattr has the nonce */
	bool longer; /* the file may be longer than its size */
	char *window;
	pthread_mutex_t write_lock;
	pthread_mutex_t grow_lock;
	_Atomic uint64_t capacity; /* mapped and populated up to here */
	/* What the slot has, and still true when it belongs to another file. */
	_Atomic uint64_t size;
	_Atomic uint64_t mtime_ns;
};

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

/* After a seal that failed half way the nonce may be gone. */
static int tie(struct pmem *p)
{
	uint64_t nonce = htole64(p->nonce);

	if (!p->tied && fsetxattr(p->fd, NONCE_ATTRIBUTE, &nonce, sizeof(nonce), 0) != 0)
		return -errno;
	p->tied = true;
	return 0;
}

/* In one piece, so that huge pages can map it; and written zeros. */
static int lengthen(struct pmem *p, uint64_t length, uint64_t end)
{
	/* Before the file is longer: recovery leaves a file alone whose length
	 * is none that we gave it. */
	int err = sizes_store_grown(p->sizes, p->number, end, length);

	if (err == 0)
		err = tie(p);
	if (err < 0)
		return err;
	p->longer = true;
	if (fallocate(p->fd, 0, (off_t)length, (off_t)(end - length)) != 0)
		return -errno;
	return write_zeros(p->fd, length, end);
}

static int grow_locked(struct pmem *p, uint64_t end)
{
	uint64_t capacity = atomic_load(&p->capacity);
	struct stat st;

	if (p->sealed)
		return -ESTALE;
	end = page_down(end + 4095);
	if (end <= capacity)
		return 0;
	if (end > WINDOW_BYTES)
		return -EFBIG;
	if (fstat(p->fd, &st) != 0)
		return -errno;
	bool longer = (uint64_t)st.st_size < end;
	int err = longer ? lengthen(p, (uint64_t)st.st_size, end) : 0;
	if (err < 0)
		return err;
	/* The journal is committed here, and not by the first stores.  A failure
	 * is none that another device's room would mend, whatever it is. */
	if (fdatasync(p->fd) != 0)
		return -EIO;
	if (longer)
		err = sizes_store_grown(p->sizes, p->number, end, end);
	if (err == 0)
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

/* Whole pages that are there, as they are: the file is not changed before all
 * its users know that it grows. */
static int map_what_is_there(struct pmem *p)
{
	struct stat st;

	if (fstat(p->fd, &st) != 0)
		return -errno;
	if (st.st_size < 4096)
		return 0;
	if ((uint64_t)st.st_size > WINDOW_BYTES)
		return -EFBIG;
	atomic_store(&p->capacity, page_down((uint64_t)st.st_size));
	return map_range(p, 0, p->capacity);
}

struct pmem *pmem_open(int fd, struct sizes *sizes, unsigned number, bool sync)
{
	struct pmem *p = calloc(1, sizeof(*p));
	struct slot_values slot = {0};

	if (p == NULL) {
		sizes_give_back(sizes, number);
		return NULL;
	}
	*p = (struct pmem){.fd = fd, .sync = sync, .sizes = sizes, .number = number, .tied = true};
	pthread_mutex_init(&p->write_lock, NULL);
	pthread_mutex_init(&p->grow_lock, NULL);
	p->window = mmap(NULL, WINDOW_BYTES, PROT_NONE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	int err = p->window == MAP_FAILED ? -errno : sizes_load(sizes, number, &slot);
	p->nonce = slot.nonce;
	atomic_init(&p->size, slot.size);
	atomic_init(&p->mtime_ns, slot.mtime_ns);
	if (err == 0)
		err = map_what_is_there(p);
	if (err < 0) {
		pmem_close(p);
		errno = -err;
		return NULL;
	}
	return p;
}

/* Whether nothing has to know its size after a crash: it is no longer than
 * that, or it is gone.  The removal has to be durable: else a power cut brings
 * back a name of a file that is too long, and no slot. */
static bool needs_no_slot(const struct pmem *p)
{
	struct stat st;

	return !p->longer || (fstat(p->fd, &st) == 0 && st.st_nlink == 0 && fsync(p->fd) == 0);
}

void pmem_close(struct pmem *p)
{
	if (!p->sealed && needs_no_slot(p))
		sizes_give_back(p->sizes, p->number);
	if (p->window != MAP_FAILED)
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

struct copy {
	char *to;
	const void *from;
	size_t len;
};

static int copy(void *arg)
{
	const struct copy *c = arg;

	persist_copy(c->to, c->from, c->len);
	persist_drain(); /* before the size, which makes the bytes count */
	return 0;
}

/* The bytes are durable by now: the size may follow. */
static int note_written(struct pmem *p, uint64_t end)
{
	uint64_t now = now_ns();
	bool grows = end > atomic_load(&p->size);
	int err = sizes_store_written(p->sizes, p->number, now, grows ? end : 0);

	if (err < 0)
		return err;
	atomic_store(&p->mtime_ns, now);
	if (grows)
		atomic_store(&p->size, end);
	return 0;
}

int pmem_write(struct pmem *p, const void *data, size_t len, uint64_t offset)
{
	struct copy c = {p->window + offset, data, len};
	uint64_t end = offset + len;
	int err = -EAGAIN;

	pthread_mutex_lock(&p->write_lock);
	if (p->sealed)
		err = -ESTALE;
	else if (end <= atomic_load(&p->capacity))
		err = media_touch(copy, &c);
	if (err == 0)
		err = note_written(p, end);
	pthread_mutex_unlock(&p->write_lock);
	return err;
}

int pmem_set_mtime(struct pmem *p, uint64_t mtime_ns)
{
	pthread_mutex_lock(&p->write_lock);
	int err = p->sealed ? 0 : sizes_store_written(p->sizes, p->number, mtime_ns, 0);
	if (err == 0)
		atomic_store(&p->mtime_ns, mtime_ns);
	pthread_mutex_unlock(&p->write_lock);
	return err;
}

/* In the order that sizes.h gives the reasons for. */
static int cut(struct pmem *p)
{
	uint64_t mtime = pmem_mtime_ns(p), size = pmem_size(p);
	struct timespec times[2] = {
		{.tv_nsec = UTIME_OMIT},
		{.tv_sec = (time_t)(mtime / 1000000000u), .tv_nsec = (long)(mtime % 1000000000u)},
	};

	/* If it fails half way, a later write has to grow again first. */
	atomic_store(&p->capacity, page_down(size));
	if (sys_truncate(p->fd, (off_t)size) != 0 || futimens(p->fd, times) != 0)
		return -errno;
	p->tied = false;
	if (fremovexattr(p->fd, NONCE_ATTRIBUTE) != 0 && errno != ENODATA)
		return -errno;
	return fsync(p->fd) == 0 ? 0 : -errno;
}

int pmem_seal(struct pmem *p)
{
	/* A file that is made longer after the cut would be left without a slot. */
	pthread_mutex_lock(&p->grow_lock);
	pthread_mutex_lock(&p->write_lock);
	int err = cut(p);
	if (err == 0) {
		/* From here on the slot may be another file's. */
		p->sealed = true;
		/* Invariant of sizes: not before the cut is durable. */
		sizes_give_back(p->sizes, p->number);
	}
	pthread_mutex_unlock(&p->write_lock);
	pthread_mutex_unlock(&p->grow_lock);
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

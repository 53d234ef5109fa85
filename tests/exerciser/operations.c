#define _GNU_SOURCE
#include "operations.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/falloc.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

#include "journal.h"

enum { PIPE_BYTES = 64 << 10 };

struct range {
	int64_t at, length;
};

struct operation {
	const char *name;
	void (*make)(struct writer *w, const char *name);
	unsigned weight;
	/* Shared: several writers at once.  Alone: never with several, since a page that is stored
	 * to in a mapping while it is written to by a call is undefined, on any filesystem. */
	enum { SHARED, EXCLUSIVE, ALONE } kind;
};

static struct range range_below(struct writer *w, int64_t limit)
{
	static const int64_t lengths[] = {16, PAGE, 16 * PAGE, 64 * PAGE};
	int64_t length = 1 + writer_random(w, lengths[writer_random(w, 4)]);
	int64_t at = writer_random(w, limit);

	if (writer_random(w, 4) == 0)
		at -= at % PAGE;
	if (writer_random(w, 4) == 0)
		length += PAGE - length % PAGE;
	return (struct range){at, length < limit - at ? length : limit - at};
}

static struct range journaled(struct writer *w, const char *name, struct range r)
{
	journal_add(w->number, name, r.at, r.length);
	return r;
}

static void expect(bool right, const char *name)
{
	if (!right)
		journal_fail("%s: %s", name, strerror(errno));
}

static void expect_bytes(const char *name, int64_t found, int64_t expected)
{
	if (found < 0)
		journal_fail("%s: %s", name, strerror(errno));
	if (found != expected)
		journal_fail("%s: %" PRId64 " bytes and not %" PRId64, name, found, expected);
}

static const uint8_t *fill(struct writer *w, int64_t length)
{
	for (int64_t i = 0; i < length; i += 8) {
		int64_t word = writer_random(w, INT64_MAX);
		memcpy(w->buffer + i, &word, (size_t)(length - i < 8 ? length - i : 8));
	}
	return w->buffer;
}

static void set_size(struct subject *s, int64_t size)
{
	if (size < s->size)
		memset(s->copy + size, 0, (size_t)(s->size - size));
	s->size = size;
}

static void put(struct subject *s, int64_t at, const uint8_t *data, int64_t length)
{
	memcpy(s->copy + at, data, (size_t)length);
	if (at + length > s->size)
		s->size = at + length;
}

static int some_fd(struct writer *w)
{
	return w->fds[writer_random(w, HANDLES)];
}

/* -- writing ---------------------------------------------------------------------------------- */

/* Within the file, and within one stripe: others may write beside it. */
static void overwrite(struct writer *w, const char *name)
{
	struct subject *s = w->subject;
	if (s->size == 0)
		return;
	struct range r = range_below(w, s->size);
	r.length = writer_stripe_end(w, r.at, r.at + r.length) - r.at;
	if (r.length == 0)
		return;
	journaled(w, name, r);
	const uint8_t *data = fill(w, r.length);
	expect_bytes(name, pwrite(w->fds[WRITING], data, (size_t)r.length, r.at), r.length);
	memcpy(s->copy + r.at, data, (size_t)r.length);
}

static void write_anywhere(struct writer *w, const char *name)
{
	struct range r = journaled(w, name, range_below(w, w->subject->size_max));
	const uint8_t *data = fill(w, r.length);
	expect_bytes(name, pwrite(w->fds[WRITING], data, (size_t)r.length, r.at), r.length);
	put(w->subject, r.at, data, r.length);
}

static void append(struct writer *w, const char *name)
{
	struct subject *s = w->subject;
	if (s->size == s->size_max)
		return;
	struct range r = range_below(w, s->size_max - s->size);
	r.at = s->size;
	journaled(w, name, r);
	const uint8_t *data = fill(w, r.length);
	expect_bytes(name, write(w->fds[APPENDING], data, (size_t)r.length), r.length);
	put(s, r.at, data, r.length);
}

static void store(struct writer *w, const char *name)
{
	struct subject *s = w->subject;
	if (s->size == 0)
		return;
	struct range r = journaled(w, name, range_below(w, s->size));
	int flags = MAP_SHARED;
	size_t length = (size_t)s->size_max;
	uint8_t *map = mmap(NULL, length, PROT_READ | PROT_WRITE, flags, w->fds[WRITING], 0);
	expect(map != MAP_FAILED, name);
	memcpy(map + r.at, fill(w, r.length), (size_t)r.length);
	put(s, r.at, w->buffer, r.length);
	if (writer_random(w, 4) == 0)
		expect(msync(map, length, MS_SYNC) == 0, name);
	expect(munmap(map, length) == 0, name);
}

static void copy_range(struct writer *w, const char *name)
{
	struct subject *s = w->subject;
	if (s->size < 2)
		return;
	struct range r = range_below(w, s->size / 2);
	off_t from = r.at, to = s->size / 2 + writer_random(w, s->size_max - s->size / 2 - r.length + 1);
	int64_t begin = to;
	journaled(w, name, (struct range){to, r.length});
	int in = some_fd(w), out = w->fds[WRITING];
	while (r.length > 0) {
		ssize_t done = copy_file_range(in, &from, out, &to, (size_t)r.length, 0);
		if (done <= 0)
			journal_fail("%s: %zd, %s", name, done, strerror(errno));
		r.length -= done;
	}
	memcpy(w->buffer, s->copy + r.at, (size_t)(to - begin));
	put(s, begin, w->buffer, to - begin);
}

/* -- sizes and holes -------------------------------------------------------------------------- */

static void truncate_(struct writer *w, const char *name)
{
	struct subject *s = w->subject;
	/* Mostly near the end, so that the file is not always short. */
	int64_t near = s->size - writer_random(w, 4 * PAGE);
	int64_t size = writer_random(w, 4) == 0 || near < 0 ? writer_random(w, s->size_max) : near;
	journaled(w, name, (struct range){size, 0});
	bool by_path = writer_random(w, 2) == 0;
	expect((by_path ? truncate(s->path, size) : ftruncate(w->fds[WRITING], size)) == 0, name);
	set_size(s, size);
}

static void allocate(struct writer *w, const char *name)
{
	struct range r = journaled(w, name, range_below(w, w->subject->size_max));
	int mode = writer_random(w, 2) == 0 ? FALLOC_FL_KEEP_SIZE : 0;
	expect(fallocate(w->fds[WRITING], mode, r.at, r.length) == 0, name);
	if (mode == 0 && r.at + r.length > w->subject->size)
		set_size(w->subject, r.at + r.length);
}

static void zero(struct subject *s, struct range r)
{
	int64_t end = r.at + r.length < s->size ? r.at + r.length : s->size;
	if (r.at < end)
		memset(s->copy + r.at, 0, (size_t)(end - r.at));
}

static void punch(struct writer *w, const char *name)
{
	struct range r = journaled(w, name, range_below(w, w->subject->size_max));
	int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
	expect(fallocate(w->fds[WRITING], mode, r.at, r.length) == 0, name);
	zero(w->subject, r);
}

/* Not every filesystem can; the one of the tier where the file is now decides. */
static void zero_range(struct writer *w, const char *name)
{
	struct subject *s = w->subject;
	struct range r = journaled(w, name, range_below(w, s->size_max));
	int keep = writer_random(w, 2) == 0 ? FALLOC_FL_KEEP_SIZE : 0;
	if (fallocate(w->fds[WRITING], FALLOC_FL_ZERO_RANGE | keep, r.at, r.length) < 0) {
		expect(errno == EOPNOTSUPP, name);
		return;
	}
	if (keep == 0 && r.at + r.length > s->size)
		set_size(s, r.at + r.length);
	zero(s, r);
}

/* -- reading ---------------------------------------------------------------------------------- */

/* One that ends behind the end is short. */
static void read_(struct writer *w, const char *name)
{
	struct subject *s = w->subject;
	struct range r = journaled(w, name, range_below(w, s->size_max));
	int64_t length = r.at >= s->size ? 0 : r.length < s->size - r.at ? r.length : s->size - r.at;
	expect_bytes(name, pread(some_fd(w), w->buffer, (size_t)r.length, r.at), length);
	writer_check(w, false, r.at, w->buffer, length);
}

static void read_mapped(struct writer *w, const char *name)
{
	if (w->subject->size == 0)
		return;
	struct range r = journaled(w, name, range_below(w, w->subject->size));
	if (w->map == NULL || writer_random(w, 16) == 0) {
		writer_unmap(w);
		writer_map(w);
	}
	/* Others may change theirs while it is compared. */
	memcpy(w->buffer, w->map + r.at, (size_t)r.length);
	writer_check(w, false, r.at, w->buffer, r.length);
}

static void send(struct writer *w, const char *name)
{
	int ends[2];
	if (w->subject->size == 0)
		return;
	struct range r = journaled(w, name, range_below(w, w->subject->size));
	if (r.length > PIPE_BYTES - 2 * PAGE)
		r.length = PIPE_BYTES - 2 * PAGE; /* a page of the pipe for each part of a page */
	expect(pipe2(ends, O_CLOEXEC) == 0, name);
	off_t at = r.at;
	for (int64_t sent = 0; sent < r.length;) {
		ssize_t done = sendfile(ends[1], some_fd(w), &at, (size_t)(r.length - sent));
		if (done <= 0)
			journal_fail("%s: %zd, %s", name, done, strerror(errno));
		expect_bytes(name, read(ends[0], w->buffer + sent, (size_t)done), done);
		sent += done;
	}
	close(ends[0]);
	close(ends[1]);
	writer_check(w, false, r.at, w->buffer, r.length);
}

/* What is no data is zeros, and what is no hole is told as data. */
static void seek(struct writer *w, const char *name)
{
	struct subject *s = w->subject;
	if (s->size == 0)
		return;
	struct range r = journaled(w, name, range_below(w, s->size));
	sync_stores(w);
	int64_t data = lseek(some_fd(w), r.at, SEEK_DATA);
	expect(data >= 0 || errno == ENXIO, name);
	int64_t end = data < 0 ? s->size : data;
	for (int64_t i = r.at; i < end; i++)
		if (s->copy[i] != 0)
			journal_fail("%s: no hole at %" PRId64, name, i);
	int64_t hole = lseek(some_fd(w), r.at, SEEK_HOLE);
	if (hole < r.at || hole > s->size)
		journal_fail("%s: a hole at %" PRId64, name, hole);
}

void check_whole(struct writer *w)
{
	struct subject *s = w->subject;
	struct stat status;

	for (int i = 0; i < HANDLES; i++) {
		expect(fstat(w->fds[i], &status) == 0, "fstat");
		expect_bytes("fstat", status.st_size, s->size);
		ssize_t count = pread(w->fds[i], w->buffer, (size_t)s->size_max, 0);
		expect_bytes("read of all", count, s->size);
		writer_check(w, true, 0, w->buffer, s->size);
	}
}

static void check_all(struct writer *w, const char *name)
{
	journal_add(w->number, name, 0, w->subject->size);
	check_whole(w);
}

/* -- handles ---------------------------------------------------------------------------------- */

static void sync_(struct writer *w, const char *name)
{
	int fd = some_fd(w);
	journal_add(w->number, name, 0, 0);
	expect((writer_random(w, 2) == 0 ? fsync(fd) : fdatasync(fd)) == 0, name);
}

void sync_stores(struct writer *w)
{
	expect(fdatasync(w->fds[WRITING]) == 0, "fdatasync");
}

void reopen_all(struct writer *writers, unsigned count)
{
	for (unsigned i = 0; i < count; i++) {
		writer_unmap(&writers[i]);
		writer_close(&writers[i]);
	}
	for (unsigned i = 0; i < count; i++)
		writer_open(&writers[i]);
}

static void reopen(struct writer *w, const char *name)
{
	journal_add(w->number, name, 0, 0);
	reopen_all(w - w->number, w->count);
}

static const struct operation operations[] = {
	{"overwrite", overwrite, 20, SHARED},
	{"read", read_, 16, SHARED},
	{"mapped read", read_mapped, 8, SHARED},
	{"sendfile", send, 8, SHARED},
	{"sync", sync_, 1, SHARED},
	{"write", write_anywhere, 12, EXCLUSIVE},
	{"append", append, 10, EXCLUSIVE},
	{"truncate", truncate_, 6, EXCLUSIVE},
	{"allocate", allocate, 2, EXCLUSIVE},
	{"punch", punch, 2, EXCLUSIVE},
	{"zero range", zero_range, 1, EXCLUSIVE},
	{"copy range", copy_range, 2, EXCLUSIVE},
	{"seek", seek, 2, EXCLUSIVE},
	{"check all", check_all, 1, EXCLUSIVE},
	{"reopen", reopen, 1, EXCLUSIVE},
	{"store", store, 10, ALONE},
};

static const struct operation *choose(struct writer *w)
{
	const unsigned count = sizeof(operations) / sizeof(*operations);
	unsigned total = 0, at = 0;

	for (unsigned i = 0; i < count; i++)
		total += operations[i].weight;
	unsigned chosen = (unsigned)writer_random(w, total);
	while (chosen >= operations[at].weight)
		chosen -= operations[at++].weight;
	return &operations[at];
}

void operation_make(struct writer *w)
{
	const struct operation *operation = choose(w);
	pthread_rwlock_t *lock = &w->subject->lock;

	if (operation->kind == ALONE && w->count > 1)
		return;
	if (operation->kind == SHARED)
		pthread_rwlock_rdlock(lock);
	else
		pthread_rwlock_wrlock(lock);
	operation->make(w, operation->name);
	pthread_rwlock_unlock(lock);
}

#define _GNU_SOURCE
#include "subject.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "journal.h"

void subject_load(struct subject *s, const char *expected)
{
	int fd = open(expected, O_RDONLY | O_CLOEXEC);

	if (fd < 0 && errno == ENOENT)
		return; /* the first run: the file is empty */
	s->size = fd < 0 ? -1 : read(fd, s->copy, (size_t)s->size_max);
	if (s->size < 0)
		journal_fail("cannot read %s: %s", expected, strerror(errno));
	close(fd);
}

void subject_save(const struct subject *s, const char *expected)
{
	int fd = open(expected, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

	if (fd < 0 || write(fd, s->copy, (size_t)s->size) != s->size || close(fd) < 0)
		journal_fail("cannot write %s: %s", expected, strerror(errno));
}

void writer_open(struct writer *w)
{
	static const int flags[HANDLES] = {
		[READING] = O_RDONLY,
		[WRITING] = O_RDWR,
		[APPENDING] = O_RDWR | O_APPEND,
	};

	for (int i = 0; i < HANDLES; i++) {
		w->fds[i] = open(w->subject->path, flags[i] | O_CLOEXEC);
		if (w->fds[i] < 0)
			journal_fail("open: %s", strerror(errno));
	}
}

void writer_close(struct writer *w)
{
	for (int i = 0; i < HANDLES; i++)
		if (close(w->fds[i]) < 0)
			journal_fail("close: %s", strerror(errno));
}

void writer_map(struct writer *w)
{
	enum handle handle = writer_random(w, 2) ? READING : WRITING;
	int protection = handle == READING ? PROT_READ : PROT_READ | PROT_WRITE;

	w->is_private = writer_random(w, 4) == 0;
	int flags = w->is_private ? MAP_PRIVATE : MAP_SHARED;
	w->map = mmap(NULL, (size_t)w->subject->size_max, protection, flags, w->fds[handle], 0);
	if (w->map == MAP_FAILED)
		journal_fail("mmap: %s", strerror(errno));
}

void writer_unmap(struct writer *w)
{
	if (w->map != NULL && munmap(w->map, (size_t)w->subject->size_max) < 0)
		journal_fail("munmap: %s", strerror(errno));
	w->map = NULL;
}

int64_t writer_stripe_end(const struct writer *w, int64_t at, int64_t end)
{
	if (w->count == 1)
		return end;
	if ((unsigned)(at / STRIPE) % w->count != w->number)
		return at;
	int64_t stripe_end = (at / STRIPE + 1) * STRIPE;
	return stripe_end < end ? stripe_end : end;
}

static void check_exactly(const struct writer *w, int64_t at, const uint8_t *found, int64_t length)
{
	const uint8_t *expected = w->subject->copy + at;
	int64_t first = 0, last = length - 1;

	if (length <= 0 || memcmp(found, expected, (size_t)length) == 0)
		return;
	while (found[first] == expected[first])
		first++;
	while (found[last] == expected[last])
		last--;
	journal_fail("writer %u: wrong from %" PRId64 " to %" PRId64
		     ": %02x and not %02x first, size %" PRId64,
		     w->number, at + first, at + last + 1, found[first], expected[first],
		     w->subject->size);
}

void writer_check(const struct writer *w, bool whole, int64_t at, const uint8_t *found,
		  int64_t length)
{
	if (whole || w->count == 1) {
		check_exactly(w, at, found, length);
		return;
	}
	for (int64_t done = 0; done < length;) {
		int64_t here = at + done, end = writer_stripe_end(w, here, at + length);
		check_exactly(w, here, found + done, end - here);
		done = (here / STRIPE + 1) * STRIPE - at;
	}
}

/* splitmix64 */
int64_t writer_random(struct writer *w, int64_t limit)
{
	uint64_t z = w->random += 0x9e3779b97f4a7c15;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
	z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
	return (int64_t)((z ^ (z >> 31)) % (uint64_t)limit);
}

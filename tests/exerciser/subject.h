#ifndef SUBJECT_H
#define SUBJECT_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

/* The file under test, and a copy of it in memory: what it must hold. */
struct subject {
	const char *path;
	uint8_t *copy; /* size_max bytes; zeros from size on */
	int64_t size, size_max;
	/* For writing: whoever changes the size, or bytes of another writer. */
	pthread_rwlock_t lock;
};

/* One for each way in: writers of segments bypass the page cache, readers do not. */
enum handle { READING, WRITING, APPENDING, HANDLES };

enum { PAGE = 4096, STRIPE = 1000 };

/* A thread with handles and a mapping of its own.  While others hold the lock too, it writes and
 * checks only its own stripes; they share pages with those of the others. */
struct writer {
	struct subject *subject;
	unsigned number, count;
	uint64_t random;
	int fds[HANDLES];
	uint8_t *map; /* size_max bytes of the file, or NULL */
	bool is_private;
	uint8_t *buffer; /* size_max bytes */
};

void subject_load(struct subject *s, const char *expected);
void subject_save(const struct subject *s, const char *expected);

void writer_open(struct writer *w);
void writer_close(struct writer *w);
void writer_map(struct writer *w);
void writer_unmap(struct writer *w);

/* The end of the writer's own stripe that at is in, at most end; at itself when it is another's. */
int64_t writer_stripe_end(const struct writer *w, int64_t at, int64_t end);

/* Fails unless found is what the file holds there; only the writer's own stripes unless whole. */
void writer_check(const struct writer *w, bool whole, int64_t at, const uint8_t *found,
		  int64_t length);

/* A number below limit, which is at least 1. */
int64_t writer_random(struct writer *w, int64_t limit);

#endif

#define _GNU_SOURCE
#include "journal.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

struct entry {
	const char *name;
	unsigned writer;
	int64_t at, length;
};

static struct entry entries[JOURNAL_ENTRIES];
static uint64_t added;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
	uint64_t seed, operations;
	unsigned writers;
} run;

void journal_begin(uint64_t seed, uint64_t operations, unsigned writers)
{
	run.seed = seed;
	run.operations = operations;
	run.writers = writers;
}

void journal_add(unsigned writer, const char *name, int64_t at, int64_t length)
{
	pthread_mutex_lock(&lock);
	entries[added++ % JOURNAL_ENTRIES] = (struct entry){name, writer, at, length};
	pthread_mutex_unlock(&lock);
}

void journal_fail(const char *format, ...)
{
	va_list arguments;

	pthread_mutex_lock(&lock); /* for ever: one failure is told */
	uint64_t first = added > JOURNAL_ENTRIES ? added - JOURNAL_ENTRIES : 0;
	for (uint64_t i = first; i < added; i++) {
		const struct entry *e = &entries[i % JOURNAL_ENTRIES];
		fprintf(stderr, "%8" PRIu64 " writer %u: %-14s at %8" PRId64 " length %8" PRId64 "\n",
			i, e->writer, e->name, e->at, e->length);
	}
	fprintf(stderr, "seed %" PRIu64 ", operations %" PRIu64 ", writers %u: ", run.seed,
		run.operations, run.writers);
	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	_exit(1);
}

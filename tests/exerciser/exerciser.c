/* Random operations on one file, each made on a copy in memory too, and compared with it.
 *
 *   exerciser FILE EXPECTED SEED OPERATIONS WRITERS SIZE_MAX
 *
 * EXPECTED is what the file holds at the beginning, if it is there, and is written at the end.
 * Prints "opened" before the first operation and "done" after the last one; the handles stay open
 * until standard input ends.  Exit 1, with the
 * seed and the last operations on standard error, when the file is not what it must be; the same
 * arguments make the same operations again, those of several writers in some other order.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "journal.h"
#include "operations.h"

enum { WRITERS_MAX = 4 };

static uint64_t operations;

static void *exercise(void *arg)
{
	struct writer *w = arg;

	for (uint64_t i = 0; i < operations / w->count; i++)
		operation_make(w);
	return NULL;
}

static void make_all(struct writer *writers, unsigned count)
{
	pthread_t threads[WRITERS_MAX];

	for (unsigned i = 0; i < count; i++)
		if (pthread_create(&threads[i], NULL, exercise, &writers[i]) != 0)
			journal_fail("cannot make a thread");
	for (unsigned i = 0; i < count; i++)
		pthread_join(threads[i], NULL);
}

int main(int argc, char **argv)
{
	if (argc != 7)
		return 2;
	uint64_t seed = strtoull(argv[3], NULL, 10);
	unsigned count = (unsigned)atoi(argv[5]);
	struct subject subject = {.path = argv[1], .size_max = atoll(argv[6])};
	struct writer writers[WRITERS_MAX] = {0};

	operations = strtoull(argv[4], NULL, 10);
	if (count < 1 || count > WRITERS_MAX || subject.size_max % PAGE != 0)
		return 2;
	journal_begin(seed, operations, count);
	pthread_rwlock_init(&subject.lock, NULL);
	subject.copy = calloc(1, (size_t)subject.size_max);
	if (subject.copy == NULL)
		journal_fail("no memory");
	subject_load(&subject, argv[2]);
	for (unsigned i = 0; i < count; i++) {
		writers[i] = (struct writer){&subject, i, count, .random = seed * WRITERS_MAX + i};
		writers[i].buffer = malloc((size_t)subject.size_max);
		if (writers[i].buffer == NULL)
			journal_fail("no memory");
		writer_open(&writers[i]);
	}
	puts("opened");
	fflush(stdout);
	check_whole(&writers[0]);
	make_all(writers, count);
	if (count == 1)
		sync_stores(&writers[0]); /* writes need no fsync to survive the daemon */
	subject_save(&subject, argv[2]);
	puts("done");
	fflush(stdout);
	while (getchar() != EOF)
		;
	return 0;
}

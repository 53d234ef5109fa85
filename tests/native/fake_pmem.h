/*
 * fake_pmem: libpmem over a model of persistent memory.
 *
 * Of each watched range the model keeps what is durable.  A flush notes what
 * the range has then, a drain makes all that was noted durable.  In a crash
 * any 8 aligned bytes that differ may be as they were durable or as they were
 * stored last: caches are written back when they like.  What is stored and
 * not flushed is thus never sure to survive, and never sure to be lost.
 */
#ifndef PAFKAFS_TEST_FAKE_PMEM_H
#define PAFKAFS_TEST_FAKE_PMEM_H

#include <stddef.h>

/* What is there now is durable.  A range that begins where another one does
 * takes its place, with what is durable of it. */
void model_watch(void *start, size_t len);
/* Called before and after each call into libpmem, and at each other step. */
void model_at_each_step(void (*check)(void));
void model_step(void);

enum crash {
	CRASH_NOTHING_MORE, /* only what is durable survives */
	CRASH_EVERYTHING,   /* all stores had been written back */
	CRASH_SOMETHING,    /* any of them, another choice each time */
};

/* What a watched range is after a crash now; valid until the next call. */
const char *model_crash(const void *start, enum crash how);

#endif

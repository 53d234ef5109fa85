#ifndef JOURNAL_H
#define JOURNAL_H

#include <stdint.h>

/* The last operations of all writers, to be told when one finds the file wrong. */

enum { JOURNAL_ENTRIES = 256 };

/* Before anything else: what it takes to have the same operations again. */
void journal_begin(uint64_t seed, uint64_t operations, unsigned writers);

/* An operation that is about to be made; name outlives the journal. */
void journal_add(unsigned writer, const char *name, int64_t at, int64_t length);

/* Tells the seed and the last operations, and ends the program with status 1. */
__attribute__((noreturn, format(printf, 1, 2))) void journal_fail(const char *format, ...);

#endif

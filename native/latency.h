/*
 * latency: how long requests for the contents of open files took, by
 * operation: from when they were read to just before they are answered.
 *
 * Counted with relaxed atomics by any thread: a reader may see a count
 * without its sum, never a wrong one later.
 */
#ifndef PAFKAFS_LATENCY_H
#define PAFKAFS_LATENCY_H

#include <stdatomic.h>
#include <stdint.h>

/* Bucket i counts what took at most 2^i us and more than the one before; the
 * last one what took longer than 2^26 us, 67 s. */
enum { LATENCY_BUCKETS = 28 };

enum { LATENCY_OPERATIONS = 8 };

struct latency {
	struct {
		_Atomic uint64_t sum_ns;
		_Atomic uint64_t count[LATENCY_BUCKETS];
	} of[LATENCY_OPERATIONS];
};

/* For operations that are not counted it does nothing. */
void latency_add(struct latency *l, uint32_t opcode, uint64_t ns);
/* "read", "write", …; NULL from LATENCY_OPERATIONS on. */
const char *latency_name(unsigned operation);

#endif

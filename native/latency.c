#include "latency.h"

#include <linux/fuse.h>
#include <stddef.h>

static const struct {
	uint32_t opcode;
	const char *name;
} operations[LATENCY_OPERATIONS] = {
	{FUSE_WRITE, "write"},
	{FUSE_READ, "read"},
	{FUSE_GETATTR, "getattr"},
	{FUSE_FSYNC, "fsync"},
	{FUSE_SETATTR, "truncate"}, /* all of SETATTR that is answered natively */
	{FUSE_FALLOCATE, "fallocate"},
	{FUSE_LSEEK, "lseek"},
	{FUSE_COPY_FILE_RANGE, "copy_file_range"},
};

const char *latency_name(unsigned operation)
{
	return operation < LATENCY_OPERATIONS ? operations[operation].name : NULL;
}

static unsigned bucket_of(uint64_t ns)
{
	uint64_t us = (ns + 999) / 1000;
	unsigned bucket = us <= 1 ? 0 : 64 - (unsigned)__builtin_clzll(us - 1);

	return bucket < LATENCY_BUCKETS ? bucket : LATENCY_BUCKETS - 1;
}

void latency_add(struct latency *l, uint32_t opcode, uint64_t ns)
{
	for (unsigned i = 0; i < LATENCY_OPERATIONS; i++) {
		if (operations[i].opcode != opcode)
			continue;
		atomic_fetch_add_explicit(&l->of[i].sum_ns, ns, memory_order_relaxed);
		atomic_fetch_add_explicit(&l->of[i].count[bucket_of(ns)], 1, memory_order_relaxed);
		return;
	}
}

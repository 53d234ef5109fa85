#include "persist.h"

#include <libpmem.h>

void persist_copy(void *to, const void *from, size_t len)
{
	pmem_memcpy(to, from, len, PMEM_F_MEM_NODRAIN | PMEM_F_MEM_NONTEMPORAL);
}

void persist_store(_Atomic uint64_t *to, uint64_t value)
{
	atomic_store_explicit(to, value, memory_order_release);
	pmem_flush(to, sizeof(value));
}

void persist_drain(void)
{
	pmem_drain();
}

int persist_caches_survive(void)
{
	return pmem_has_auto_flush() == 1;
}

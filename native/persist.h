/*
 * persist: stores into persistent memory, and their order.
 *
 * A store is durable after it was flushed and drained.  Stores that are not
 * drained may become durable in any order, 8 aligned bytes at a time.  This
 * is all that pmem and sizes know of the hardware: tests put a model in its
 * place in which only what was flushed and drained survives.
 */
#ifndef PAFKAFS_PERSIST_H
#define PAFKAFS_PERSIST_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

/* Copies with non-temporal stores; durable after the next drain. */
void persist_copy(void *to, const void *from, size_t len);
/* An atomic store of 8 aligned bytes, flushed; durable after the next drain. */
void persist_store(_Atomic uint64_t *to, uint64_t value);
/* All that was copied or stored by this thread is durable when it returns. */
void persist_drain(void);

/* Whether the CPU caches themselves survive a loss of power (eADR). */
int persist_caches_survive(void);

#endif

/*
 * device: one directory of a tier as the data path sees it: how much may
 * still be written there, and the threads that may block on it.
 */
#ifndef PAFKAFS_DEVICE_H
#define PAFKAFS_DEVICE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "latency.h"
#include "sizes.h"
#include "workers.h"

struct device {
	_Atomic int refs;
	int objects_fd;   /* O_PATH of objects/, where openat2 starts */
	bool slow;        /* every I/O goes through its workers */
	bool memory;      /* tmpfs: fsync and reads never block */
	bool power;       /* a WRITE is durable before it is answered */
	_Atomic int64_t used_bytes;
	_Atomic int64_t limit_bytes; /* data is admitted up to here */
	struct latency latency; /* of requests for files that are here */
	struct workers *workers;
	struct sizes *sizes; /* of files that grow in persistent memory; or NULL */
	bool map_sync;       /* DAX: a mapping needs no msync */
	_Atomic uint64_t segment_bytes; /* what Kafka rolls at; 0: not known yet */
};

struct device *device_new(int objects_fd, bool slow, bool memory, bool power);
struct device *device_ref(struct device *d);
void device_unref(struct device *d);
/* Ends the workers; returns how many hang in the device and are left behind. */
unsigned device_stop(struct device *d);

/* Takes bytes of room before they are written; false when there is none.
 * Invariant: what is reserved is given back or settled by the same request. */
bool device_reserve(struct device *d, int64_t bytes);
void device_release(struct device *d, int64_t bytes);

#endif

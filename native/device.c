#include "device.h"

#include <stdlib.h>
#include <unistd.h>

/* A slow device seeks: more threads than this only lengthen its queue.  A
 * fast one needs threads for fsync, synchronous writes and cold reads. */
enum { WORKERS_SLOW = 16, WORKERS_FAST = 8 };

enum { STOP_PATIENCE_MS = 5000 };

struct device *device_new(int objects_fd, bool slow, bool memory, bool power)
{
	struct device *d = calloc(1, sizeof(*d));

	if (d == NULL)
		return NULL;
	d->workers = workers_new(slow ? WORKERS_SLOW : WORKERS_FAST,
				 slow ? "pafkafs-slow" : "pafkafs-fast");
	if (d->workers == NULL) {
		free(d);
		return NULL;
	}
	atomic_init(&d->refs, 1);
	d->objects_fd = objects_fd;
	d->slow = slow;
	d->memory = memory;
	d->power = power;
	return d;
}

struct device *device_ref(struct device *d)
{
	atomic_fetch_add(&d->refs, 1);
	return d;
}

/* Ended by the owner and not by the last reference: that one may be dropped
 * in a worker, which cannot join itself. */
unsigned device_stop(struct device *d)
{
	unsigned hung = 0;

	if (d->workers != NULL)
		hung = workers_stop(d->workers, STOP_PATIENCE_MS);
	d->workers = NULL;
	return hung;
}

void device_unref(struct device *d)
{
	if (atomic_fetch_sub(&d->refs, 1) != 1)
		return;
	close(d->objects_fd);
	if (d->sizes != NULL)
		sizes_close(d->sizes);
	free(d);
}

bool device_reserve(struct device *d, int64_t bytes)
{
	if (bytes == 0)
		return true; /* also on a device that is over its limit */
	int64_t before = atomic_fetch_add(&d->used_bytes, bytes);

	if (before + bytes <= atomic_load(&d->limit_bytes))
		return true;
	atomic_fetch_sub(&d->used_bytes, bytes);
	return false;
}

void device_release(struct device *d, int64_t bytes)
{
	atomic_fetch_sub(&d->used_bytes, bytes);
}

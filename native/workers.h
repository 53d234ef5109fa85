/*
 * workers: a bounded set of threads with one queue, the only place of the
 * daemon where a thread may block on a device.
 *
 * Each device owns one set, so that a device that hangs can only ever hold
 * up jobs that are for itself.
 */
#ifndef PAFKAFS_WORKERS_H
#define PAFKAFS_WORKERS_H

#include <stdint.h>

struct workers;

/* Embed it as the first member of whatever is to be run. */
struct job {
	struct job *next;
	void (*run)(struct job *job, char *scratch);
};

/* Bytes of the buffer each thread hands to run(): one largest READ. */
#define SCRATCH_BYTES (1u << 20)

/* NULL with errno set when threads or buffers cannot be had. */
struct workers *workers_new(unsigned threads, const char *name);
void workers_submit(struct workers *w, struct job *job);

/* Runs what is queued, then ends the threads.  A thread that hangs in a
 * system call for longer than patience_ms is left behind and w with it;
 * returns the number of such threads. */
unsigned workers_stop(struct workers *w, unsigned patience_ms);

/* Age in ns of the job that has been running longest; 0 when idle. */
uint64_t workers_stuck_ns(struct workers *w);
/* Jobs queued and not yet begun. */
unsigned workers_queued(struct workers *w);

uint64_t monotonic_ns(void);

#endif

#define _GNU_SOURCE
#include "workers.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

struct worker {
	struct workers *set;
	pthread_t thread;
	char *scratch;
	_Atomic uint64_t busy_since_ns; /* 0: idle */
};

struct workers {
	pthread_mutex_t lock;
	pthread_cond_t wake;
	pthread_cond_t ended;
	struct job *head, **tail;
	unsigned queued;
	unsigned alive;
	bool stopping;
	_Atomic uint64_t last_end_ns; /* when a job was last done */
	unsigned count;
	struct worker worker[];
};

uint64_t monotonic_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static struct job *take(struct workers *w)
{
	while (w->head == NULL && !w->stopping)
		pthread_cond_wait(&w->wake, &w->lock);
	struct job *job = w->head;
	if (job != NULL) {
		w->head = job->next;
		if (w->head == NULL)
			w->tail = &w->head;
		w->queued--;
	}
	return job;
}

static void *work(void *arg)
{
	struct worker *self = arg;
	struct workers *w = self->set;
	struct job *job;

	pthread_mutex_lock(&w->lock);
	while ((job = take(w)) != NULL) {
		atomic_store(&self->busy_since_ns, monotonic_ns());
		pthread_mutex_unlock(&w->lock);
		job->run(job, self->scratch);
		atomic_store(&self->busy_since_ns, 0);
		atomic_store(&w->last_end_ns, monotonic_ns());
		pthread_mutex_lock(&w->lock);
	}
	w->alive--;
	pthread_cond_signal(&w->ended);
	pthread_mutex_unlock(&w->lock);
	return NULL;
}

static int start(struct workers *w, struct worker *self, const char *name)
{
	self->set = w;
	self->scratch = mmap(NULL, SCRATCH_BYTES, PROT_READ | PROT_WRITE,
			     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (self->scratch == MAP_FAILED)
		return errno;
	int err = pthread_create(&self->thread, NULL, work, self);
	if (err != 0) {
		munmap(self->scratch, SCRATCH_BYTES);
		return err;
	}
	pthread_setname_np(self->thread, name);
	pthread_mutex_lock(&w->lock);
	w->alive++;
	pthread_mutex_unlock(&w->lock);
	w->count++;
	return 0;
}

struct workers *workers_new(unsigned threads, const char *name)
{
	struct workers *w = calloc(1, sizeof(*w) + threads * sizeof(w->worker[0]));
	pthread_condattr_t monotonic;

	if (w == NULL)
		return NULL;
	pthread_mutex_init(&w->lock, NULL);
	pthread_cond_init(&w->wake, NULL);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&w->ended, &monotonic);
	pthread_condattr_destroy(&monotonic);
	w->tail = &w->head;
	while (w->count < threads) {
		int err = start(w, &w->worker[w->count], name);
		if (err != 0) {
			workers_stop(w, 1000);
			errno = err;
			return NULL;
		}
	}
	return w;
}

void workers_submit(struct workers *w, struct job *job)
{
	job->next = NULL;
	pthread_mutex_lock(&w->lock);
	*w->tail = job;
	w->tail = &job->next;
	w->queued++;
	pthread_cond_signal(&w->wake);
	pthread_mutex_unlock(&w->lock);
}

static unsigned wait_ended(struct workers *w, unsigned patience_ms)
{
	struct timespec until;
	unsigned left;

	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += patience_ms / 1000;
	until.tv_nsec += (long)(patience_ms % 1000) * 1000000;
	if (until.tv_nsec >= 1000000000) {
		until.tv_sec++;
		until.tv_nsec -= 1000000000;
	}
	pthread_mutex_lock(&w->lock);
	w->stopping = true;
	pthread_cond_broadcast(&w->wake);
	while (w->alive > 0)
		if (pthread_cond_timedwait(&w->ended, &w->lock, &until) == ETIMEDOUT)
			break;
	left = w->alive;
	pthread_mutex_unlock(&w->lock);
	return left;
}

unsigned workers_stop(struct workers *w, unsigned patience_ms)
{
	unsigned left = wait_ended(w, patience_ms);

	if (left > 0)
		return left; /* its threads still use it: leaked on purpose */
	for (unsigned i = 0; i < w->count; i++) {
		pthread_join(w->worker[i].thread, NULL);
		munmap(w->worker[i].scratch, SCRATCH_BYTES);
	}
	pthread_mutex_destroy(&w->lock);
	pthread_cond_destroy(&w->wake);
	pthread_cond_destroy(&w->ended);
	free(w);
	return 0;
}

uint64_t workers_stuck_ns(struct workers *w)
{
	uint64_t now = monotonic_ns(), oldest = now, last_end = atomic_load(&w->last_end_ns);

	for (unsigned i = 0; i < w->count; i++) {
		uint64_t since = atomic_load(&w->worker[i].busy_since_ns);
		if (since != 0 && since < oldest)
			oldest = since;
	}
	if (last_end > oldest)
		oldest = last_end;
	return oldest < now ? now - oldest : 0;
}

unsigned workers_queued(struct workers *w)
{
	pthread_mutex_lock(&w->lock);
	unsigned queued = w->queued;
	pthread_mutex_unlock(&w->lock);
	return queued;
}

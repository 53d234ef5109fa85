#define _GNU_SOURCE
#include "request.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include "file.h"

static void link_inflight(struct front *f, struct request *r)
{
	pthread_mutex_lock(&f->inflight_lock);
	r->in_next = f->inflight;
	r->in_prev = &f->inflight;
	if (f->inflight != NULL)
		f->inflight->in_prev = &r->in_next;
	f->inflight = r;
	for (unsigned i = 0; i < 64; i++) {
		if (f->early_interrupt[i] == r->in->unique) {
			f->early_interrupt[i] = 0;
			r->interrupted = true;
		}
	}
	bool sweep = r->interrupted;
	pthread_mutex_unlock(&f->inflight_lock);
	if (sweep)
		(void)eventfd_write(f->wake_fd, 1);
}

struct request *request_new(struct front *f, struct file *file, const struct fuse_in_header *in)
{
	struct request *r = malloc(sizeof(*r) + in->len);

	if (r == NULL)
		return NULL;
	memset(r, 0, sizeof(*r));
	memcpy(r->body, in, in->len);
	r->front = f;
	r->file = file_ref(file);
	r->in = (struct fuse_in_header *)r->body;
	r->arg = r->body + sizeof(*in);
	r->payload = (char *)r->arg + sizeof(struct fuse_write_in);
	link_inflight(f, r);
	return r;
}

void request_free(struct request *r)
{
	pthread_mutex_lock(&r->front->inflight_lock);
	*r->in_prev = r->in_next;
	if (r->in_next != NULL)
		r->in_next->in_prev = r->in_prev;
	pthread_mutex_unlock(&r->front->inflight_lock);
	file_unref(r->file);
	free(r);
}

bool request_claim(struct request *r)
{
	return !atomic_exchange(&r->answered, true);
}

void request_reply(struct request *r, int error, const void *data, size_t len)
{
	if (request_claim(r))
		front_reply(r->front, r->in->unique, error, data, len);
}

bool request_begin(struct request *r)
{
	/* Both under the lock that request_give_up holds: a request is either
	 * begun or given up, never both. */
	pthread_mutex_lock(&r->front->inflight_lock);
	bool go = !atomic_load(&r->answered);
	atomic_store(&r->started, go);
	pthread_mutex_unlock(&r->front->inflight_lock);
	return go;
}

/* tid 0: a caller outside our pid namespace, of which nothing is known. */
static bool being_killed(uint32_t tid)
{
	char path[64], line[256];
	unsigned long long pending;
	bool killed = false;

	snprintf(path, sizeof(path), "/proc/%" PRIu32 "/status", tid);
	if (tid == 0)
		return false;
	FILE *status = fopen(path, "re");
	if (status == NULL)
		return errno == ENOENT;
	while (fgets(line, sizeof(line), status) != NULL)
		if (sscanf(line, "SigPnd: %llx", &pending) == 1 ||
		    sscanf(line, "ShdPnd: %llx", &pending) == 1)
			killed |= (pending >> (SIGKILL - 1)) & 1;
	fclose(status);
	return killed;
}

/* A change that has begun is never given up: it could still reach the device
 * after the caller's death, over what the next process wrote there. */
static bool may_give_up(const struct request *r)
{
	return r->in->opcode == FUSE_READ || r->in->opcode == FUSE_FSYNC ||
	       !atomic_load(&r->started);
}

static void give_up_if_killed(struct request *r)
{
	if (may_give_up(r) && being_killed(r->in->pid))
		request_reply(r, EINTR, NULL, 0);
}

void request_interrupt(struct front *f, uint64_t unique)
{
	struct request *r;

	pthread_mutex_lock(&f->inflight_lock);
	for (r = f->inflight; r != NULL && r->in->unique != unique; r = r->in_next)
		;
	if (r != NULL) {
		r->interrupted = true;
		give_up_if_killed(r);
	} else {
		f->early_interrupt[f->early_next++ % 64] = unique;
	}
	pthread_mutex_unlock(&f->inflight_lock);
}

bool request_sweep_interrupted(struct front *f)
{
	bool left = false;

	pthread_mutex_lock(&f->inflight_lock);
	for (struct request *r = f->inflight; r != NULL; r = r->in_next) {
		if (!r->interrupted || atomic_load(&r->answered))
			continue;
		give_up_if_killed(r);
		left |= !atomic_load(&r->answered);
	}
	pthread_mutex_unlock(&f->inflight_lock);
	return left;
}

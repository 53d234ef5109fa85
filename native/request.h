/*
 * request: a FUSE request that outlives the buffer it was read into, because
 * it waits for a worker, for a gate, or for room.
 */
#ifndef PAFKAFS_REQUEST_H
#define PAFKAFS_REQUEST_H

#include <linux/fuse.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "front.h"
#include "workers.h"

struct request {
	struct job job; /* first: a worker gets it as its job */
	struct request *in_next, **in_prev; /* front->inflight */
	struct request *park_next;          /* file->parked */
	struct front *front;
	struct file *file; /* a reference */
	struct device *dev; /* whose worker it was given to */
	_Atomic bool started;  /* its effect on a device may have begun */
	_Atomic bool answered;
	uint64_t began_ns; /* when it was read */
	bool for_room; /* parked because there was no room, not for the gate */
	bool interrupted;
	struct fuse_in_header *in;
	void *arg;     /* the operation's own struct */
	char *payload; /* of a WRITE */
	char body[];
};

/* Copies the request out of its buffer; takes a reference on file. */
struct request *request_new(struct front *f, struct file *file, const struct fuse_in_header *in);
/* Answers once: a second answer, after an interrupt, is dropped. */
void request_reply(struct request *r, int error, const void *data, size_t len);
/* True when the answer is still to be given, which is then the caller's to do. */
bool request_claim(struct request *r);
void request_free(struct request *r);
/* False when an interrupt has answered it already and it must not be begun. */
bool request_begin(struct request *r);

/* FUSE_INTERRUPT of a request, known or not. */
void request_interrupt(struct front *f, uint64_t unique);
/* Gives up interrupted requests whose caller is being killed; true while any
 * interrupted request is left to look at again. */
bool request_sweep_interrupted(struct front *f);

#endif

/*
 * front: owns the connection to the kernel.
 *
 * A few threads read /dev/fuse.  Requests for the contents of open files are
 * answered here, on their struct file; all others go over a SOCK_SEQPACKET
 * socketpair to the session that holds its other end (pyfuse3), and a pump
 * thread carries that session's replies and notifications back.  The device
 * thus has no reader that polls before it reads, and a caller killed at any
 * moment cannot stall the session.
 */
#ifndef PAFKAFS_FRONT_H
#define PAFKAFS_FRONT_H

#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "events.h"
#include "workers.h"

/* Largest payload of a READ or WRITE: 256 pages, the kernel's default bound. */
#define IO_BYTES_MAX (1u << 20)

enum { FRONT_THREADS_MAX = 16 };

struct file;
struct request;

struct packet {
	struct packet *next;
	size_t len;
	char data[];
};

struct front {
	int fuse_fd;
	int session_fd;  /* our end of the socketpair */
	int wake_fd;     /* eventfd: the pump has something to send, or must end */
	struct events *events;
	unsigned threads;
	pthread_t reader[FRONT_THREADS_MAX];
	pthread_t pump;
	_Atomic bool stopping;
	_Atomic unsigned readers_alive;
	pthread_mutex_t stop_lock;
	bool joined;
	_Atomic uint64_t init_unique;
	_Atomic bool mapped_direct_io; /* files open for direct I/O can be mapped, too */

	pthread_mutex_t send_lock; /* packets that the socketpair had no room for */
	struct packet *unsent, **unsent_tail;

	pthread_mutex_t files_lock;
	struct file **buckets;
	unsigned bucket_count;
	unsigned file_count;

	pthread_mutex_t inflight_lock;
	struct request *inflight;
	uint64_t early_interrupt[64]; /* INTERRUPTs that overtook their request */
	unsigned early_next;

	_Atomic uint64_t answered; /* requests answered here */
	_Atomic uint64_t forwarded;
};

/* Takes fuse_fd over; *session_end is the descriptor for the session.
 * NULL with errno set on failure (fuse_fd then stays the caller's). */
struct front *front_new(int fuse_fd, unsigned threads, int *session_end);
int front_start(struct front *f);
/* Ends the reader threads; requests already read are answered.  Any thread may
 * call it, any number of times: each returns when they have ended. */
void front_stop(struct front *f);
void front_free(struct front *f);

/* Error is 0 or a positive errno. */
void front_reply(struct front *f, uint64_t unique, int error, const void *data, size_t len);

#endif

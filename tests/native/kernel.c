#define _GNU_SOURCE
#include "kernel.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "check.h"

enum { PACKET_BYTES = (1 << 20) + 8192, SOCKET_BYTES = 4 << 20, DEADLINE_MS = 5000 };

/* Where the reply is, or would be put. */
static struct reply **find(struct kernel *k, uint64_t unique)
{
	struct reply **at = &k->replies[unique / 2 % REPLY_BUCKETS];

	while (*at != NULL && (*at)->out.unique != unique)
		at = &(*at)->next;
	return at;
}

static void keep(struct kernel *k, const char *packet, size_t len)
{
	struct reply *r = calloc(1, sizeof(*r) + len);

	CHECK(r != NULL && len >= sizeof(r->out));
	memcpy(&r->out, packet, sizeof(r->out));
	CHECK_EQ(r->out.len, len);
	r->len = len - sizeof(r->out);
	memcpy(r->data, packet + sizeof(r->out), r->len);
	pthread_mutex_lock(&k->lock);
	struct reply **at = find(k, r->out.unique);
	CHECK(r->out.unique == 0 || *at == NULL);
	CHECK(r->out.unique <= atomic_load(&k->unique));
	r->next = *at;
	*at = r;
	pthread_cond_broadcast(&k->came);
	pthread_mutex_unlock(&k->lock);
}

static void *receive(void *arg)
{
	struct kernel *k = arg;
	char *packet = malloc(PACKET_BYTES);
	ssize_t n;

	while ((n = recv(k->fuse, packet, PACKET_BYTES, 0)) > 0)
		keep(k, packet, (size_t)n);
	free(packet);
	return NULL;
}

void kernel_open(struct kernel *k, unsigned threads)
{
	int ends[2], bytes = SOCKET_BYTES;

	*k = (struct kernel){0};
	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
	for (int i = 0; i < 2; i++)
		if (setsockopt(ends[i], SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes)) != 0)
			CHECK(setsockopt(ends[i], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes)) ==
			      0);
	k->fuse = ends[0];
	k->front = front_new(ends[1], threads, &k->session);
	CHECK(k->front != NULL);
	pthread_mutex_init(&k->lock, NULL);
	pthread_cond_init(&k->came, NULL);
	CHECK(pthread_create(&k->receiver, NULL, receive, k) == 0);
}

void kernel_start(struct kernel *k, unsigned threads)
{
	kernel_open(k, threads);
	CHECK_EQ(front_start(k->front), 0);
}

void kernel_hang_up(struct kernel *k)
{
	shutdown(k->fuse, SHUT_RDWR);
}

void kernel_stop(struct kernel *k, struct device **devices, unsigned count)
{
	front_stop(k->front);
	kernel_close(k, devices, count);
}

void kernel_close(struct kernel *k, struct device **devices, unsigned count)
{
	struct reply *next;

	for (unsigned i = 0; i < count; i++)
		CHECK_EQ(device_stop(devices[i]), 0);
	kernel_hang_up(k);
	pthread_join(k->receiver, NULL);
	CHECK(k->front->inflight == NULL);
	CHECK_EQ(k->front->file_count, 0);
	front_free(k->front);
	for (unsigned i = 0; i < count; i++)
		device_unref(devices[i]);
	for (unsigned i = 0; i < REPLY_BUCKETS; i++)
		for (struct reply *r = k->replies[i]; r != NULL; r = next) {
			next = r->next;
			free(r);
		}
	close(k->fuse);
	close(k->session);
}

void kernel_send_raw(struct kernel *k, const void *packet, size_t len)
{
	CHECK_EQ(send(k->fuse, packet, len, MSG_NOSIGNAL), len);
}

uint64_t kernel_send_as(struct kernel *k, uint32_t pid, uint32_t opcode, uint64_t ino,
			const void *arg, size_t arg_len, const void *payload, size_t len)
{
	struct fuse_in_header in = {
		.len = (uint32_t)(sizeof(in) + arg_len + len),
		.opcode = opcode,
		.unique = atomic_fetch_add(&k->unique, 2) + 2,
		.nodeid = ino,
		.pid = pid,
	};
	struct iovec iov[3] = {
		{&in, sizeof(in)}, {(void *)arg, arg_len}, {(void *)payload, len}};
	struct msghdr message = {.msg_iov = iov, .msg_iovlen = 3};

	CHECK_EQ(sendmsg(k->fuse, &message, MSG_NOSIGNAL), in.len);
	return in.unique;
}

uint64_t kernel_send(struct kernel *k, uint32_t opcode, uint64_t ino, const void *arg,
		     size_t arg_len)
{
	return kernel_send_as(k, (uint32_t)getpid(), opcode, ino, arg, arg_len, NULL, 0);
}

uint64_t kernel_send_read(struct kernel *k, uint64_t ino, size_t len, int64_t offset)
{
	struct fuse_read_in arg = {.size = (uint32_t)len, .offset = (uint64_t)offset};

	return kernel_send(k, FUSE_READ, ino, &arg, sizeof(arg));
}

uint64_t kernel_send_write(struct kernel *k, uint64_t ino, const void *data, size_t len,
			   int64_t offset)
{
	struct fuse_write_in arg = {.size = (uint32_t)len, .offset = (uint64_t)offset};

	return kernel_send_as(k, (uint32_t)getpid(), FUSE_WRITE, ino, &arg, sizeof(arg), data,
			      len);
}

uint64_t kernel_send_fsync(struct kernel *k, uint64_t ino, uint64_t fh)
{
	struct fuse_fsync_in arg = {.fh = fh};

	return kernel_send(k, FUSE_FSYNC, ino, &arg, sizeof(arg));
}

void kernel_interrupt(struct kernel *k, uint64_t unique)
{
	struct {
		struct fuse_in_header in;
		struct fuse_interrupt_in arg;
	} packet = {
		.in = {.len = sizeof(packet), .opcode = FUSE_INTERRUPT, .unique = unique | 1},
		.arg = {.unique = unique},
	};

	kernel_send_raw(k, &packet, sizeof(packet));
}

bool kernel_answered(struct kernel *k, uint64_t unique)
{
	pthread_mutex_lock(&k->lock);
	bool answered = *find(k, unique) != NULL;
	pthread_mutex_unlock(&k->lock);
	return answered;
}

struct reply *kernel_reply(struct kernel *k, uint64_t unique)
{
	struct timespec until;
	struct reply **at, *r, *kept = calloc(1, sizeof(*kept));

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += DEADLINE_MS / 1000;
	pthread_mutex_lock(&k->lock);
	while (*(at = find(k, unique)) == NULL)
		if (pthread_cond_timedwait(&k->came, &k->lock, &until) == ETIMEDOUT)
			check_failed(__FILE__, __LINE__, "request %llu was not answered",
				     (unsigned long long)unique);
	r = *at;
	CHECK(kept != NULL && !r->taken);
	*kept = (struct reply){.next = r->next, .out = r->out, .taken = true};
	*at = kept;
	pthread_mutex_unlock(&k->lock);
	return r;
}

int64_t kernel_data(struct kernel *k, uint64_t unique, void *data, size_t len)
{
	struct reply *r = kernel_reply(k, unique);
	int64_t result = r->out.error != 0 ? r->out.error : (int64_t)r->len;

	CHECK(r->len <= len);
	memcpy(data, r->data, r->len);
	free(r);
	return result;
}

int kernel_error(struct kernel *k, uint64_t unique)
{
	struct reply *r = kernel_reply(k, unique);
	int error = r->out.error;

	free(r);
	return error;
}

void kernel_barrier(struct kernel *k)
{
	struct fuse_in_header echo;

	/* It reaches the session after all that was read before it. */
	uint64_t unique = kernel_send(k, FUSE_STATFS, FUSE_ROOT_ID, NULL, 0);
	CHECK_EQ(session_recv(k, &echo, sizeof(echo)), sizeof(echo));
	CHECK_EQ(echo.unique, unique);
}

int64_t kernel_read(struct kernel *k, uint64_t ino, void *data, size_t len, int64_t offset)
{
	return kernel_data(k, kernel_send_read(k, ino, len, offset), data, len);
}

int64_t kernel_write(struct kernel *k, uint64_t ino, const void *data, size_t len,
		     int64_t offset)
{
	struct fuse_write_out out;
	uint64_t unique = kernel_send_write(k, ino, data, len, offset);
	int64_t n = kernel_data(k, unique, &out, sizeof(out));

	return n < 0 ? n : out.size;
}

int kernel_fsync(struct kernel *k, uint64_t ino, uint64_t fh)
{
	return kernel_error(k, kernel_send_fsync(k, ino, fh));
}

int kernel_getattr(struct kernel *k, uint64_t ino, struct fuse_attr *attr)
{
	struct fuse_getattr_in arg = {0};
	struct fuse_attr_out out;
	uint64_t unique = kernel_send(k, FUSE_GETATTR, ino, &arg, sizeof(arg));
	int64_t n = kernel_data(k, unique, &out, sizeof(out));

	*attr = out.attr;
	return n < 0 ? (int)n : 0;
}

static bool take(struct kernel *k, enum event_kind kind, struct event *found)
{
	struct event *next;
	bool seen = false;

	for (struct event *ev = events_take(k->front->events); ev != NULL; ev = next) {
		next = ev->next;
		if (ev->kind == kind && !seen) {
			*found = *ev;
			seen = true;
		}
		free(ev);
	}
	return seen;
}

void kernel_wait_event(struct kernel *k, enum event_kind kind, uint64_t ino, int64_t value)
{
	struct event event;

	CHECK_SOON(take(k, kind, &event));
	CHECK_EQ(event.ino, ino);
	CHECK_EQ(event.value, value);
}

unsigned kernel_count_events(struct kernel *k, enum event_kind kind)
{
	struct event *next;
	unsigned count = 0;

	for (struct event *ev = events_take(k->front->events); ev != NULL; ev = next) {
		next = ev->next;
		count += ev->kind == kind;
		free(ev);
	}
	return count;
}

size_t session_recv(struct kernel *k, void *packet, size_t len)
{
	struct pollfd ready = {.fd = k->session, .events = POLLIN};

	CHECK_EQ(poll(&ready, 1, DEADLINE_MS), 1);
	ssize_t n = recv(k->session, packet, len, 0);
	CHECK(n > 0);
	return (size_t)n;
}

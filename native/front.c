#define _GNU_SOURCE
#include "front.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "file.h"
#include "io.h"
#include "request.h"

enum {
	PAGE = 4096,
	/* The payload of a WRITE starts at the second page, aligned for the
	 * copy into the page cache of the device. */
	HEADROOM = PAGE,
	WRITE_HEADER = sizeof(struct fuse_in_header) + sizeof(struct fuse_write_in),
	REQUEST_BYTES = (int)IO_BYTES_MAX + PAGE,
	/* Of a forwarded READDIRPLUS and of its reply: the socketpair of an
	 * unprivileged mount takes packets of some 200 KiB. */
	READDIR_BYTES_MAX = 128 << 10,
	FORGETS_PER_PACKET = 4096,
	SOCKET_BUFFER_BYTES = 4 << 20,
	SWEEP_MS = 200,
	/* The kernel's default of 12 requests in the background, for all files
	 * together, lets a few hung reads stop every other read-ahead. */
	MAX_BACKGROUND = 4096,
	CONGESTION_THRESHOLD = 3072,
	/* FUSE_DIRECT_IO_ALLOW_MMAP of Linux 6.6, newer than some headers. */
	FLAGS2_DIRECT_IO_ALLOW_MMAP = 1 << (36 - 32),
};

/* Only to end a blocking read() of /dev/fuse with EINTR. */
#define STOP_SIGNAL SIGUSR2

static void on_stop_signal(int signal)
{
	(void)signal;
}

void front_reply(struct front *f, uint64_t unique, int error, const void *data, size_t len)
{
	struct fuse_out_header out = {
		.len = (uint32_t)(sizeof(out) + (error == 0 ? len : 0)),
		.error = -error,
		.unique = unique,
	};
	struct iovec iov[2] = {{&out, sizeof(out)}, {(void *)data, len}};

	/* ENOENT: the request is gone; ENODEV: the connection is.  Nobody is
	 * left to be told. */
	(void)!writev(f->fuse_fd, iov, error == 0 && len > 0 ? 2 : 1);
	atomic_fetch_add_explicit(&f->answered, 1, memory_order_relaxed);
}

static void enqueue_unsent(struct front *f, const void *data, size_t len)
{
	struct packet *p = malloc(sizeof(*p) + len);

	if (p == NULL)
		abort(); /* a request lost is a caller that waits for ever */
	p->next = NULL;
	p->len = len;
	memcpy(p->data, data, len);
	*f->unsent_tail = p;
	f->unsent_tail = &p->next;
}

/* False: to be tried again.  What the session can never get is answered: a
 * request lost is a caller that waits for ever. */
static bool try_send(struct front *f, const void *data, size_t len)
{
	const struct fuse_in_header *in = data;

	if (send(f->session_fd, data, len, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0)
		return true;
	if (errno == EAGAIN || errno == ENOBUFS || errno == EINTR)
		return false;
	if (in->opcode != FUSE_FORGET && in->opcode != FUSE_BATCH_FORGET)
		front_reply(f, in->unique, EIO, NULL, 0);
	return true;
}

/* To the session, without ever waiting for it: the reader threads have data
 * requests to answer. */
static void send_to_session(struct front *f, const void *data, size_t len)
{
	bool full = true;

	pthread_mutex_lock(&f->send_lock);
	if (f->unsent == NULL)
		full = !try_send(f, data, len);
	if (full)
		enqueue_unsent(f, data, len);
	pthread_mutex_unlock(&f->send_lock);
	if (full)
		(void)eventfd_write(f->wake_fd, 1);
}

/* Sends what the socketpair had no room for; true when some is left. */
static bool flush_unsent(struct front *f)
{
	pthread_mutex_lock(&f->send_lock);
	while (f->unsent != NULL) {
		struct packet *p = f->unsent;
		if (!try_send(f, p->data, p->len))
			break;
		f->unsent = p->next;
		if (f->unsent == NULL)
			f->unsent_tail = &f->unsent;
		free(p);
	}
	bool left = f->unsent != NULL;
	pthread_mutex_unlock(&f->send_lock);
	return left;
}

/* One BATCH_FORGET may have 65,000 entries, more than a packet holds. */
static void forward_forgets(struct front *f, const struct fuse_in_header *in)
{
	const struct fuse_batch_forget_in *arg = (const void *)(in + 1);
	const struct fuse_forget_one *one = (const void *)(arg + 1);
	struct {
		struct fuse_in_header in;
		struct fuse_batch_forget_in arg;
		struct fuse_forget_one one[FORGETS_PER_PACKET];
	} part;

	for (uint32_t done = 0; done < arg->count; done += part.arg.count) {
		uint32_t left = arg->count - done;
		part.in = *in;
		part.arg = *arg;
		part.arg.count = left < FORGETS_PER_PACKET ? left : FORGETS_PER_PACKET;
		memcpy(part.one, one + done, part.arg.count * sizeof(*one));
		part.in.len = (uint32_t)(sizeof(part.in) + sizeof(part.arg) +
					 part.arg.count * sizeof(*one));
		send_to_session(f, &part, part.in.len);
	}
}

/* What this kernel can do that older ones cannot. */
static void note_offers(struct front *f, const struct fuse_in_header *in)
{
	const struct fuse_init_in *arg = (const void *)(in + 1);

	if (in->len >= sizeof(*in) + sizeof(*arg) && arg->flags & FUSE_INIT_EXT)
		atomic_store(&f->mapped_direct_io, arg->flags2 & FLAGS2_DIRECT_IO_ALLOW_MMAP);
}

static void forward(struct front *f, struct fuse_in_header *in)
{
	struct fuse_read_in *read_arg = (void *)(in + 1);

	atomic_fetch_add_explicit(&f->forwarded, 1, memory_order_relaxed);
	switch (in->opcode) {
	case FUSE_BATCH_FORGET:
		forward_forgets(f, in);
		return;
	case FUSE_INIT:
		note_offers(f, in);
		atomic_store(&f->init_unique, in->unique);
		break;
	case FUSE_READDIR:
	case FUSE_READDIRPLUS:
		if (read_arg->size > READDIR_BYTES_MAX)
			read_arg->size = READDIR_BYTES_MAX;
		break;
	default:
		break;
	}
	send_to_session(f, in, in->len);
}

static void dispatch(struct front *f, struct fuse_in_header *in, char *scratch)
{
	if (in->opcode == FUSE_INTERRUPT) {
		const struct fuse_interrupt_in *arg = (const void *)(in + 1);
		request_interrupt(f, arg->unique);
		(void)eventfd_write(f->wake_fd, 1); /* the pump sweeps */
	} else if (!io_dispatch(f, in, scratch)) {
		forward(f, in);
	}
}

static void *map_pages(size_t len)
{
	void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return p == MAP_FAILED ? NULL : p;
}

static void *read_requests(void *arg)
{
	struct front *f = arg;
	char *pages = map_pages(HEADROOM + REQUEST_BYTES);
	char *scratch = map_pages(IO_BYTES_MAX);

	if (pages == NULL || scratch == NULL)
		abort(); /* at start, before anything is served */
	char *buffer = pages + HEADROOM - WRITE_HEADER;
	while (!atomic_load(&f->stopping)) {
		ssize_t n = read(f->fuse_fd, buffer, REQUEST_BYTES);
		if (n >= (ssize_t)sizeof(struct fuse_in_header))
			dispatch(f, (struct fuse_in_header *)buffer, scratch);
		else if (n < 0 && errno != EINTR && errno != EAGAIN && errno != ENOENT)
			break; /* ENODEV: unmounted or aborted */
	}
	munmap(pages, HEADROOM + REQUEST_BYTES);
	munmap(scratch, IO_BYTES_MAX);
	if (atomic_fetch_sub(&f->readers_alive, 1) == 1) {
		events_put(f->events, EVENT_ENDED, 0, 0);
		(void)eventfd_write(f->wake_fd, 1);
	}
	return NULL;
}

/* What libfuse would negotiate, with the changes that Kafka needs. */
static void edit_init(struct front *f, struct fuse_init_out *init)
{
	/* The daemon is the only writer: a new mtime must not drop the page
	 * cache under the consumers. */
	init->flags &= ~(uint32_t)FUSE_AUTO_INVAL_DATA;
	/* Truncation at open and the loss of suid bits come as SETATTR, which
	 * there is one way to handle. */
	init->flags &= ~(uint32_t)(FUSE_ATOMIC_O_TRUNC | FUSE_HANDLE_KILLPRIV);
	init->flags |= FUSE_ASYNC_READ | FUSE_BIG_WRITES | FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES;
	if (atomic_load(&f->mapped_direct_io)) {
		init->flags |= FUSE_INIT_EXT;
		init->flags2 |= FLAGS2_DIRECT_IO_ALLOW_MMAP;
	}
	init->max_background = MAX_BACKGROUND;
	init->congestion_threshold = CONGESTION_THRESHOLD;
	init->max_write = IO_BYTES_MAX;
	init->max_pages = IO_BYTES_MAX / PAGE;
	init->time_gran = 1;
}

static void pass_reply(struct front *f, char *packet, size_t len)
{
	struct fuse_out_header *out = (struct fuse_out_header *)packet;
	bool is_init = out->unique != 0 && out->unique == atomic_load(&f->init_unique);
	struct fuse_init_out *init = (struct fuse_init_out *)(out + 1);

	if (is_init && out->error == 0 && len >= sizeof(*out) + sizeof(*init))
		edit_init(f, init);
	(void)!write(f->fuse_fd, packet, len);
	if (is_init) {
		atomic_store(&f->init_unique, 0);
		events_put(f->events, EVENT_READY, 0, out->error);
	}
}

static void *pump(void *arg)
{
	struct front *f = arg;
	char *packet = map_pages(REQUEST_BYTES);
	bool sweeping = false;
	eventfd_t ignored;

	if (packet == NULL)
		abort();
	for (;;) {
		bool unsent = flush_unsent(f);
		struct pollfd fds[2] = {
			{.fd = f->session_fd, .events = unsent ? POLLIN | POLLOUT : POLLIN},
			{.fd = f->wake_fd, .events = POLLIN},
		};
		poll(fds, 2, sweeping ? SWEEP_MS : -1);
		(void)eventfd_read(f->wake_fd, &ignored);
		sweeping = request_sweep_interrupted(f);
		ssize_t n;
		while ((n = recv(f->session_fd, packet, REQUEST_BYTES, MSG_DONTWAIT)) > 0)
			pass_reply(f, packet, (size_t)n);
		if (n == 0 || atomic_load(&f->readers_alive) == 0)
			break;
	}
	shutdown(f->session_fd, SHUT_RDWR); /* the session reads end of file */
	munmap(packet, REQUEST_BYTES);
	return NULL;
}

static int make_sockets(struct front *f, int *session_end)
{
	int ends[2], bytes = SOCKET_BUFFER_BYTES;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0)
		return -errno;
	for (int i = 0; i < 2; i++)
		/* Without privilege net.core.wmem_max bounds it: slower under
		 * a storm of metadata requests, not wrong. */
		if (setsockopt(ends[i], SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes)) != 0)
			setsockopt(ends[i], SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
	f->session_fd = ends[0];
	*session_end = ends[1];
	return 0;
}

struct front *front_new(int fuse_fd, unsigned threads, int *session_end)
{
	struct front *f = calloc(1, sizeof(*f));
	struct sigaction stop = {.sa_handler = on_stop_signal}; /* no SA_RESTART */

	if (f == NULL)
		return NULL;
	f->fuse_fd = fuse_fd;
	f->threads = threads < FRONT_THREADS_MAX ? threads : FRONT_THREADS_MAX;
	f->unsent_tail = &f->unsent;
	f->bucket_count = 1024;
	f->buckets = calloc(f->bucket_count, sizeof(*f->buckets));
	f->events = events_new();
	f->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	pthread_mutex_init(&f->send_lock, NULL);
	pthread_mutex_init(&f->files_lock, NULL);
	pthread_mutex_init(&f->inflight_lock, NULL);
	pthread_mutex_init(&f->stop_lock, NULL);
	sigaction(STOP_SIGNAL, &stop, NULL);
	int err = f->buckets == NULL || f->events == NULL || f->wake_fd < 0
			  ? -ENOMEM
			  : make_sockets(f, session_end);
	if (err == 0)
		return f;
	if (f->events != NULL)
		events_free(f->events);
	if (f->wake_fd >= 0)
		close(f->wake_fd);
	free(f->buckets);
	free(f);
	errno = -err;
	return NULL;
}

int front_start(struct front *f)
{
	/* Before the pump is there: it ends when no reader is left. */
	atomic_store(&f->readers_alive, f->threads);
	int err = pthread_create(&f->pump, NULL, pump, f);

	for (unsigned i = 0; err == 0 && i < f->threads; i++) {
		err = pthread_create(&f->reader[i], NULL, read_requests, f);
		if (err == 0)
			pthread_setname_np(f->reader[i], "pafkafs-front");
	}
	return -err;
}

void front_stop(struct front *f)
{
	struct timespec pause = {.tv_nsec = 2000000};

	pthread_mutex_lock(&f->stop_lock);
	atomic_store(&f->stopping, true);
	/* Again and again: the signal may come between the test of the flag
	 * and the read. */
	while (!f->joined && atomic_load(&f->readers_alive) > 0) {
		for (unsigned i = 0; i < f->threads; i++)
			pthread_kill(f->reader[i], STOP_SIGNAL);
		nanosleep(&pause, NULL);
	}
	if (!f->joined) {
		for (unsigned i = 0; i < f->threads; i++)
			pthread_join(f->reader[i], NULL);
		pthread_join(f->pump, NULL);
		f->joined = true;
	}
	pthread_mutex_unlock(&f->stop_lock);
}

void front_free(struct front *f)
{
	while (f->unsent != NULL) {
		struct packet *next = f->unsent->next;
		free(f->unsent);
		f->unsent = next;
	}
	close(f->session_fd);
	close(f->wake_fd);
	close(f->fuse_fd);
	events_free(f->events);
	free(f->buckets);
	pthread_mutex_destroy(&f->send_lock);
	pthread_mutex_destroy(&f->files_lock);
	pthread_mutex_destroy(&f->inflight_lock);
	pthread_mutex_destroy(&f->stop_lock);
	free(f);
}

/* What goes where: to open files, or to the session, and back. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "kernel.h"

enum { INO = 7, FORGETS = 60000, PACKET = 1 << 20 };

static void open_file_is_answered_and_all_else_forwarded(void)
{
	struct kernel k;
	struct fuse_in_header in[2];
	char data[5];

	kernel_start(&k, 2);
	struct device *d = device_of("fast", MEMORY);
	struct file *file = open_plain(&k, INO, d, "log");
	CHECK_EQ(kernel_write(&k, INO, "hello", 5, 0), 5);
	CHECK_EQ(kernel_read(&k, INO, data, 5, 0), 5);
	CHECK(memcmp(data, "hello", 5) == 0);
	CHECK_EQ(atomic_load(&k.front->forwarded), 0);

	/* The same operation on an inode that is not open. */
	struct fuse_read_in arg = {.size = 4096, .offset = 77, .fh = 3};
	uint64_t unique = kernel_send(&k, FUSE_READ, INO + 1, &arg, sizeof(arg));
	char packet[4096];
	size_t len = session_recv(&k, packet, sizeof(packet));
	CHECK_EQ(len, sizeof(in[0]) + sizeof(arg));
	memcpy(in, packet, sizeof(in[0]));
	CHECK(in->unique == unique && in->nodeid == INO + 1 && in->opcode == FUSE_READ);
	CHECK(memcmp(packet + sizeof(in[0]), &arg, sizeof(arg)) == 0);

	/* Another operation on one that is open. */
	unique = kernel_send(&k, FUSE_GETXATTR, INO, "user.name", 10);
	len = session_recv(&k, packet, sizeof(packet));
	CHECK_EQ(len, sizeof(in[0]) + 10);
	CHECK(memcmp(packet + sizeof(in[0]), "user.name", 10) == 0);

	/* And the session's answer reaches the caller. */
	struct fuse_out_header out = {.len = sizeof(out), .error = -ENODATA, .unique = unique};
	CHECK_EQ(send(k.session, &out, sizeof(out), 0), sizeof(out));
	CHECK_EQ(kernel_error(&k, unique), -ENODATA);
	file_close(file);
	kernel_stop(&k, &d, 1);
}

static void a_closed_file_is_forwarded(void)
{
	struct kernel k;
	struct fuse_in_header in;

	kernel_start(&k, 1);
	struct device *d = device_of("fast", MEMORY);
	file_close(open_plain(&k, INO, d, "log"));
	kernel_send_fsync(&k, INO, 1);
	char packet[4096];
	session_recv(&k, packet, sizeof(packet));
	memcpy(&in, packet, sizeof(in));
	CHECK_EQ(in.opcode, FUSE_FSYNC);
	kernel_stop(&k, &d, 1);
}

static void thousands_of_open_files_are_found(void)
{
	enum { FILES = 3000 };
	static struct file *files[FILES];
	struct fuse_attr attr;
	struct kernel k;

	kernel_start(&k, 2);
	struct device *d = device_of("fast", MEMORY);
	int fd = dup(k.session); /* any descriptor does */
	for (uint64_t i = 0; i < FILES; i++) {
		struct backing *b = backing_plain(d, dup(fd));
		files[i] = file_open(k.front, i + 2, b);
		CHECK(files[i] != NULL);
	}
	CHECK(file_open(k.front, 2, backing_plain(d, dup(fd))) == NULL && errno == EEXIST);
	for (uint64_t i = 0; i < FILES; i += 2)
		file_close(files[i]);
	for (uint64_t i = 1; i < FILES; i += 2)
		CHECK_EQ(kernel_getattr(&k, i + 2, &attr), 0);
	for (uint64_t i = 1; i < FILES; i += 2)
		file_close(files[i]);
	close(fd);
	kernel_stop(&k, &d, 1);
}

static void batch_forget_is_split_and_complete(void)
{
	static struct {
		struct fuse_in_header in;
		struct fuse_batch_forget_in arg;
		struct fuse_forget_one one[FORGETS];
	} all, part;
	struct kernel k;

	kernel_start(&k, 2);
	all.in = (struct fuse_in_header){.len = sizeof(all), .opcode = FUSE_BATCH_FORGET,
					 .unique = 2};
	all.arg.count = FORGETS;
	for (uint32_t i = 0; i < FORGETS; i++)
		all.one[i] = (struct fuse_forget_one){.nodeid = i + 2, .nlookup = i % 7 + 1};
	kernel_send_raw(&k, &all, sizeof(all));
	for (uint32_t seen = 0; seen < FORGETS; seen += part.arg.count) {
		size_t len = session_recv(&k, &part, sizeof(part));
		CHECK(part.in.opcode == FUSE_BATCH_FORGET && part.in.len == len);
		CHECK(part.arg.count > 0 && seen + part.arg.count <= FORGETS);
		CHECK_EQ(len, sizeof(part.in) + sizeof(part.arg) +
				      part.arg.count * sizeof(part.one[0]));
		CHECK(len <= 200000); /* the socketpair of an unprivileged mount */
		CHECK(memcmp(part.one, all.one + seen, part.arg.count * sizeof(part.one[0])) ==
		      0);
	}
	kernel_barrier(&k); /* and nothing more */
	kernel_stop(&k, NULL, 0);
}

static void readdirplus_is_clamped_to_what_a_packet_holds(void)
{
	struct fuse_read_in arg = {.size = 1 << 20, .offset = 3};
	struct {
		struct fuse_in_header in;
		struct fuse_read_in arg;
	} seen;
	struct kernel k;

	kernel_start(&k, 1);
	kernel_send(&k, FUSE_READDIRPLUS, FUSE_ROOT_ID, &arg, sizeof(arg));
	CHECK_EQ(session_recv(&k, &seen, sizeof(seen)), sizeof(seen));
	CHECK(seen.arg.size == 128 << 10 && seen.arg.offset == 3);
	arg.size = 4096;
	kernel_send(&k, FUSE_READDIRPLUS, FUSE_ROOT_ID, &arg, sizeof(arg));
	session_recv(&k, &seen, sizeof(seen));
	CHECK_EQ(seen.arg.size, 4096);
	kernel_stop(&k, NULL, 0);
}

static void init_reply_is_edited(void)
{
	struct fuse_init_in arg = {.major = 7, .minor = 38};
	struct {
		struct fuse_out_header out;
		struct fuse_init_out init;
	} reply = {.out = {.len = sizeof(reply)},
		   .init = {.major = 7, .minor = 38, .max_background = 12, .max_write = 4096,
			    .flags = FUSE_AUTO_INVAL_DATA | FUSE_ATOMIC_O_TRUNC |
				     FUSE_HANDLE_KILLPRIV | FUSE_DO_READDIRPLUS}};
	struct fuse_init_out init;
	struct kernel k;
	char packet[256];

	kernel_start(&k, 2);
	uint64_t unique = kernel_send(&k, FUSE_INIT, 0, &arg, sizeof(arg));
	session_recv(&k, packet, sizeof(packet));
	reply.out.unique = unique;
	CHECK_EQ(send(k.session, &reply, sizeof(reply), 0), sizeof(reply));
	CHECK_EQ(kernel_data(&k, unique, &init, sizeof(init)), sizeof(init));
	CHECK(!(init.flags & (FUSE_AUTO_INVAL_DATA | FUSE_ATOMIC_O_TRUNC | FUSE_HANDLE_KILLPRIV)));
	CHECK(init.flags & FUSE_DO_READDIRPLUS);
	CHECK((init.flags & FUSE_PARALLEL_DIROPS) && (init.flags & FUSE_MAX_PAGES));
	CHECK_EQ(init.max_write, 1 << 20);
	CHECK_EQ(init.max_pages, 256);
	CHECK(init.max_background >= 1024 && init.congestion_threshold <= init.max_background);
	kernel_wait_event(&k, EVENT_READY, 0, 0);
	kernel_stop(&k, NULL, 0);
}

static void a_session_that_does_not_read_blocks_no_data(void)
{
	enum { PACKETS = 40 };
	struct {
		struct fuse_in_header in;
		char body[PACKET];
	} *seen = malloc(sizeof(*seen));
	uint64_t unique[PACKETS];
	struct kernel k;
	char *body = malloc(PACKET), data[4];

	kernel_start(&k, 1);
	struct device *d = device_of("fast", MEMORY);
	struct file *file = open_plain(&k, INO, d, "log");
	for (int i = 0; i < PACKETS; i++) {
		memset(body, i, PACKET);
		unique[i] = kernel_send(&k, FUSE_SETXATTR, 99, body, PACKET);
		CHECK_EQ(kernel_write(&k, INO, "data", 4, 4 * i), 4);
	}
	CHECK_EQ(kernel_read(&k, INO, data, 4, 4 * (PACKETS - 1)), 4);
	for (int i = 0; i < PACKETS; i++) {
		CHECK_EQ(session_recv(&k, seen, sizeof(*seen)), sizeof(*seen));
		CHECK_EQ(seen->in.unique, unique[i]);
		memset(body, i, PACKET);
		CHECK(memcmp(seen->body, body, PACKET) == 0);
	}
	free(seen);
	free(body);
	file_close(file);
	kernel_stop(&k, &d, 1);
}

static void a_request_that_no_packet_can_hold_is_answered(void)
{
	struct kernel k;
	char *body = calloc(1, PACKET);
	int small = 4096;

	kernel_start(&k, 1);
	CHECK(setsockopt(k.front->session_fd, SOL_SOCKET, SO_SNDBUF, &small, sizeof(small)) == 0);
	uint64_t unique = kernel_send(&k, FUSE_SETXATTR, 99, body, PACKET);
	kernel_barrier(&k);
	CHECK(kernel_error(&k, unique) < 0);
	free(body);
	kernel_stop(&k, NULL, 0);
}

static void the_end_of_the_connection_is_told(void)
{
	struct kernel k;
	char end;

	kernel_start(&k, 4);
	kernel_hang_up(&k);
	kernel_wait_event(&k, EVENT_ENDED, 0, 0);
	CHECK_EQ(recv(k.session, &end, 1, 0), 0); /* the session reads end of file */
	kernel_stop(&k, NULL, 0);
}

static void a_session_may_speak_before_the_start(void)
{
	struct fuse_out_header out = {.len = sizeof(out), .error = FUSE_NOTIFY_INVAL_INODE};
	struct fuse_in_header in;

	for (int i = 0; i < 100; i++) {
		struct kernel k;
		kernel_open(&k, 2);
		out.unique = 0;
		CHECK_EQ(send(k.session, &out, sizeof(out), 0), sizeof(out));
		CHECK_EQ(front_start(k.front), 0);
		out.unique = kernel_send(&k, FUSE_STATFS, FUSE_ROOT_ID, NULL, 0);
		session_recv(&k, &in, sizeof(in));
		CHECK_EQ(send(k.session, &out, sizeof(out), MSG_NOSIGNAL), sizeof(out));
		kernel_error(&k, out.unique);
		kernel_stop(&k, NULL, 0);
	}
}

CHECK_MAIN(TEST(open_file_is_answered_and_all_else_forwarded), TEST(a_closed_file_is_forwarded),
	   TEST(thousands_of_open_files_are_found), TEST(batch_forget_is_split_and_complete),
	   TEST(readdirplus_is_clamped_to_what_a_packet_holds), TEST(init_reply_is_edited),
	   TEST(a_session_that_does_not_read_blocks_no_data),
	   TEST(a_request_that_no_packet_can_hold_is_answered),
	   TEST(the_end_of_the_connection_is_told), TEST(a_session_may_speak_before_the_start))

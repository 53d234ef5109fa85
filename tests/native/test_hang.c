/* A device that hangs holds up nothing but itself; ends while busy. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "hooks.h"
#include "kernel.h"

enum { FAST = 7, SLOW_INO = 8, OUTSTANDING = 1000, SLOW_WORKERS = 16 };

struct fixture {
	struct kernel k;
	struct device *d[2];
	struct file *fast, *slow;
	uint64_t unique[OUTSTANDING];
};

static void set_up(struct fixture *x)
{
	kernel_start(&x->k, 2);
	x->d[0] = device_of("fast", MEMORY);
	x->d[1] = device_of("hdd", SLOW);
	put_file(check_path("log"), "quick", 5, 0600);
	put_file(check_path("hdd/objects/1"), "hello", 5, 0600);
	put_file(check_path("shadow"), "hello", 5, 0600);
	x->fast = open_plain(&x->k, FAST, x->d[0], "log");
	x->slow = open_object(&x->k, SLOW_INO, x->d[1], "shadow", "1", false);
}

static void send_many(struct fixture *x, uint64_t ino)
{
	for (int i = 0; i < OUTSTANDING; i++)
		x->unique[i] = i % 4 == 0 ? kernel_send_write(&x->k, ino, "HELLO", 5, 0)
					  : kernel_send_read(&x->k, ino, 5, 0);
}

static void close_files(struct fixture *x)
{
	file_close(x->fast);
	file_close(x->slow);
}

static void a_thousand_hung_requests_delay_no_other(void)
{
	static struct fixture x;
	struct fuse_attr attr;
	char got[5];

	set_up(&x);
	hook_hang(HOOK_OPEN, NULL);
	hook_hang(HOOK_READ, check_path("hdd/objects/1"));
	send_many(&x, SLOW_INO);
	CHECK_SOON(workers_queued(x.d[1]->workers) == OUTSTANDING - SLOW_WORKERS);
	CHECK_EQ(kernel_read(&x.k, FAST, got, 5, 0), 5);
	CHECK(memcmp(got, "quick", 5) == 0);
	CHECK_EQ(kernel_write(&x.k, FAST, "QUICK", 5, 0), 5);
	CHECK_EQ(kernel_getattr(&x.k, SLOW_INO, &attr), 0);
	CHECK_EQ(attr.size, 5);
	kernel_barrier(&x.k); /* lookups and the like reach the session */
	CHECK(workers_stuck_ns(x.d[1]->workers) > 0 && workers_stuck_ns(x.d[0]->workers) == 0);
	hook_release(HOOK_OPEN);
	CHECK_SOON(hook_hanging(HOOK_READ) == SLOW_WORKERS);
	CHECK_EQ(kernel_read(&x.k, FAST, got, 5, 0), 5);
	hook_release(HOOK_READ);
	for (int i = 0; i < OUTSTANDING; i++)
		CHECK_EQ(kernel_error(&x.k, x.unique[i]), 0);
	close_files(&x);
	kernel_stop(&x.k, x.d, 2);
}

static void the_front_stops_while_a_device_hangs(void)
{
	static struct fixture x;

	set_up(&x);
	hook_hang(HOOK_READ, NULL);
	hook_hang(HOOK_WRITE, NULL);
	send_many(&x, SLOW_INO);
	CHECK_SOON(workers_queued(x.d[1]->workers) == OUTSTANDING - SLOW_WORKERS);
	close_files(&x);
	front_stop(x.k.front);
	kernel_wait_event(&x.k, EVENT_ENDED, 0, 0);
	hook_release(HOOK_READ);
	hook_release(HOOK_WRITE);
	for (int i = 0; i < OUTSTANDING; i++) /* what was read is answered */
		CHECK_EQ(kernel_error(&x.k, x.unique[i]), 0);
	kernel_close(&x.k, x.d, 2);
}

static void the_front_stops_under_load(void)
{
	static struct fixture x;

	for (int round = 0; round < 20; round++) {
		kernel_start(&x.k, 4);
		x.d[0] = round == 0 ? device_of("fast", MEMORY) : device_ref(x.d[0]);
		x.fast = open_plain(&x.k, FAST, x.d[0], "log");
		send_many(&x, FAST);
		front_stop(x.k.front);
		for (int i = 0; i < OUTSTANDING; i++)
			if (kernel_answered(&x.k, x.unique[i]))
				CHECK_EQ(kernel_error(&x.k, x.unique[i]), 0);
		file_close(x.fast);
		kernel_close(&x.k, NULL, 0);
	}
	CHECK_EQ(device_stop(x.d[0]), 0);
	for (int round = 0; round < 20; round++)
		device_unref(x.d[0]);
}

static void a_session_that_ends_takes_no_data_and_no_caller_with_it(void)
{
	static struct fixture x;
	char got[5];

	set_up(&x);
	CHECK(shutdown(x.k.session, SHUT_RDWR) == 0);
	CHECK_EQ(kernel_read(&x.k, FAST, got, 5, 0), 5);
	CHECK(kernel_error(&x.k, kernel_send(&x.k, FUSE_STATFS, 1, NULL, 0)) < 0);
	close_files(&x);
	kernel_stop(&x.k, x.d, 2);
}

static void hang(struct job *job, char *scratch)
{
	(void)job, (void)scratch;
	for (;;)
		pause();
}

static void a_worker_that_hangs_is_left_behind(void)
{
	static struct job job = {.run = hang};
	struct workers *w = workers_new(1, "test");

	CHECK(w != NULL);
	workers_submit(w, &job);
	CHECK_SOON(workers_stuck_ns(w) > 0);
	CHECK_EQ(workers_stop(w, 50), 1);
	_exit(0); /* the set is leaked on purpose: no check for leaks */
}

CHECK_MAIN(TEST(a_thousand_hung_requests_delay_no_other),
	   TEST(the_front_stops_while_a_device_hangs), TEST(the_front_stops_under_load),
	   TEST(a_session_that_ends_takes_no_data_and_no_caller_with_it),
	   TEST(a_worker_that_hangs_is_left_behind))

/* INTERRUPT: who is answered early, and what is never given up. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <string.h>

#include "caller.h"
#include "check.h"
#include "hooks.h"
#include "kernel.h"

enum { INO = 7, HUNG = 8, SLOW_WORKERS = 16 };

/* A slow device all of whose workers hang in a READ of the file HUNG. */
struct fixture {
	struct kernel k;
	struct device *d;
	struct file *file, *hung;
	uint64_t reads[SLOW_WORKERS];
	uint32_t caller;
};

static void set_up(struct fixture *x)
{
	x->caller = caller_new();
	kernel_start(&x->k, 1);
	x->d = device_of("hdd", SLOW);
	put_file(check_path("hdd/objects/1"), "hello", 5, 0600);
	put_file(check_path("shadow"), "hello", 5, 0600);
	put_file(check_path("hdd/objects/2"), "world", 5, 0600);
	put_file(check_path("shadow2"), "world", 5, 0600);
	x->file = open_object(&x->k, INO, x->d, "shadow", "1", false);
	x->hung = open_object(&x->k, HUNG, x->d, "shadow2", "2", false);
}

static void hang_workers(struct fixture *x, unsigned busy)
{
	hook_hang(HOOK_READ, check_path("hdd/objects/2"));
	for (int i = 0; i < SLOW_WORKERS; i++)
		x->reads[i] = kernel_send_read(&x->k, HUNG, 5, 0);
	CHECK_SOON(hook_hanging(HOOK_READ) == SLOW_WORKERS - busy);
}

static void tear_down(struct fixture *x)
{
	for (int i = 0; i < SLOW_WORKERS && x->reads[i] != 0; i++)
		CHECK_EQ(kernel_error(&x->k, x->reads[i]), 0);
	file_close(x->file);
	file_close(x->hung);
	kernel_stop(&x->k, &x->d, 1);
	caller_reap(x->caller);
}

static uint64_t read_as(struct fixture *x, uint32_t pid, uint64_t ino)
{
	struct fuse_read_in arg = {.size = 5};

	return kernel_send_as(&x->k, pid, FUSE_READ, ino, &arg, sizeof(arg), NULL, 0);
}

static uint64_t write_as(struct fixture *x, uint32_t pid)
{
	struct fuse_write_in arg = {.size = 5};

	return kernel_send_as(&x->k, pid, FUSE_WRITE, INO, &arg, sizeof(arg), "JELLO", 5);
}

static void an_unknown_request_is_neither_answered_nor_forwarded(void)
{
	struct fixture x = {0};

	set_up(&x);
	kernel_interrupt(&x.k, 1000000);
	kernel_barrier(&x.k);
	CHECK(!kernel_answered(&x.k, 1000000));
	tear_down(&x);
}

static void a_queued_read_of_a_killed_caller_is_given_up(void)
{
	struct fixture x = {0};

	set_up(&x);
	hang_workers(&x, 0);
	caller_kill(x.caller);
	uint64_t read = read_as(&x, x.caller, INO);
	kernel_interrupt(&x.k, read);
	CHECK_EQ(kernel_error(&x.k, read), -EINTR);
	hook_release(HOOK_READ);
	tear_down(&x);
}

static void a_hung_read_of_a_caller_that_is_gone_is_given_up(void)
{
	struct fixture x = {0};

	uint32_t gone = caller_gone();
	set_up(&x);
	hook_hang(HOOK_READ, NULL);
	uint64_t read = read_as(&x, gone, INO);
	CHECK_SOON(hook_hanging(HOOK_READ) == 1);
	kernel_interrupt(&x.k, read);
	CHECK_EQ(kernel_error(&x.k, read), -EINTR);
	hook_release(HOOK_READ);
	tear_down(&x);
}

static void a_living_caller_gets_its_data(void)
{
	struct fixture x = {0};
	char got[5];

	set_up(&x);
	hang_workers(&x, 0);
	uint64_t read = read_as(&x, x.caller, INO);
	kernel_interrupt(&x.k, read);
	kernel_barrier(&x.k);
	CHECK(!kernel_answered(&x.k, read));
	hook_release(HOOK_READ);
	CHECK_EQ(kernel_data(&x.k, read, got, 5), 5);
	CHECK(memcmp(got, "hello", 5) == 0);
	tear_down(&x);
}

static void a_caller_killed_after_the_interrupt_is_noticed(void)
{
	struct fixture x = {0};

	set_up(&x);
	hang_workers(&x, 0);
	uint64_t read = read_as(&x, x.caller, INO);
	kernel_interrupt(&x.k, read);
	kernel_barrier(&x.k);
	caller_kill(x.caller);
	CHECK_EQ(kernel_error(&x.k, read), -EINTR);
	hook_release(HOOK_READ);
	tear_down(&x);
}

static void an_interrupt_that_overtakes_its_request_counts(void)
{
	struct fixture x = {0};

	set_up(&x);
	hang_workers(&x, 0);
	caller_kill(x.caller);
	kernel_interrupt(&x.k, atomic_load(&x.k.unique) + 4);
	kernel_barrier(&x.k); /* takes + 2 */
	/* The pump has swept, finding nothing to look at again. */
	struct pollfd woken = {.fd = x.k.front->wake_fd, .events = POLLIN};
	CHECK_SOON(poll(&woken, 1, 0) == 0);
	uint64_t read = read_as(&x, x.caller, INO);
	CHECK_EQ(kernel_error(&x.k, read), -EINTR);
	hook_release(HOOK_READ);
	tear_down(&x);
}

static void a_write_is_given_up_only_before_it_has_begun(void)
{
	struct fixture x = {0};
	char got[5];

	set_up(&x);
	caller_kill(x.caller);
	hook_hang(HOOK_WRITE, NULL);
	uint64_t begun = write_as(&x, x.caller);
	CHECK_SOON(hook_hanging(HOOK_WRITE) == 1);
	hang_workers(&x, 1);
	kernel_interrupt(&x.k, begun);
	uint64_t queued = write_as(&x, x.caller);
	kernel_interrupt(&x.k, queued);
	CHECK_EQ(kernel_error(&x.k, queued), -EINTR);
	CHECK(!kernel_answered(&x.k, begun));
	hook_release(HOOK_WRITE);
	CHECK_EQ(kernel_error(&x.k, begun), 0);
	hook_release(HOOK_READ);
	CHECK_EQ(kernel_read(&x.k, INO, got, 5, 0), 5);
	CHECK(memcmp(got, "JELLO", 5) == 0);
	CHECK_EQ(hook_calls(HOOK_WRITE), 1);
	tear_down(&x);
}

static void a_write_that_was_moved_to_a_hung_device_is_given_up(void)
{
	struct fixture x = {0};
	struct device *both[2];

	set_up(&x);
	both[0] = device_of("fast", MEMORY);
	both[1] = x.d;
	struct file *moved = open_plain(&x.k, 9, both[0], "moved");
	hang_workers(&x, 0);
	CHECK(file_close_gate(moved));
	struct fuse_write_in arg = {.size = 5};
	uint64_t write = kernel_send_as(&x.k, x.caller, FUSE_WRITE, 9, &arg, sizeof(arg), "JELLO",
					5);
	CHECK_SOON(parked(moved) == 1);
	file_repoint(moved, plain_backing(x.d, "hdd/objects/3"));
	file_open_gate(moved);
	caller_kill(x.caller);
	kernel_interrupt(&x.k, write);
	CHECK_EQ(kernel_error(&x.k, write), -EINTR);
	hook_release(HOOK_READ);
	for (int i = 0; i < SLOW_WORKERS; i++)
		CHECK_EQ(kernel_error(&x.k, x.reads[i]), 0);
	file_close(moved);
	file_close(x.file);
	file_close(x.hung);
	kernel_stop(&x.k, both, 2);
	caller_reap(x.caller);
}

CHECK_MAIN(TEST(an_unknown_request_is_neither_answered_nor_forwarded),
	   TEST(a_queued_read_of_a_killed_caller_is_given_up),
	   TEST(a_hung_read_of_a_caller_that_is_gone_is_given_up),
	   TEST(a_living_caller_gets_its_data),
	   TEST(a_caller_killed_after_the_interrupt_is_noticed),
	   TEST(an_interrupt_that_overtakes_its_request_counts),
	   TEST(a_write_is_given_up_only_before_it_has_begun),
	   TEST(a_write_that_was_moved_to_a_hung_device_is_given_up))

/* FSYNC: what it covers, what it costs, and who learns of its failure. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "caller.h"
#include "check.h"
#include "hooks.h"
#include "io.h"
#include "kernel.h"

enum { INO = 7 };

struct fixture {
	struct kernel k;
	struct device *d;
	struct file *file;
};

static void set_up(struct fixture *x, enum device_kind kind)
{
	kernel_start(&x->k, 1);
	x->d = device_of("tier", kind);
	x->file = kind == SLOW ? open_object(&x->k, INO, x->d, "shadow", "a/1", true)
			       : open_plain(&x->k, INO, x->d, "log");
	CHECK_EQ(file_add_handle(x->file, 1), 0);
	CHECK_EQ(file_add_handle(x->file, 2), 0);
}

static void tear_down(struct fixture *x)
{
	file_close(x->file);
	kernel_stop(&x->k, &x->d, 1);
}

static void check_failure_is_seen_once_by_each_handle(enum device_kind kind)
{
	struct fixture x;

	set_up(&x, kind);
	CHECK_EQ(kernel_write(&x.k, INO, "hello", 5, 0), 5);
	hook_fail(HOOK_FSYNC, 1, EIO);
	CHECK_EQ(kernel_fsync(&x.k, INO, 1), -EIO);
	kernel_wait_event(&x.k, EVENT_IO_ERROR, INO, EIO);
	CHECK_EQ(kernel_fsync(&x.k, INO, 1), 0);
	CHECK_EQ(kernel_fsync(&x.k, INO, 2), -EIO);
	CHECK_EQ(kernel_fsync(&x.k, INO, 2), 0);
	CHECK_EQ(file_add_handle(x.file, 3), 0); /* opened when it had been seen */
	CHECK_EQ(kernel_fsync(&x.k, INO, 3), 0);
	CHECK_EQ(file_remove_handle(x.file, 3), 2);
	tear_down(&x);
}

static void a_failure_is_seen_once_by_each_handle(void)
{
	check_failure_is_seen_once_by_each_handle(MEMORY);
}

static void a_failure_of_an_object_is_seen_once_by_each_handle(void)
{
	check_failure_is_seen_once_by_each_handle(SLOW);
}

static void a_failure_that_nobody_saw_is_seen_by_a_new_handle(void)
{
	struct fixture x;

	set_up(&x, MEMORY);
	CHECK_EQ(kernel_write(&x.k, INO, "hello", 5, 0), 5);
	hook_fail(HOOK_FSYNC, 1, EIO);
	CHECK_EQ(io_sync(x.file), -EIO); /* at a sync of everything, say */
	CHECK_EQ(file_remove_handle(x.file, 1), 1);
	CHECK_EQ(file_remove_handle(x.file, 2), 0);
	CHECK_EQ(file_add_handle(x.file, 3), 0);
	CHECK_EQ(kernel_fsync(&x.k, INO, 3), -EIO);
	CHECK_EQ(kernel_fsync(&x.k, INO, 3), 0);
	tear_down(&x);
}

static bool answered_within_ms(struct kernel *k, uint64_t unique, unsigned ms)
{
	for (unsigned i = 0; i < ms && !kernel_answered(k, unique); i++)
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	return kernel_answered(k, unique);
}

/* The device reports a failure to one fsync of a descriptor only: a second
 * one that overlaps it must not take its own success for the data's. */
static void overlapping_fsyncs_both_learn_of_a_failure(void)
{
	struct fixture x;

	set_up(&x, DISK);
	CHECK_EQ(kernel_write(&x.k, INO, "hello", 5, 0), 5);
	hook_fail(HOOK_FSYNC, 1, EIO);
	hook_hang(HOOK_FSYNC, NULL);
	uint64_t first = kernel_send_fsync(&x.k, INO, 1);
	CHECK_SOON(hook_hanging(HOOK_FSYNC) == 1);
	hook_pass(HOOK_FSYNC);
	uint64_t second = kernel_send_fsync(&x.k, INO, 2);
	if (answered_within_ms(&x.k, second, 300))
		CHECK(kernel_error(&x.k, second) != 0); /* of data that is lost */
	hook_release(HOOK_FSYNC);
	CHECK_EQ(kernel_error(&x.k, first), -EIO);
	CHECK_EQ(kernel_error(&x.k, second), -EIO);
	tear_down(&x);
}

static void a_dirty_object_is_synced_with_shadow_and_entries_then_clean(void)
{
	struct fixture x;

	set_up(&x, SLOW);
	CHECK_EQ(kernel_write(&x.k, INO, "hello", 5, 0), 5);
	CHECK_EQ(kernel_fsync(&x.k, INO, 1), 0);
	CHECK_EQ(hook_calls(HOOK_FSYNC), 4); /* object, shadow, a/, objects/ */
	CHECK_EQ(kernel_fsync(&x.k, INO, 1), 0);
	CHECK_EQ(hook_calls(HOOK_FSYNC), 4);
	CHECK_EQ(kernel_write(&x.k, INO, "J", 1, 0), 1);
	CHECK_EQ(kernel_fsync(&x.k, INO, 1), 0);
	CHECK_EQ(hook_calls(HOOK_FSYNC), 6); /* the entries have not changed */
	tear_down(&x);
}

static void open_written_object(struct fixture *x, bool synced)
{
	kernel_start(&x->k, 1);
	x->d = device_of("tier", SLOW);
	put_file(check_path("shadow"), "hello", 5, 0600);
	int fd = open(check_path("shadow"), O_RDWR | O_CLOEXEC);
	x->file = file_open(x->k.front, INO,
			    backing_object(x->d, fd, -1, "a/1", false, synced));
	CHECK(x->file != NULL);
	CHECK_EQ(file_add_handle(x->file, 1), 0);
}

static void fsync_of_a_clean_object_never_touches_the_device(void)
{
	struct fixture x;

	open_written_object(&x, true);
	hook_hang(HOOK_OPEN, NULL);
	hook_hang(HOOK_FSYNC, NULL);
	CHECK_EQ(kernel_fsync(&x.k, INO, 1), 0);
	CHECK_EQ(hook_calls(HOOK_OPEN) + hook_calls(HOOK_FSYNC), 0);
	tear_down(&x);
}

/* What a daemon that was killed acked, or a Kafka that ran on tree/ wrote. */
static void fsync_of_an_object_that_others_may_have_written_reaches_the_device(void)
{
	struct fixture x;

	open_written_object(&x, false);
	CHECK_EQ(kernel_fsync(&x.k, INO, 1), -EIO); /* and finds that it is missing */
	CHECK(hook_calls(HOOK_OPEN) > 0);
	tear_down(&x);
}

static void fsync_of_a_clean_file_succeeds_though_its_object_is_missing(void)
{
	struct fixture x;

	open_written_object(&x, true);
	CHECK_EQ(kernel_fsync(&x.k, INO, 1), 0);
	tear_down(&x);
}

/* Its reply goes to nobody: the error is still for the next one to see. */
static void a_failure_told_to_a_caller_that_was_given_up_counts_as_unseen(void)
{
	struct fuse_fsync_in arg = {.fh = 1};
	uint32_t gone = caller_gone();
	struct fixture x;

	set_up(&x, SLOW);
	CHECK_EQ(kernel_write(&x.k, INO, "hello", 5, 0), 5);
	hook_fail(HOOK_FSYNC, 1, EIO);
	hook_hang(HOOK_FSYNC, NULL);
	uint64_t first = kernel_send_as(&x.k, gone, FUSE_FSYNC, INO, &arg, sizeof(arg), NULL, 0);
	CHECK_SOON(hook_hanging(HOOK_FSYNC) == 1);
	kernel_interrupt(&x.k, first);
	CHECK_EQ(kernel_error(&x.k, first), -EINTR);
	CHECK_EQ(file_remove_handle(x.file, 1), 1);
	CHECK_EQ(file_remove_handle(x.file, 2), 0);
	hook_release(HOOK_FSYNC);
	CHECK_SOON(file_error_unseen(x.file));
	CHECK_EQ(file_add_handle(x.file, 3), 0);
	CHECK_EQ(kernel_fsync(&x.k, INO, 3), -EIO);
	CHECK(!file_error_unseen(x.file));
	tear_down(&x);
}

CHECK_MAIN(TEST(a_failure_is_seen_once_by_each_handle),
	   TEST(a_failure_of_an_object_is_seen_once_by_each_handle),
	   TEST(a_failure_that_nobody_saw_is_seen_by_a_new_handle),
	   TEST(overlapping_fsyncs_both_learn_of_a_failure),
	   TEST(a_dirty_object_is_synced_with_shadow_and_entries_then_clean),
	   TEST(fsync_of_a_clean_object_never_touches_the_device),
	   TEST(fsync_of_an_object_that_others_may_have_written_reaches_the_device),
	   TEST(fsync_of_a_clean_file_succeeds_though_its_object_is_missing),
	   TEST(a_failure_told_to_a_caller_that_was_given_up_counts_as_unseen))

/* Files whose data is an object on a slow device, with a shadow. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "hooks.h"
#include "io.h"
#include "kernel.h"
#include "object.h"

enum { INO = 7 };

static const char object[] = "orders-3/0.log~hdd0.7f3a9c";
static const char at[] = "hdd/objects/orders-3/0.log~hdd0.7f3a9c";

struct fixture {
	struct kernel k;
	struct device *d;
	struct file *file;
};

static void set_up(struct fixture *x, enum device_kind kind)
{
	kernel_start(&x->k, 1);
	x->d = device_of("hdd", kind);
}

static void open_it(struct fixture *x, bool create)
{
	x->file = open_object(&x->k, INO, x->d, "shadow", object, create);
	CHECK_EQ(file_add_handle(x->file, 1), 0);
}

/* As a demotion left it: object and shadow agree. */
static void put_object(const char *data)
{
	struct timespec times[2] = {{.tv_sec = 1700000000}, {.tv_sec = 1700000000}};

	CHECK(mkdir(check_path("hdd/objects/orders-3"), 0711) == 0);
	put_file(check_path(at), data, strlen(data), 0644);
	put_file(check_path("shadow"), "", 0, 0644);
	CHECK(truncate(check_path("shadow"), (off_t)strlen(data)) == 0);
	CHECK(utimensat(AT_FDCWD, check_path("shadow"), times, 0) == 0);
	CHECK(utimensat(AT_FDCWD, check_path(at), times, 0) == 0);
}

static void tear_down(struct fixture *x)
{
	file_close(x->file);
	kernel_stop(&x->k, &x->d, 1);
}

static void an_object_is_made_by_the_first_write_with_its_shadows_mode(void)
{
	struct fixture x;
	struct stat st;

	set_up(&x, SLOW);
	put_file(check_path("shadow"), "", 0, 0604);
	CHECK(geteuid() != 0 || chown(check_path("shadow"), 1234, 4321) == 0);
	open_it(&x, true);
	CHECK(access(check_path(at), F_OK) != 0);
	CHECK_EQ(kernel_write(&x.k, INO, "hello", 5, 0), 5);
	CHECK(stat(check_path(at), &st) == 0);
	CHECK_EQ(st.st_mode & 07777, 0604);
	CHECK(geteuid() != 0 || (st.st_uid == 1234 && st.st_gid == 4321));
	tear_down(&x);
}

static void the_shadow_follows_size_and_mtime(void)
{
	struct fuse_attr attr;
	struct fixture x;
	struct stat st;

	set_up(&x, SLOW);
	put_object("hello");
	open_it(&x, false);
	CHECK_EQ(kernel_getattr(&x.k, INO, &attr), 0);
	CHECK(attr.size == 5 && attr.mtime == 1700000000);
	CHECK_EQ(hook_calls(HOOK_OPEN), 0); /* a stat never opens the object */

	CHECK_EQ(kernel_write(&x.k, INO, "J", 1, 0), 1); /* no growth */
	CHECK(stat(check_path("shadow"), &st) == 0);
	CHECK(st.st_size == 5 && st.st_mtime > 1700000000);
	CHECK_EQ(kernel_write(&x.k, INO, "world", 5, 4), 5);
	CHECK_EQ(kernel_getattr(&x.k, INO, &attr), 0);
	CHECK_EQ(attr.size, 9);
	CHECK_EQ(attr.blocks * 512, 4096);
	CHECK_EQ(io_truncate(x.file, 3), 0);
	CHECK(stat(check_path("shadow"), &st) == 0 && st.st_size == 3);
	CHECK(stat(check_path(at), &st) == 0 && st.st_size == 3);
	CHECK_EQ(allocated(check_path("shadow")), 0);
	CHECK_EQ(kernel_count_events(&x.k, EVENT_RECONCILED), 0);
	tear_down(&x);
}

static void an_object_that_differs_wins(void)
{
	struct fuse_attr attr;
	struct fixture x;
	char got[32];

	set_up(&x, SLOW);
	put_object("hello");
	put_file(check_path(at), "appended behind", 15, 0644);
	open_it(&x, false);
	CHECK_EQ(kernel_read(&x.k, INO, got, sizeof(got), 0), 15);
	CHECK_EQ(kernel_getattr(&x.k, INO, &attr), 0);
	CHECK(attr.size == 15 && attr.mtime > 1700000000);
	kernel_wait_event(&x.k, EVENT_RECONCILED, INO, 0);
	tear_down(&x);
}

static void a_missing_object_is_an_error_of_its_data_only(void)
{
	struct fuse_attr attr;
	struct fixture x;
	char got[5];

	set_up(&x, SLOW);
	put_object("hello");
	CHECK(unlink(check_path(at)) == 0);
	open_it(&x, false);
	CHECK_EQ(kernel_read(&x.k, INO, got, 5, 0), -EIO);
	kernel_wait_event(&x.k, EVENT_OBJECT_ERROR, INO, ENOENT);
	CHECK_EQ(kernel_write(&x.k, INO, "hello", 5, 0), -EIO);
	CHECK_EQ(kernel_getattr(&x.k, INO, &attr), 0);
	CHECK_EQ(attr.size, 5);
	CHECK(access(check_path(at), F_OK) != 0);
	tear_down(&x);
}

static void a_missing_object_of_no_bytes_is_made_again(void)
{
	struct fixture x;
	char got[5];

	set_up(&x, SLOW);
	open_it(&x, false); /* a crash came between stub and object */
	CHECK_EQ(kernel_read(&x.k, INO, got, 5, 0), 0);
	CHECK(access(check_path(at), F_OK) == 0);
	CHECK_EQ(kernel_count_events(&x.k, EVENT_OBJECT_ERROR), 0);
	tear_down(&x);
}

static void a_symlink_in_place_of_an_object_is_refused(void)
{
	struct fixture x;
	char got[6];

	set_up(&x, SLOW);
	put_object("hello");
	put_file(check_path("secret"), "secret", 6, 0600);
	CHECK(unlink(check_path(at)) == 0 && symlink(check_path("secret"), check_path(at)) == 0);
	open_it(&x, false);
	CHECK_EQ(kernel_read(&x.k, INO, got, 6, 0), -EIO);
	kernel_wait_event(&x.k, EVENT_OBJECT_ERROR, INO, ELOOP);
	tear_down(&x);
}

static void a_symlink_in_place_of_a_directory_is_refused(void)
{
	struct fixture x;

	set_up(&x, SLOW);
	CHECK(mkdir(check_path("outside"), 0700) == 0);
	CHECK(symlink(check_path("outside"), check_path("hdd/objects/a")) == 0);
	x.file = open_object(&x.k, INO, x.d, "shadow", "a/b/0.log~hdd0.1", true);
	CHECK_EQ(kernel_write(&x.k, INO, "hello", 5, 0), -EIO);
	object_make_dirs(x.d->objects_fd, "a/b/0.log~hdd0.1");
	CHECK(access(check_path("outside/b"), F_OK) != 0);
	tear_down(&x);
}

static void a_device_whose_objects_are_gone_fails_and_goes_on(void)
{
	struct fixture x;

	set_up(&x, SLOW);
	open_it(&x, true);
	CHECK(rmdir(check_path("hdd/objects")) == 0);
	CHECK(kernel_write(&x.k, INO, "hello", 5, 0) < 0);
	tear_down(&x);
}

static void in_power_mode_a_write_returns_with_its_entries_durable(void)
{
	struct fixture x;

	set_up(&x, SLOW_POWER);
	open_it(&x, true);
	CHECK_EQ(kernel_write(&x.k, INO, "hello", 5, 0), 5);
	/* The size of the shadow, orders-3/ and objects/. */
	CHECK_EQ(hook_calls(HOOK_FSYNC), 3);
	CHECK_EQ(kernel_write(&x.k, INO, "J", 1, 0), 1);
	CHECK_EQ(hook_calls(HOOK_FSYNC), 3); /* no size, no entry has changed */
	tear_down(&x);
}

static void an_explicit_mtime_outlives_the_making_of_the_object(void)
{
	struct timespec times[2] = {{.tv_sec = 1600000000}, {.tv_sec = 1600000000}};
	struct fuse_attr attr;
	struct fixture x;
	char got[5];

	set_up(&x, SLOW);
	open_it(&x, true);
	CHECK(utimensat(AT_FDCWD, check_path("shadow"), times, 0) == 0);
	CHECK_EQ(kernel_read(&x.k, INO, got, 5, 0), 0);
	CHECK_EQ(kernel_getattr(&x.k, INO, &attr), 0);
	CHECK_EQ(attr.mtime, 1600000000);
	tear_down(&x);
}

CHECK_MAIN(TEST(an_object_is_made_by_the_first_write_with_its_shadows_mode),
	   TEST(the_shadow_follows_size_and_mtime), TEST(an_object_that_differs_wins),
	   TEST(a_missing_object_is_an_error_of_its_data_only),
	   TEST(a_missing_object_of_no_bytes_is_made_again),
	   TEST(a_symlink_in_place_of_an_object_is_refused),
	   TEST(a_symlink_in_place_of_a_directory_is_refused),
	   TEST(a_device_whose_objects_are_gone_fails_and_goes_on),
	   TEST(in_power_mode_a_write_returns_with_its_entries_durable),
	   TEST(an_explicit_mtime_outlives_the_making_of_the_object))

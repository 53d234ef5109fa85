/* A device that is full: what waits, what does not, and what is counted. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "hooks.h"
#include "io.h"
#include "kernel.h"

enum { INO = 7, BLOCK = 4096, FILES = 4, WRITES = 300 };

struct fixture {
	struct kernel k;
	struct device *d;
	struct file *file;
	char block[2 * BLOCK];
};

/* One block is written, and no other is free. */
static void set_up(struct fixture *x)
{
	kernel_start(&x->k, 1);
	x->d = device_of("fast", MEMORY);
	x->file = open_plain(&x->k, INO, x->d, "log");
	memset(x->block, 'x', sizeof(x->block));
	CHECK_EQ(kernel_write(&x->k, INO, x->block, BLOCK, 0), BLOCK);
	CHECK_EQ(atomic_load(&x->d->used_bytes), BLOCK);
	atomic_store(&x->d->limit_bytes, BLOCK);
}

static void tear_down(struct fixture *x)
{
	file_close(x->file);
	kernel_stop(&x->k, &x->d, 1);
}

static void writes_without_room_wait_and_are_told_once(void)
{
	struct fixture x;
	char got[5];

	set_up(&x);
	uint64_t first = kernel_send_write(&x.k, INO, x.block, BLOCK, BLOCK);
	uint64_t second = kernel_send_write(&x.k, INO, x.block, BLOCK, 2 * BLOCK);
	CHECK_EQ(kernel_read(&x.k, INO, got, 5, 0), 5);
	CHECK(!kernel_answered(&x.k, first) && !kernel_answered(&x.k, second));
	CHECK_EQ(kernel_count_events(&x.k, EVENT_NO_ROOM), 1);
	CHECK_EQ(atomic_load(&x.d->used_bytes), BLOCK);

	atomic_store(&x.d->limit_bytes, 3 * BLOCK); /* room was made */
	file_end_starving(x.file, 0);
	CHECK_EQ(kernel_error(&x.k, first), 0);
	CHECK_EQ(kernel_error(&x.k, second), 0);
	CHECK_EQ(atomic_load(&x.d->used_bytes), 3 * BLOCK);
	tear_down(&x);
}

static void a_retry_without_room_is_told_again(void)
{
	struct fixture x;

	set_up(&x);
	uint64_t write = kernel_send_write(&x.k, INO, x.block, BLOCK, BLOCK);
	kernel_wait_event(&x.k, EVENT_NO_ROOM, INO, 0);
	file_end_starving(x.file, 0);
	kernel_wait_event(&x.k, EVENT_NO_ROOM, INO, 0);
	CHECK(!kernel_answered(&x.k, write));
	file_end_starving(x.file, ENOSPC);
	CHECK_EQ(kernel_error(&x.k, write), -ENOSPC);
	tear_down(&x);
}

static void giving_up_answers_only_what_waits_for_room(void)
{
	struct fixture x;

	set_up(&x);
	uint64_t starving = kernel_send_write(&x.k, INO, x.block, BLOCK, BLOCK);
	kernel_wait_event(&x.k, EVENT_NO_ROOM, INO, 0);
	CHECK(file_close_gate(x.file)); /* what waits for room is no change */
	uint64_t gated = kernel_send_write(&x.k, INO, x.block, BLOCK, 0);
	CHECK_SOON(parked(x.file) == 2);
	file_end_starving(x.file, ENOSPC);
	CHECK_EQ(kernel_error(&x.k, starving), -ENOSPC);
	CHECK(!kernel_answered(&x.k, gated));
	file_open_gate(x.file);
	CHECK_EQ(kernel_error(&x.k, gated), 0);
	tear_down(&x);
}

static void a_spilled_file_goes_on_where_there_is_room(void)
{
	struct device *d[2];
	struct fixture x;

	set_up(&x);
	d[0] = x.d;
	d[1] = device_of("other", MEMORY);
	uint64_t write = kernel_send_write(&x.k, INO, x.block, BLOCK, BLOCK);
	kernel_wait_event(&x.k, EVENT_NO_ROOM, INO, 0);
	CHECK(file_close_gate(x.file));
	file_repoint(x.file, plain_backing(d[1], "spilled"));
	file_open_gate(x.file);
	CHECK_EQ(kernel_error(&x.k, write), 0);
	CHECK_EQ(atomic_load(&d[1]->used_bytes), BLOCK);
	CHECK_EQ(allocated(check_path("spilled")), BLOCK);
	file_close(x.file);
	kernel_stop(&x.k, d, 2);
}

static void an_overwrite_needs_no_room(void)
{
	struct fixture x;

	set_up(&x);
	CHECK_EQ(kernel_write(&x.k, INO, x.block, BLOCK, 0), BLOCK);
	CHECK_EQ(kernel_write(&x.k, INO, "hello", 5, 100), 5);
	CHECK_EQ(kernel_count_events(&x.k, EVENT_NO_ROOM), 0);
	CHECK_EQ(atomic_load(&x.d->used_bytes), BLOCK);
	/* But not one that goes on past what is allocated. */
	uint64_t past = kernel_send_write(&x.k, INO, x.block, 2 * BLOCK, 0);
	kernel_wait_event(&x.k, EVENT_NO_ROOM, INO, 0);
	file_end_starving(x.file, ENOSPC);
	CHECK_EQ(kernel_error(&x.k, past), -ENOSPC);
	tear_down(&x);
}

static void a_hole_is_punched_in_a_device_over_its_limit(void)
{
	struct fuse_fallocate_in arg = {.mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE,
					.length = BLOCK};
	struct fixture x;

	set_up(&x);
	atomic_store(&x.d->limit_bytes, BLOCK / 2);
	uint64_t unique = kernel_send(&x.k, FUSE_FALLOCATE, INO, &arg, sizeof(arg));
	kernel_barrier(&x.k);
	bool parked = kernel_count_events(&x.k, EVENT_NO_ROOM) > 0;
	file_end_starving(x.file, ENOSPC);
	CHECK_EQ(kernel_error(&x.k, unique), 0);
	CHECK(!parked);
	CHECK_EQ(atomic_load(&x.d->used_bytes), 0);
	tear_down(&x);
}

static void a_device_that_is_full_before_its_limit_parks_too(void)
{
	struct fixture x;

	set_up(&x);
	atomic_store(&x.d->limit_bytes, INT64_MAX);
	hook_fail(HOOK_WRITE, 1, ENOSPC);
	uint64_t write = kernel_send_write(&x.k, INO, x.block, BLOCK, BLOCK);
	kernel_wait_event(&x.k, EVENT_NO_ROOM, INO, 0);
	CHECK_EQ(atomic_load(&x.d->used_bytes), BLOCK);
	file_end_starving(x.file, 0);
	CHECK_EQ(kernel_error(&x.k, write), 0);
	tear_down(&x);
}

struct writer {
	pthread_t thread;
	struct kernel *k;
	struct file *file;
	unsigned seed;
};

static void *write_at_random(void *arg)
{
	struct writer *w = arg;
	char data[3000];

	memset(data, 'y', sizeof(data));
	for (int i = 0; i < WRITES; i++) {
		size_t len = (size_t)rand_r(&w->seed) % sizeof(data) + 1;
		int64_t offset = rand_r(&w->seed) % (64 * BLOCK);
		CHECK_EQ(kernel_write(w->k, w->file->ino, data, len, offset), len);
		if (i % 50 == 49)
			CHECK_EQ(io_truncate(w->file, rand_r(&w->seed) % (64 * BLOCK)), 0);
	}
	return NULL;
}

static void used_bytes_end_as_the_sum_of_what_is_allocated(void)
{
	static const char *const names[FILES] = {"0", "1", "2", "3"};
	struct writer w[FILES * 2];
	struct kernel k;
	int64_t sum = 0;

	kernel_start(&k, 4);
	struct device *d = device_of("fast", MEMORY);
	for (unsigned i = 0; i < FILES * 2; i++) /* two to a file */
		w[i] = (struct writer){
			.k = &k,
			.file = i < FILES ? open_plain(&k, i + 2, d, names[i]) : w[i - FILES].file,
			.seed = i};
	for (unsigned i = 0; i < FILES * 2; i++)
		CHECK(pthread_create(&w[i].thread, NULL, write_at_random, &w[i]) == 0);
	for (unsigned i = 0; i < FILES * 2; i++)
		pthread_join(w[i].thread, NULL);
	for (unsigned i = 0; i < FILES; i++) {
		sum += allocated(check_path(names[i]));
		file_close(w[i].file);
	}
	CHECK_EQ(atomic_load(&d->used_bytes), sum);
	kernel_stop(&k, &d, 1);
}

CHECK_MAIN(TEST(writes_without_room_wait_and_are_told_once),
	   TEST(a_retry_without_room_is_told_again),
	   TEST(giving_up_answers_only_what_waits_for_room),
	   TEST(a_spilled_file_goes_on_where_there_is_room), TEST(an_overwrite_needs_no_room),
	   TEST(a_hole_is_punched_in_a_device_over_its_limit),
	   TEST(a_device_that_is_full_before_its_limit_parks_too),
	   TEST(used_bytes_end_as_the_sum_of_what_is_allocated))

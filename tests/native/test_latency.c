/* What is counted of requests, in which bucket, and for which device. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "check.h"
#include "hooks.h"
#include "kernel.h"
#include "latency.h"

enum { FAST = 7, SLOW_INO = 8, US = 1000, MS = 1000000 };

static unsigned operation(const char *name)
{
	unsigned i = 0;

	while (strcmp(latency_name(i), name) != 0)
		i++;
	return i;
}

static uint64_t count_in(struct latency *l, const char *name, unsigned from, unsigned to)
{
	uint64_t count = 0;

	for (unsigned i = from; i < to; i++)
		count += atomic_load(&l->of[operation(name)].count[i]);
	return count;
}

static uint64_t count_of(struct latency *l, const char *name)
{
	return count_in(l, name, 0, LATENCY_BUCKETS);
}

static void check_bucket(uint64_t ns, unsigned bucket)
{
	struct latency l = {0};

	latency_add(&l, FUSE_WRITE, ns);
	CHECK_EQ(count_in(&l, "write", bucket, bucket + 1), 1);
	CHECK_EQ(count_of(&l, "write"), 1);
	CHECK_EQ(atomic_load(&l.of[operation("write")].sum_ns), ns);
}

static void a_bucket_ends_with_its_power_of_two(void)
{
	check_bucket(0, 0);
	check_bucket(US, 0);
	check_bucket(US + 1, 1);
	check_bucket(2 * US, 1);
	check_bucket(2 * US + 1, 2);
	check_bucket(1024 * US, 10);
	check_bucket(1024 * US + 1, 11);
	check_bucket((1ull << 26) * US, LATENCY_BUCKETS - 2);
	check_bucket((1ull << 26) * US + 1, LATENCY_BUCKETS - 1);
	check_bucket(1ull << 60, LATENCY_BUCKETS - 1);
}

static void other_requests_are_not_counted(void)
{
	struct latency l = {0};

	latency_add(&l, FUSE_FLUSH, 5);
	latency_add(&l, FUSE_LOOKUP, 5);
	for (unsigned i = 0; latency_name(i) != NULL; i++)
		CHECK_EQ(count_of(&l, latency_name(i)), 0);
}

struct fixture {
	struct kernel k;
	struct device *d[2];
	struct file *fast, *slow;
};

static void set_up(struct fixture *x)
{
	kernel_start(&x->k, 2);
	x->d[0] = device_of("fast", DISK);
	x->d[1] = device_of("hdd", SLOW);
	put_file(check_path("hdd/objects/1"), "hello", 5, 0600);
	put_file(check_path("shadow"), "hello", 5, 0600);
	x->fast = open_plain(&x->k, FAST, x->d[0], "log");
	x->slow = open_object(&x->k, SLOW_INO, x->d[1], "shadow", "1", false);
	CHECK_EQ(file_add_handle(x->fast, 1), 0);
}

static void tear_down(struct fixture *x)
{
	file_close(x->fast);
	file_close(x->slow);
	kernel_stop(&x->k, x->d, 2);
}

static void each_answer_is_counted_once_where_its_file_is(void)
{
	struct fixture x;
	struct fuse_attr attr;
	char got[5];

	set_up(&x);
	for (int i = 0; i < 3; i++)
		CHECK_EQ(kernel_write(&x.k, FAST, "quick", 5, 0), 5);
	CHECK_EQ(kernel_read(&x.k, FAST, got, 5, 0), 5);
	CHECK_EQ(kernel_fsync(&x.k, FAST, 1), 0); /* in a worker */
	for (int i = 0; i < 2; i++)
		CHECK_EQ(kernel_read(&x.k, SLOW_INO, got, 5, 0), 5);
	CHECK_EQ(kernel_getattr(&x.k, SLOW_INO, &attr), 0);
	CHECK_EQ(count_of(&x.d[0]->latency, "write"), 3);
	CHECK_EQ(count_of(&x.d[0]->latency, "read"), 1);
	CHECK_EQ(count_of(&x.d[0]->latency, "fsync"), 1);
	CHECK_EQ(count_of(&x.d[0]->latency, "getattr"), 0);
	CHECK_EQ(count_of(&x.d[1]->latency, "read"), 2);
	CHECK_EQ(count_of(&x.d[1]->latency, "getattr"), 1);
	CHECK_EQ(count_of(&x.d[1]->latency, "write"), 0);
	tear_down(&x);
}

static void the_time_in_the_queue_of_a_device_counts(void)
{
	struct fixture x;
	char got[5];

	set_up(&x);
	hook_hang(HOOK_READ, NULL);
	uint64_t unique = kernel_send_read(&x.k, SLOW_INO, 5, 0);
	/* More than 20 ms by the clock that is used for it. */
	CHECK_SOON(workers_stuck_ns(x.d[1]->workers) > 20 * MS);
	CHECK_EQ(count_of(&x.d[1]->latency, "read"), 0);
	hook_release(HOOK_READ);
	CHECK_EQ(kernel_data(&x.k, unique, got, 5), 5);
	CHECK_EQ(count_of(&x.d[1]->latency, "read"), 1);
	CHECK_EQ(count_in(&x.d[1]->latency, "read", 0, 15), 0);
	CHECK(atomic_load(&x.d[1]->latency.of[operation("read")].sum_ns) > 20 * MS);
	tear_down(&x);
}

static void the_time_at_a_closed_gate_counts(void)
{
	struct fixture x;
	uint64_t end;

	set_up(&x);
	CHECK(file_close_gate(x.fast));
	uint64_t unique = kernel_send_write(&x.k, FAST, "HELLO", 5, 0);
	CHECK_SOON(parked(x.fast) == 1);
	for (end = monotonic_ns() + 20 * MS; monotonic_ns() < end;)
		CHECK_EQ(count_of(&x.d[0]->latency, "write"), 0);
	file_open_gate(x.fast);
	CHECK_EQ(kernel_error(&x.k, unique), 0);
	CHECK_EQ(count_in(&x.d[0]->latency, "write", 15, LATENCY_BUCKETS), 1);
	tear_down(&x);
}

CHECK_MAIN(TEST(a_bucket_ends_with_its_power_of_two), TEST(other_requests_are_not_counted),
	   TEST(each_answer_is_counted_once_where_its_file_is),
	   TEST(the_time_in_the_queue_of_a_device_counts),
	   TEST(the_time_at_a_closed_gate_counts))

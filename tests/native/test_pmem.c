/* A growing file in persistent memory, crashed at each store of sequences of operations. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "fake_pmem.h"
#include "pmem.h"

enum { SLOTS = 8, PAGES = 16, MAX = PAGES * 4096, NONCE = 4711, INO = 99 };

/* What the callers of the file know. */
static struct {
	struct sizes *sizes;
	struct pmem *file;
	char *window; /* of the file, as it is mapped */
	int fd;
	unsigned slot;
	bool bound; /* recovery finds the nonce in the file */
	char acked[MAX];
	uint64_t acked_size;
	bool writing;
	const char *data;
	uint64_t offset, len;
} now;

static bool in_write(uint64_t at)
{
	return now.writing && at >= now.offset && at < now.offset + now.len;
}

static char expected(uint64_t at)
{
	if (in_write(at))
		return now.data[at - now.offset];
	return at < now.acked_size ? now.acked[at] : 0;
}

/* What recovery finds, by the rules of growing.Recovery. */
static void check_crash(enum crash how)
{
	const struct slot *slot = (const void *)model_crash(&now.sizes->slots[now.slot], how);
	uint64_t size = slot->size, written_end = now.offset + now.len;

	if (slot->nonce != NONCE) { /* the file counts as it is */
		CHECK(!now.bound);
		return;
	}
	CHECK_EQ(slot->ino, INO);
	CHECK(size == now.acked_size ||
	      (now.writing && written_end > now.acked_size && size == written_end));
	const char *bytes = now.window != NULL ? model_crash(now.window, how) : NULL;
	for (uint64_t at = 0; at < size; at++) {
		bool torn = in_write(at) && at < now.acked_size; /* an overwrite may be */
		if (!torn && bytes[at] != expected(at))
			check_failed(__FILE__, __LINE__, "byte %llu of %llu after a crash",
				     (unsigned long long)at, (unsigned long long)size);
	}
}

static void check_all_crashes(void)
{
	check_crash(CRASH_NOTHING_MORE);
	check_crash(CRASH_EVERYTHING);
	for (int i = 0; i < 3; i++)
		check_crash(CRASH_SOMETHING);
}

static void set_up(unsigned stale_size)
{
	int dir = open(check_dir(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	memset(&now, 0, sizeof(now));
	now.sizes = sizes_open(dir, SLOTS, false);
	CHECK(now.sizes != NULL);
	close(dir);
	for (int i = 1; i < SLOTS; i++) { /* of files that are long gone */
		now.sizes->slots[i].size = stale_size;
		now.sizes->slots[i].ino = 1;
	}
	model_watch(now.sizes->slots, SLOTS * sizeof(struct slot));
	now.slot = 1;
	model_at_each_step(check_all_crashes);
	CHECK_EQ(sizes_take(now.sizes, NONCE, INO, 0, 1), 1);
	now.bound = true;
	check_all_crashes();
	now.fd = open(check_path("file"), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	now.file = pmem_open(now.fd, now.sizes, now.slot, false);
	CHECK(now.file != NULL);
}

static void tear_down(void)
{
	model_at_each_step(NULL);
	pmem_close(now.file);
	sizes_close(now.sizes);
	close(now.fd);
}

static void grow(uint64_t end)
{
	CHECK_EQ(pmem_grow(now.file, end), 0);
	now.window = pmem_window(now.file);
	model_watch(now.window, pmem_capacity(now.file));
}

static void write_at(uint64_t offset, uint64_t len)
{
	char *data = malloc(len);

	CHECK(data != NULL);
	for (uint64_t i = 0; i < len; i++)
		data[i] = (char)(1 + rand() % 255);
	now.data = data;
	now.offset = offset;
	now.len = len;
	now.writing = true;
	if (pmem_write(now.file, data, len, offset) == -EAGAIN) {
		grow(offset + len);
		CHECK_EQ(pmem_write(now.file, data, len, offset), 0);
	}
	now.writing = false;
	memcpy(now.acked + offset, data, len);
	if (offset + len > now.acked_size)
		now.acked_size = offset + len;
	CHECK_EQ(pmem_size(now.file), now.acked_size);
	check_all_crashes();
	free(data);
}

static void an_acked_append_survives_and_a_torn_one_leaves_nothing(void)
{
	set_up(12345);
	for (int i = 0; now.acked_size < MAX - 4000; i++)
		write_at(now.acked_size, (uint64_t)(1 + rand() % 3000));
	tear_down();
}

static void gaps_are_zeros_and_overwrites_are_durable(void)
{
	set_up(7);
	for (int i = 0; i < 60; i++) {
		uint64_t offset = (uint64_t)(rand() % (MAX - 3000));
		write_at(offset, (uint64_t)(1 + rand() % 3000));
	}
	tear_down();
}

static void a_sealed_file_is_as_long_as_what_was_written(void)
{
	struct stat st;

	set_up(0);
	write_at(0, 5000);
	write_at(5000, 1234);
	CHECK_EQ(fstat(now.fd, &st), 0);
	CHECK(st.st_size > 6234);
	pmem_set_mtime(now.file, 1234567890123456789u);
	const struct slot *crashed =
		(const void *)model_crash(&now.sizes->slots[1], CRASH_NOTHING_MORE);
	CHECK_EQ(crashed->mtime_ns, 1234567890123456789u);
	now.bound = false; /* from here on either will do: the file is cut */
	CHECK_EQ(pmem_seal(now.file), 0);
	CHECK_EQ(fstat(now.fd, &st), 0);
	CHECK_EQ(st.st_size, 6234);
	CHECK_EQ(st.st_mtim.tv_sec, 1234567890);
	CHECK_EQ(st.st_mtim.tv_nsec, 123456789);
	crashed = (const void *)model_crash(&now.sizes->slots[1], CRASH_NOTHING_MORE);
	CHECK_EQ(crashed->nonce, 0);
	CHECK_EQ(pmem_size(now.file), 6234); /* also when the slot has a new owner */
	tear_down();
}

static void a_file_that_exists_grows_on_behind_what_it_has(void)
{
	char got[5];

	set_up(0);
	model_at_each_step(NULL);
	pmem_close(now.file);
	CHECK_EQ(pwrite(now.fd, "hello", 5, 0), 5);
	sizes_give_back(now.sizes, 1);
	int slot = sizes_take(now.sizes, NONCE, INO, 5, 1);
	CHECK(slot > 0);
	now.file = pmem_open(now.fd, now.sizes, (unsigned)slot, false);
	CHECK(now.file != NULL);
	CHECK_EQ(pmem_size(now.file), 5);
	CHECK_EQ(pmem_grow(now.file, 8192), 0);
	model_watch(pmem_window(now.file), pmem_capacity(now.file));
	CHECK_EQ(pmem_write(now.file, "world", 5, 5), 0);
	CHECK_EQ(pread(now.fd, got, 5, 5), 5);
	CHECK(memcmp(got, "world", 5) == 0);
	tear_down();
}

static void all_slots_are_used_and_used_again(void)
{
	set_up(0);
	model_at_each_step(NULL);
	for (int round = 0; round < 3; round++) {
		for (unsigned i = 2; i < SLOTS; i++)
			CHECK(sizes_take(now.sizes, 1000 + i, i, 0, 0) > 0);
		CHECK_EQ(sizes_take(now.sizes, 1, 1, 0, 0), -ENOSPC);
		for (unsigned i = 2; i < SLOTS; i++)
			sizes_give_back(now.sizes, i);
	}
	tear_down();
}

static void a_file_of_slots_that_is_none_is_refused(void)
{
	int dir = open(check_dir(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	int fd = open(check_path("sizes"), O_RDWR | O_CREAT | O_CLOEXEC, 0600);

	CHECK_EQ(pwrite(fd, "something else", 14, 0), 14);
	CHECK_EQ(ftruncate(fd, 4096), 0);
	CHECK(sizes_open(dir, SLOTS, false) == NULL);
	CHECK_EQ(errno, EINVAL);
	CHECK_EQ(ftruncate(fd, 0), 0);
	CHECK(sizes_open(dir, SLOTS, false) == NULL);
	close(fd);
	close(dir);
}

static void a_media_error_is_eio_and_the_file_goes_on(void)
{
	set_up(0);
	model_at_each_step(NULL);
	CHECK_EQ(pmem_catch_media_errors(), 0);
	grow(8192);
	CHECK_EQ(pmem_write(now.file, "hello", 5, 0), 0);
	CHECK_EQ(ftruncate(now.fd, 4096), 0); /* a store behind the end is a SIGBUS */
	CHECK_EQ(pmem_write(now.file, "world", 5, 4094), -EIO);
	CHECK_EQ(pmem_size(now.file), 5);
	CHECK_EQ(pmem_write(now.file, "!", 1, 5), 0);
	CHECK_EQ(pmem_size(now.file), 6);
	tear_down();
}

CHECK_MAIN(TEST(an_acked_append_survives_and_a_torn_one_leaves_nothing),
	   TEST(gaps_are_zeros_and_overwrites_are_durable),
	   TEST(a_sealed_file_is_as_long_as_what_was_written),
	   TEST(a_file_that_exists_grows_on_behind_what_it_has),
	   TEST(all_slots_are_used_and_used_again),
	   TEST(a_file_of_slots_that_is_none_is_refused),
	   TEST(a_media_error_is_eio_and_the_file_goes_on))

/* A growing file in persistent memory, crashed at each step of sequences of operations. */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "check.h"
#include "fake_journal.h"
#include "fake_pmem.h"
#include "pmem.h"

enum { SLOTS = 8, PAGES = 16, MAX = PAGES * 4096, NONCE = 4711, INO = 99 };
enum { STALE_MTIME = 777 };
#define STALE_GROWN (1ull << 40)

/* What the callers of the file know. */
static struct {
	struct sizes *sizes;
	struct pmem *file;
	char *window; /* of the file, as it is mapped */
	int fd;
	unsigned slot;
	char acked[MAX];
	uint64_t acked_size, acked_mtime;
	uint64_t grown; /* what it was asked to grow to */
	uint64_t settled; /* what it has certainly grown to */
	bool in_flight; /* writing, or setting the time */
	const char *data;
	uint64_t offset, len;
} now;

/* What was acked, and of a write under way what is beyond that; an overwrite may
 * be torn. */
static void check_bytes(uint64_t size, enum crash how)
{
	static char expected[MAX];

	if (now.window == NULL || size == 0)
		return;
	const char *bytes = model_crash(now.window, how);
	memcpy(expected, now.acked, size);
	if (now.len > 0 && now.offset < size) {
		uint64_t end = now.offset + now.len < size ? now.offset + now.len : size;
		uint64_t old = now.acked_size > now.offset ? now.acked_size : now.offset;
		old = old < end ? old : end;
		memcpy(expected + now.offset, bytes + now.offset, old - now.offset);
		memcpy(expected + old, now.data + (old - now.offset), end - old);
	}
	CHECK(memcmp(bytes, expected, size) == 0);
}

/* Cut by growing.Recovery, if it is one that it may cut. */
static void check_recovered(const struct slot *slot, const struct state *file)
{
	uint64_t size = slot->size, written_end = now.offset + now.len;

	CHECK_EQ(slot->ino, INO);
	CHECK(size == now.acked_size ||
	      (now.in_flight && written_end > now.acked_size && size == written_end));
	CHECK(slot->mtime_ns == now.acked_mtime ||
	      (now.in_flight && slot->mtime_ns != STALE_MTIME));
	/* Else recovery could take what others appended for ours. */
	CHECK(slot->grown <= now.grown);
	CHECK(slot->settled >= now.settled && slot->settled <= now.grown);
	CHECK(file->length == size || file->length == slot->settled ||
	      (file->length > slot->settled && file->length <= slot->grown &&
	       file->length % 4096 == 0));
	CHECK(file->length >= size);
}

/* Served as it is. */
static void check_plain(const struct state *file)
{
	CHECK_EQ(file->length, now.acked_size);
	CHECK_EQ(file->mtime_ns, now.acked_mtime);
}

static void check_crash(enum crash how_slots, enum crash how_bytes)
{
	struct slot slot = *(const struct slot *)(const void *)model_crash(
		&now.sizes->slots[now.slot], how_slots);
	unsigned count;
	const struct state *files = journal_states(&count);

	for (unsigned i = 0; i < count; i++) {
		if (files[i].removed)
			continue;
		if (files[i].nonce == NONCE && slot.nonce == NONCE)
			check_recovered(&slot, &files[i]);
		else
			check_plain(&files[i]);
	}
	if (slot.nonce == NONCE && count > 0)
		check_bytes(slot.size, how_bytes);
}

static void check_all_crashes(void)
{
	check_crash(CRASH_NOTHING_MORE, CRASH_NOTHING_MORE);
	check_crash(CRASH_EVERYTHING, CRASH_EVERYTHING);
	check_crash(CRASH_EVERYTHING, CRASH_NOTHING_MORE);
	for (int i = 0; i < 3; i++)
		check_crash(CRASH_SOMETHING, CRASH_SOMETHING);
}

static void open_sizes(unsigned count)
{
	int dir = open(check_dir(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	now.sizes = sizes_open(dir, count, false);
	CHECK(now.sizes != NULL);
	close(dir);
}

static struct slot durable_slot(unsigned number)
{
	return *(const struct slot *)(const void *)model_crash(&now.sizes->slots[number],
							       CRASH_NOTHING_MORE);
}

/* As growing.take_slot. */
static void tie(uint64_t size)
{
	uint64_t nonce = htole64(NONCE);
	int slot = sizes_take(now.sizes, NONCE, INO, size, now.acked_mtime);

	CHECK(slot > 0);
	now.slot = (unsigned)slot;
	/* Now: what comes next may be another thread's, whose drain is not ours. */
	CHECK_EQ(durable_slot(now.slot).nonce, NONCE);
	CHECK_EQ(durable_slot(now.slot).ino, INO);
	CHECK_EQ(durable_slot(now.slot).size, size);
	CHECK_EQ(fsetxattr(now.fd, NONCE_ATTRIBUTE, &nonce, sizeof(nonce), 0), 0);
	CHECK_EQ(fsync(now.fd), 0);
}

static void open_growing(uint64_t size)
{
	tie(size);
	now.grown = now.acked_size = size;
	now.file = pmem_open(now.fd, now.sizes, now.slot, false);
	CHECK(now.file != NULL);
}

static void set_up(unsigned stale_size)
{
	struct stat st;

	memset(&now, 0, sizeof(now));
	open_sizes(SLOTS);
	for (int i = 1; i < SLOTS; i++) { /* of files that are long gone */
		now.sizes->slots[i].size = stale_size;
		now.sizes->slots[i].ino = 1;
		now.sizes->slots[i].mtime_ns = STALE_MTIME;
		now.sizes->slots[i].grown = STALE_GROWN;
		now.sizes->slots[i].settled = STALE_GROWN;
	}
	model_watch(now.sizes->slots, SLOTS * sizeof(struct slot));
	now.fd = open(check_path("file"), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	CHECK_EQ(fstat(now.fd, &st), 0);
	now.acked_mtime = (uint64_t)st.st_mtim.tv_sec * 1000000000u + (uint64_t)st.st_mtim.tv_nsec;
	now.slot = 1;
	journal_watch(now.fd);
	model_at_each_step(check_all_crashes);
	open_growing(0);
	check_all_crashes();
}

static void tear_down(void)
{
	model_at_each_step(NULL);
	if (now.file != NULL)
		pmem_close(now.file);
	sizes_close(now.sizes);
	close(now.fd);
}

static void grow(uint64_t end)
{
	struct stat st;

	CHECK_EQ(fstat(now.fd, &st), 0);
	if ((uint64_t)st.st_size < now.settled) /* a seal has failed half way */
		now.settled = (uint64_t)st.st_size;
	now.grown = (end + 4095) & ~4095ull;
	CHECK_EQ(pmem_grow(now.file, end), 0);
	now.settled = now.grown;
	now.window = pmem_window(now.file);
	model_watch(now.window, pmem_capacity(now.file));
}

static void begin_write(char *data, uint64_t offset, uint64_t len)
{
	for (uint64_t i = 0; i < len; i++)
		data[i] = (char)(1 + rand() % 255);
	now.data = data;
	now.offset = offset;
	now.len = len;
	now.in_flight = true;
}

static void end_write(void)
{
	uint64_t end = now.offset + now.len;

	memcpy(now.acked + now.offset, now.data, now.len);
	if (end > now.acked_size)
		now.acked_size = end;
	now.in_flight = false;
	now.len = 0;
	now.acked_mtime = pmem_mtime_ns(now.file);
	CHECK_EQ(pmem_size(now.file), now.acked_size);
	check_all_crashes();
}

static void write_at(uint64_t offset, uint64_t len)
{
	char *data = malloc(len);

	CHECK(data != NULL);
	begin_write(data, offset, len);
	if (pmem_write(now.file, data, len, offset) == -EAGAIN) {
		grow(offset + len);
		CHECK_EQ(pmem_write(now.file, data, len, offset), 0);
	}
	end_write();
	free(data);
}

static void set_mtime(uint64_t mtime_ns)
{
	now.in_flight = true;
	model_at_each_step(NULL); /* either time may be found while it is set */
	CHECK_EQ(pmem_set_mtime(now.file, mtime_ns), 0);
	model_at_each_step(check_all_crashes);
	now.in_flight = false;
	now.acked_mtime = mtime_ns;
	check_all_crashes();
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

static bool has_nonce(void)
{
	return fgetxattr(now.fd, NONCE_ATTRIBUTE, NULL, 0) >= 0;
}

/* From each crash of a seal the file is as long as what was written, whether
 * recovery finds the slot or not. */
static void a_sealed_file_is_as_long_as_what_was_written(void)
{
	struct stat st;

	set_up(0);
	write_at(0, 5000);
	write_at(5000, 1234);
	CHECK_EQ(fstat(now.fd, &st), 0);
	CHECK(st.st_size > 6234);
	set_mtime(1234567890123456789u);
	CHECK_EQ(pmem_seal(now.file), 0);
	check_all_crashes();
	CHECK_EQ(fstat(now.fd, &st), 0);
	CHECK_EQ(st.st_size, 6234);
	CHECK_EQ(st.st_mtim.tv_sec, 1234567890);
	CHECK_EQ(st.st_mtim.tv_nsec, 123456789);
	CHECK(!has_nonce());
	CHECK_EQ(durable_slot(now.slot).nonce, 0);
	CHECK_EQ(pmem_size(now.file), 6234); /* also when the slot has a new owner */
	tear_down();
}

/* Untied by the first seal, it is tied before it is longer again. */
static void a_file_whose_seal_failed_grows_on(void)
{
	set_up(0);
	write_at(0, 5000);
	journal_fail_fsync();
	CHECK_EQ(pmem_seal(now.file), -EIO);
	CHECK(!has_nonce());
	write_at(5000, 10000);
	CHECK(has_nonce());
	CHECK_EQ(pmem_seal(now.file), 0);
	check_all_crashes();
	CHECK(!has_nonce());
	tear_down();
}

static void a_file_that_exists_grows_on_behind_what_it_has(void)
{
	char got[5];

	set_up(0);
	model_at_each_step(NULL);
	pmem_close(now.file);
	CHECK_EQ(pwrite(now.fd, "hello", 5, 0), 5);
	open_growing(5);
	CHECK_EQ(pmem_size(now.file), 5);
	CHECK_EQ(pmem_grow(now.file, 8192), 0);
	model_watch(pmem_window(now.file), pmem_capacity(now.file));
	CHECK_EQ(pmem_write(now.file, "world", 5, 5), 0);
	CHECK_EQ(pread(now.fd, got, 5, 5), 5);
	CHECK(memcmp(got, "world", 5) == 0);
	tear_down();
}

/* -- slots -------------------------------------------------------------------- */

static unsigned free_slots(void)
{
	unsigned free = 0;

	for (unsigned i = 1; i < now.sizes->count; i++)
		free += now.sizes->slots[i].nonce == 0;
	return free;
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

static void a_file_that_never_grew_leaves_its_slot(void)
{
	set_up(0);
	pmem_close(now.file);
	CHECK_EQ(durable_slot(now.slot).nonce, 0);
	CHECK_EQ(free_slots(), SLOTS - 1);
	now.file = NULL;
	tear_down();
}

static void a_file_that_cannot_be_opened_leaves_its_slot(void)
{
	set_up(0);
	pmem_close(now.file);
	model_at_each_step(NULL);
	tie(0);
	CHECK(pmem_open(-1, now.sizes, now.slot, false) == NULL);
	CHECK_EQ(errno, EBADF);
	CHECK_EQ(free_slots(), SLOTS - 1);
	now.file = NULL;
	tear_down();
}

static void a_file_that_is_there_keeps_its_slot(void)
{
	set_up(0);
	write_at(0, 5000);
	pmem_close(now.file); /* by a daemon that ends */
	now.file = NULL;
	now.window = NULL;
	check_all_crashes();
	CHECK_EQ(free_slots(), SLOTS - 2);
	tear_down();
}

static void a_removed_file_leaves_its_slot_when_it_is_gone_for_good(void)
{
	set_up(0);
	write_at(0, 5000);
	CHECK_EQ(unlink(check_path("file")), 0);
	journal_note();
	pmem_close(now.file);
	now.file = NULL;
	CHECK_EQ(free_slots(), SLOTS - 1);
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
	CHECK_EQ(errno, EINVAL);
	close(fd);
	close(dir);
}

/* -- media errors ------------------------------------------------------------- */

/* A load or store behind the end of a mapped file is a SIGBUS, as one of a page
 * with a media error is. */
static void break_slots_from(off_t length)
{
	CHECK_EQ(truncate(check_path("sizes"), length), 0);
}

static void a_media_error_is_eio_and_the_file_goes_on(void)
{
	set_up(0);
	model_at_each_step(NULL);
	grow(8192);
	CHECK_EQ(pmem_write(now.file, "hello", 5, 0), 0);
	CHECK_EQ(ftruncate(now.fd, 4096), 0);
	CHECK_EQ(pmem_write(now.file, "world", 5, 4094), -EIO);
	CHECK_EQ(pmem_size(now.file), 5);
	CHECK_EQ(pmem_write(now.file, "!", 1, 5), 0);
	CHECK_EQ(pmem_size(now.file), 6);
	tear_down();
}

static void a_slot_with_a_media_error_fails_the_write_and_the_file_can_be_sealed(void)
{
	struct stat st;

	set_up(0);
	model_at_each_step(NULL);
	grow(8192);
	CHECK_EQ(pmem_write(now.file, "hello", 5, 0), 0);
	break_slots_from(0);
	CHECK_EQ(pmem_write(now.file, "world", 5, 5), -EIO);
	CHECK_EQ(pmem_set_mtime(now.file, 5), -EIO);
	CHECK_EQ(pmem_grow(now.file, 16384), -EIO);
	CHECK_EQ(pmem_size(now.file), 5);
	break_slots_from(4096); /* it may work again: this mount does not try */
	CHECK_EQ(pmem_write(now.file, "world", 5, 5), -EIO);
	CHECK_EQ(pmem_seal(now.file), 0);
	CHECK_EQ(fstat(now.fd, &st), 0);
	CHECK_EQ(st.st_size, 5);
	for (unsigned i = 1; i < SLOTS; i++)
		CHECK(sizes_take(now.sizes, 1000 + i, i, 0, 0) != (int)now.slot);
	tear_down();
}

static void a_slot_with_a_media_error_is_not_taken_nor_read(void)
{
	enum { GOOD = 4096 / sizeof(struct slot), COUNT = 2 * GOOD };
	struct slot_values values;

	open_sizes(COUNT);
	model_watch(now.sizes->slots, COUNT * sizeof(struct slot));
	break_slots_from(4096);
	for (unsigned i = 1; i < GOOD; i++)
		CHECK_EQ(sizes_take(now.sizes, i, i, 0, 0), i);
	CHECK_EQ(sizes_take(now.sizes, 1, 1, 0, 0), -ENOSPC);
	CHECK_EQ(sizes_load(now.sizes, GOOD - 1, &values), 0);
	CHECK_EQ(values.nonce, GOOD - 1);
	CHECK_EQ(sizes_load(now.sizes, GOOD, &values), -EIO);
	sizes_give_back(now.sizes, GOOD); /* no SIGBUS */
	sizes_close(now.sizes);
}

static void on_other_bus_error(int signal)
{
	(void)signal;
	_exit(7);
}

static void a_media_error_elsewhere_goes_where_it_went_before(void)
{
	struct sigaction other = {.sa_handler = on_other_bus_error};
	struct slot_values values;
	int status;

	CHECK_EQ(sigaction(SIGBUS, &other, NULL), 0);
	open_sizes(SLOTS);
	break_slots_from(0);
	CHECK_EQ(sizes_load(now.sizes, 1, &values), -EIO);
	pid_t pid = fork();
	if (pid == 0)
		now.sizes->slots[1].nonce = 1;
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7);
	sizes_close(now.sizes);
}

CHECK_MAIN(TEST(an_acked_append_survives_and_a_torn_one_leaves_nothing),
	   TEST(gaps_are_zeros_and_overwrites_are_durable),
	   TEST(a_sealed_file_is_as_long_as_what_was_written),
	   TEST(a_file_whose_seal_failed_grows_on),
	   TEST(a_file_that_exists_grows_on_behind_what_it_has),
	   TEST(all_slots_are_used_and_used_again), TEST(a_file_that_never_grew_leaves_its_slot),
	   TEST(a_file_that_cannot_be_opened_leaves_its_slot),
	   TEST(a_file_that_is_there_keeps_its_slot),
	   TEST(a_removed_file_leaves_its_slot_when_it_is_gone_for_good),
	   TEST(a_file_of_slots_that_is_none_is_refused),
	   TEST(a_media_error_is_eio_and_the_file_goes_on),
	   TEST(a_slot_with_a_media_error_fails_the_write_and_the_file_can_be_sealed),
	   TEST(a_slot_with_a_media_error_is_not_taken_nor_read),
	   TEST(a_media_error_elsewhere_goes_where_it_went_before))

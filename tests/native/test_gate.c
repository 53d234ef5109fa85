/* The gate: changes wait while a file is pointed at another backing. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "copy.h"
#include "hooks.h"
#include "kernel.h"

enum { INO = 7, WRITERS = 3, BLOCK = 512, BLOCKS = 24, ROUNDS = 40, MOVES = 60 };

static void a_closed_gate_holds_changes_but_not_reads(void)
{
	struct kernel k;
	char got[5];

	kernel_start(&k, 1);
	struct device *d = device_of("fast", MEMORY);
	struct file *file = open_plain(&k, INO, d, "log");
	CHECK_EQ(file_add_handle(file, 1), 0);
	CHECK_EQ(kernel_write(&k, INO, "aaaaa", 5, 0), 5);
	CHECK(file_close_gate(file)); /* quiet at once */
	uint64_t write = kernel_send_write(&k, INO, "bbbbb", 5, 0);
	uint64_t fsync = kernel_send_fsync(&k, INO, 1);
	struct fuse_fallocate_in arg = {.length = 8192};
	uint64_t falloc = kernel_send(&k, FUSE_FALLOCATE, INO, &arg, sizeof(arg));
	CHECK_SOON(parked(file) == 3);
	CHECK_EQ(kernel_read(&k, INO, got, 5, 0), 5);
	CHECK(memcmp(got, "aaaaa", 5) == 0);
	CHECK(!kernel_answered(&k, write) && !kernel_answered(&k, fsync) &&
	      !kernel_answered(&k, falloc));
	CHECK_EQ(hook_calls(HOOK_FSYNC), 0);
	file_open_gate(file);
	CHECK_EQ(kernel_error(&k, write), 0);
	CHECK_EQ(kernel_error(&k, fsync), 0);
	CHECK_EQ(kernel_error(&k, falloc), 0);
	CHECK_EQ(hook_calls(HOOK_WRITE), 2); /* each once */
	CHECK_EQ(hook_calls(HOOK_FSYNC), 1);
	file_close(file);
	kernel_stop(&k, &d, 1);
}

static void quiet_is_told_when_the_last_change_ends(void)
{
	struct kernel k;

	kernel_start(&k, 2);
	struct device *d = device_of("fast", MEMORY);
	struct file *file = open_plain(&k, INO, d, "log");
	hook_hang(HOOK_WRITE, NULL);
	uint64_t begun = kernel_send_write(&k, INO, "aaaaa", 5, 0);
	CHECK_SOON(hook_hanging(HOOK_WRITE) == 1);
	CHECK(!file_close_gate(file));
	CHECK_EQ(kernel_count_events(&k, EVENT_QUIET), 0);
	hook_release(HOOK_WRITE);
	CHECK_EQ(kernel_error(&k, begun), 0);
	kernel_wait_event(&k, EVENT_QUIET, INO, 0);
	file_open_gate(file);
	file_close(file);
	kernel_stop(&k, &d, 1);
}

static void what_waited_lands_on_the_new_backing(void)
{
	struct device *d[2];
	struct kernel k;
	char got[5] = "";

	kernel_start(&k, 1);
	d[0] = device_of("fast", MEMORY);
	d[1] = device_of("hdd", SLOW);
	struct file *file = open_plain(&k, INO, d[0], "old");
	CHECK_EQ(kernel_write(&k, INO, "aaaaa", 5, 0), 5);
	CHECK(file_close_gate(file));
	uint64_t write = kernel_send_write(&k, INO, "bbbbb", 5, 0);
	CHECK_SOON(parked(file) == 1);
	put_file(check_path("hdd/objects/1"), "aaaaa", 5, 0600);
	put_file(check_path("shadow"), "aaaaa", 5, 0600);
	int data = open(check_path("hdd/objects/1"), O_RDWR | O_CLOEXEC);
	int shadow = open(check_path("shadow"), O_RDWR | O_CLOEXEC);
	file_repoint(file, backing_object(d[1], shadow, data, "1", false, true));
	file_open_gate(file);
	CHECK_EQ(kernel_error(&k, write), 0);
	int fd = open(check_path("old"), O_RDONLY | O_CLOEXEC);
	CHECK_EQ(read(fd, got, 5), 5);
	CHECK(memcmp(got, "aaaaa", 5) == 0 && close(fd) == 0);
	CHECK_EQ(kernel_read(&k, INO, got, 5, 0), 5);
	CHECK(memcmp(got, "bbbbb", 5) == 0);
	file_close(file);
	kernel_stop(&k, d, 2);
}

static void a_late_open_of_the_old_object_keeps_the_accounts(void)
{
	struct device *d[2];
	struct kernel k;
	char got[5];

	kernel_start(&k, 2);
	d[0] = device_of("fast", MEMORY);
	d[1] = device_of("hdd", SLOW);
	put_file(check_path("hdd/objects/1"), "aaaaa", 5, 0600);
	put_file(check_path("shadow"), "aaaaa", 5, 0600);
	struct file *file = open_object(&k, INO, d[1], "shadow", "1", false);
	hook_hang(HOOK_OPEN, NULL);
	uint64_t read = kernel_send_read(&k, INO, 5, 0);
	CHECK_SOON(hook_hanging(HOOK_OPEN) == 1);
	CHECK(file_close_gate(file));
	file_repoint(file, plain_backing(d[0], "new")); /* of no blocks */
	file_open_gate(file);
	hook_release(HOOK_OPEN);
	CHECK_EQ(kernel_data(&k, read, got, 5), 5);
	CHECK_EQ(kernel_write(&k, INO, "bbbbb", 5, 0), 5);
	CHECK_EQ(atomic_load(&d[0]->used_bytes), 4096);
	file_close(file);
	kernel_stop(&k, d, 2);
}

/* Each writer owns every WRITERS-th block and reads back what it wrote. */
struct writer {
	pthread_t thread;
	struct kernel *k;
	int number;
	char last[BLOCKS];
};

static void *write_and_read(void *arg)
{
	struct writer *w = arg;
	char block[BLOCK], got[BLOCK];

	for (int i = 0; i < ROUNDS * BLOCKS; i++) {
		int64_t offset = (int64_t)(i % BLOCKS * WRITERS + w->number) * BLOCK;
		w->last[i % BLOCKS] = (char)(i / BLOCKS + 1);
		memset(block, w->last[i % BLOCKS], BLOCK);
		CHECK_EQ(kernel_write(w->k, INO, block, BLOCK, offset), BLOCK);
		CHECK_EQ(kernel_read(w->k, INO, got, BLOCK, offset), BLOCK);
		CHECK(memcmp(got, block, BLOCK) == 0);
		if (i % BLOCKS == 0)
			CHECK_EQ(kernel_fsync(w->k, INO, 1), 0);
	}
	return NULL;
}

/* As a migration does: close, copy, point, open. */
static void move(struct kernel *k, struct file *file, struct device *to, const char *from,
		 const char *name)
{
	if (!file_close_gate(file))
		kernel_wait_event(k, EVENT_QUIET, INO, 0);
	else
		kernel_count_events(k, EVENT_QUIET);
	int from_fd = open(check_path(from), O_RDONLY | O_CLOEXEC);
	int to_fd = open(check_path(name), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	struct copy_request copy = {from_fd, to_fd, 0, lseek(from_fd, 0, SEEK_END), .keep_holes = true};
	bool at_source;
	CHECK_EQ(copy_data(&copy, &at_source), 0);
	CHECK(ftruncate(to_fd, copy.end) == 0);
	close(from_fd);
	if (to->slow) {
		int shadow = open(check_path("shadow"), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
		CHECK(ftruncate(shadow, lseek(to_fd, 0, SEEK_END)) == 0);
		file_repoint(file, backing_object(to, shadow, to_fd, "o", false, true));
	} else {
		file_repoint(file, backing_plain(to, to_fd));
	}
	file_open_gate(file);
}

static void contents_are_exact_when_moved_under_load(void)
{
	static struct writer w[WRITERS];
	struct device *d[2];
	struct kernel k;
	char got[BLOCK], want[BLOCK];

	kernel_start(&k, 3);
	d[0] = device_of("fast", MEMORY);
	d[1] = device_of("hdd", SLOW);
	struct file *file = open_plain(&k, INO, d[0], "plain");
	CHECK_EQ(file_add_handle(file, 1), 0);
	for (int i = 0; i < WRITERS; i++) {
		w[i] = (struct writer){.k = &k, .number = i};
		CHECK(pthread_create(&w[i].thread, NULL, write_and_read, &w[i]) == 0);
	}
	for (int i = 0; i < MOVES; i += 2) {
		move(&k, file, d[1], "plain", "hdd/objects/o");
		move(&k, file, d[0], "hdd/objects/o", "plain");
	}
	for (int i = 0; i < WRITERS; i++)
		pthread_join(w[i].thread, NULL);
	move(&k, file, d[1], "plain", "hdd/objects/o");
	for (int i = 0; i < WRITERS * BLOCKS; i++) {
		memset(want, w[i % WRITERS].last[i / WRITERS], BLOCK);
		CHECK_EQ(kernel_read(&k, INO, got, BLOCK, (int64_t)i * BLOCK), BLOCK);
		CHECK(memcmp(got, want, BLOCK) == 0);
	}
	file_close(file);
	kernel_stop(&k, d, 2);
}

CHECK_MAIN(TEST(a_closed_gate_holds_changes_but_not_reads),
	   TEST(quiet_is_told_when_the_last_change_ends),
	   TEST(what_waited_lands_on_the_new_backing),
	   TEST(a_late_open_of_the_old_object_keeps_the_accounts),
	   TEST(contents_are_exact_when_moved_under_load))

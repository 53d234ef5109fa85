/* The operations on files of the home tree. */
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

enum { INO = 7, OTHER = 8, MIB = 1 << 20 };

struct fixture {
	struct kernel k;
	struct device *d;
	struct file *file;
};

static void set_up(struct fixture *x, enum device_kind kind)
{
	kernel_start(&x->k, 2);
	x->d = device_of("fast", kind);
	x->file = open_plain(&x->k, INO, x->d, "log");
	CHECK_EQ(file_add_handle(x->file, 1), 0);
}

static void tear_down(struct fixture *x)
{
	file_close(x->file);
	kernel_stop(&x->k, &x->d, 1);
}

static void check_reads_and_writes(enum device_kind kind)
{
	char *wrote = malloc(MIB), *got = malloc(MIB);
	struct fixture x;

	set_up(&x, kind);
	for (int i = 0; i < MIB; i++)
		wrote[i] = (char)(i * 31 >> 3);
	CHECK_EQ(kernel_write(&x.k, INO, wrote, MIB, 100), MIB);
	CHECK_EQ(kernel_read(&x.k, INO, got, MIB, 100), MIB);
	CHECK(memcmp(wrote, got, MIB) == 0);
	CHECK_EQ(kernel_read(&x.k, INO, got, 4096, MIB), 100); /* short at the end */
	CHECK_EQ(kernel_read(&x.k, INO, got, 4096, 2 * MIB), 0);
	CHECK_EQ(kernel_read(&x.k, INO, got, 100, 0), 100);
	CHECK(memcmp(got, (char[100]){0}, 100) == 0); /* the hole */
	CHECK_EQ(kernel_fsync(&x.k, INO, 1), 0);
	CHECK_EQ(kernel_count_events(&x.k, EVENT_IO_ERROR), 0);
	free(wrote);
	free(got);
	tear_down(&x);
}

static void reads_and_writes_in_memory(void)
{
	check_reads_and_writes(MEMORY);
}

static void reads_and_writes_on_a_disk(void)
{
	check_reads_and_writes(DISK);
}

static void reads_and_writes_in_power_mode(void)
{
	check_reads_and_writes(MEMORY_POWER);
}

static void getattr_is_of_the_inode(void)
{
	struct fuse_attr attr;
	struct fixture x;
	struct stat st;

	set_up(&x, MEMORY);
	CHECK_EQ(kernel_write(&x.k, INO, "hello", 5, 8192), 5);
	CHECK(chmod(check_path("log"), 0640) == 0 && stat(check_path("log"), &st) == 0);
	CHECK_EQ(kernel_getattr(&x.k, INO, &attr), 0);
	CHECK(attr.ino == INO && attr.size == 8197 && attr.mode == (S_IFREG | 0640));
	CHECK(attr.blocks == (uint64_t)st.st_blocks && attr.nlink == 1);
	CHECK(attr.mtime == (uint64_t)st.st_mtim.tv_sec && attr.uid == st.st_uid);
	CHECK(attr.mtimensec == (uint32_t)st.st_mtim.tv_nsec);
	tear_down(&x);
}

static void flush_need_not_be_asked_again(void)
{
	struct fuse_flush_in arg = {.fh = 1};
	struct fixture x;

	set_up(&x, MEMORY);
	uint64_t unique = kernel_send(&x.k, FUSE_FLUSH, INO, &arg, sizeof(arg));
	CHECK_EQ(kernel_error(&x.k, unique), -ENOSYS);
	tear_down(&x);
}

static int64_t seek(struct kernel *k, uint64_t offset, uint32_t whence)
{
	struct fuse_lseek_in arg = {.offset = offset, .whence = whence};
	struct fuse_lseek_out out;
	uint64_t unique = kernel_send(k, FUSE_LSEEK, INO, &arg, sizeof(arg));
	int64_t n = kernel_data(k, unique, &out, sizeof(out));

	return n < 0 ? n : (int64_t)out.offset;
}

static void lseek_finds_data_and_holes(void)
{
	struct fixture x;

	set_up(&x, MEMORY);
	CHECK_EQ(kernel_write(&x.k, INO, "hello", 5, MIB), 5);
	CHECK_EQ(seek(&x.k, 0, SEEK_DATA), MIB);
	CHECK_EQ(seek(&x.k, 0, SEEK_HOLE), 0);
	CHECK_EQ(seek(&x.k, MIB, SEEK_HOLE), MIB + 5);
	CHECK_EQ(seek(&x.k, 2 * MIB, SEEK_DATA), -ENXIO);
	tear_down(&x);
}

static int falloc(struct kernel *k, uint32_t mode, uint64_t offset, uint64_t length)
{
	struct fuse_fallocate_in arg = {.mode = mode, .offset = offset, .length = length};

	return kernel_error(k, kernel_send(k, FUSE_FALLOCATE, INO, &arg, sizeof(arg)));
}

static void fallocate_takes_and_gives_back_room(void)
{
	struct fuse_attr attr;
	struct fixture x;

	set_up(&x, MEMORY);
	CHECK_EQ(falloc(&x.k, 0, 0, MIB), 0);
	CHECK_EQ(kernel_getattr(&x.k, INO, &attr), 0);
	CHECK(attr.size == MIB && attr.blocks * 512 == MIB);
	CHECK_EQ(atomic_load(&x.d->used_bytes), MIB);
	CHECK_EQ(falloc(&x.k, FALLOC_FL_KEEP_SIZE, MIB, MIB), 0);
	CHECK_EQ(atomic_load(&x.d->used_bytes), 2 * MIB);
	/* No further: ext4 keeps what is allocated behind the end. */
	CHECK_EQ(falloc(&x.k, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, 0, MIB), 0);
	CHECK_EQ(atomic_load(&x.d->used_bytes), MIB);
	CHECK_EQ(falloc(&x.k, FALLOC_FL_COLLAPSE_RANGE, 0, 4096), -EOPNOTSUPP);
	tear_down(&x);
}

static int64_t copy_range(struct kernel *k, uint64_t from, uint64_t to, uint64_t len)
{
	struct fuse_copy_file_range_in arg = {.nodeid_out = to, .off_out = 4096, .len = len};
	struct fuse_write_out out;
	uint64_t unique = kernel_send(k, FUSE_COPY_FILE_RANGE, from, &arg, sizeof(arg));
	int64_t n = kernel_data(k, unique, &out, sizeof(out));

	return n < 0 ? n : out.size;
}

static void copy_file_range_is_between_open_plain_files(void)
{
	struct fixture x;
	char got[5];

	set_up(&x, MEMORY);
	struct file *other = open_plain(&x.k, OTHER, x.d, "other");
	CHECK_EQ(kernel_write(&x.k, INO, "hello", 5, 0), 5);
	CHECK_EQ(copy_range(&x.k, INO, OTHER, 100), 5);
	CHECK_EQ(kernel_read(&x.k, OTHER, got, 5, 4096), 5);
	CHECK(memcmp(got, "hello", 5) == 0);
	CHECK_EQ(atomic_load(&x.d->used_bytes), 8192);
	CHECK_EQ(copy_range(&x.k, INO, 99, 100), -EBADF);
	/* Where it would have to wait the kernel copies by READ and WRITE. */
	CHECK(file_close_gate(other));
	CHECK_EQ(copy_range(&x.k, INO, OTHER, 100), -EOPNOTSUPP);
	file_open_gate(other);
	atomic_store(&x.d->limit_bytes, 8192);
	CHECK_EQ(copy_range(&x.k, INO, OTHER, MIB), -EOPNOTSUPP);
	CHECK_EQ(atomic_load(&x.d->used_bytes), 8192);
	file_close(other);
	tear_down(&x);
}

static void truncate_gives_room_back(void)
{
	struct fuse_attr attr;
	struct fixture x;

	set_up(&x, MEMORY);
	char *data = calloc(1, MIB);
	CHECK_EQ(kernel_write(&x.k, INO, data, MIB, 0), MIB);
	CHECK_EQ(atomic_load(&x.d->used_bytes), MIB);
	CHECK_EQ(io_truncate(x.file, 4096), 0);
	CHECK_EQ(atomic_load(&x.d->used_bytes), 4096);
	CHECK_EQ(io_truncate(x.file, 10 << 20), 0); /* up: a hole */
	CHECK_EQ(atomic_load(&x.d->used_bytes), 4096);
	CHECK_EQ(kernel_getattr(&x.k, INO, &attr), 0);
	CHECK_EQ(attr.size, 10 << 20);
	CHECK(file_close_gate(x.file));
	CHECK_EQ(io_truncate(x.file, 0), -EAGAIN);
	file_open_gate(x.file);
	free(data);
	tear_down(&x);
}

static void an_error_of_the_device_reaches_the_caller_and_is_told(void)
{
	struct fixture x;
	char got[5];

	set_up(&x, MEMORY);
	hook_fail(HOOK_WRITE, 1, EIO);
	CHECK_EQ(kernel_write(&x.k, INO, "hello", 5, 0), -EIO);
	kernel_wait_event(&x.k, EVENT_IO_ERROR, INO, EIO);
	CHECK_EQ(atomic_load(&x.d->used_bytes), 0);
	hook_fail(HOOK_READ, 1, EIO);
	CHECK_EQ(kernel_read(&x.k, INO, got, 5, 0), -EIO);
	kernel_wait_event(&x.k, EVENT_IO_ERROR, INO, EIO);
	hook_fail(HOOK_WRITE, 1, EINTR);
	CHECK_EQ(kernel_write(&x.k, INO, "hello", 5, 0), 5);
	tear_down(&x);
}

CHECK_MAIN(TEST(reads_and_writes_in_memory), TEST(reads_and_writes_on_a_disk),
	   TEST(reads_and_writes_in_power_mode), TEST(getattr_is_of_the_inode),
	   TEST(flush_need_not_be_asked_again), TEST(lseek_finds_data_and_holes),
	   TEST(fallocate_takes_and_gives_back_room),
	   TEST(copy_file_range_is_between_open_plain_files), TEST(truncate_gives_room_back),
	   TEST(an_error_of_the_device_reaches_the_caller_and_is_told))

#define _GNU_SOURCE
/* A copy is what its source is, past the page cache, whatever calls do. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "copy.h"
#include "hooks.h"

enum { MIB = 1 << 20, SIZE = 3 * MIB + 4097 };

struct pair {
	int from, to;
	char *content;
	bool at_source;
};

/* On a disk: in memory there is no way past the page cache. */
static const char DISK[] = "/var/tmp";

static struct pair set_up(void)
{
	struct pair p = {
		.from = open(DISK, O_RDWR | O_TMPFILE | O_CLOEXEC, 0600),
		.to = open(DISK, O_RDWR | O_TMPFILE | O_CLOEXEC, 0600),
		.content = malloc(SIZE),
	};

	CHECK(p.from >= 0 && p.to >= 0 && p.content != NULL);
	for (int i = 0; i < SIZE; i++)
		p.content[i] = (char)(i * 31 + i / 4096);
	CHECK_EQ(pwrite(p.from, p.content, SIZE, 0), SIZE);
	CHECK_EQ(fsync(p.from), 0);
	return p;
}

static int copy(struct pair *p, off_t offset, off_t end, bool keep_holes)
{
	struct copy_request request = {p->from, p->to, offset, end, keep_holes, false};

	return copy_data(&request, &p->at_source);
}

static bool alike(const struct pair *p, off_t from, off_t upto)
{
	char *got = malloc(SIZE);

	CHECK(got != NULL);
	CHECK_EQ(pread(p->to, got, (size_t)(upto - from), from), upto - from);
	bool same = memcmp(got, p->content + from, (size_t)(upto - from)) == 0;
	free(got);
	return same;
}

static void tear_down(struct pair *p)
{
	close(p->from);
	close(p->to);
	free(p->content);
}

static size_t cached_pages(int fd)
{
	unsigned char pages[SIZE / 4096 + 1];
	size_t count = 0;
	void *map = mmap(NULL, SIZE, PROT_READ, MAP_SHARED, fd, 0);

	CHECK(map != MAP_FAILED);
	CHECK_EQ(mincore(map, SIZE, pages), 0);
	for (size_t i = 0; i < sizeof(pages); i++)
		count += pages[i] & 1;
	munmap(map, SIZE);
	return count;
}

static int64_t allocated_bytes(int fd)
{
	struct stat st;

	CHECK_EQ(fstat(fd, &st), 0);
	return st.st_blocks * 512;
}

static void a_copy_is_what_its_source_is(void)
{
	struct pair p = set_up();

	CHECK_EQ(copy(&p, 0, SIZE, true), 0);
	CHECK(alike(&p, 0, SIZE));
	tear_down(&p);
}

static void a_range_is_copied_over_what_was_there(void)
{
	struct pair p = set_up();

	CHECK_EQ(copy(&p, 0, SIZE, true), 0);
	for (int i = MIB - 3; i < 2 * MIB + 5; i++)
		p.content[i] ^= 1;
	CHECK_EQ(pwrite(p.from, p.content, SIZE, 0), SIZE);
	CHECK_EQ(copy(&p, MIB - 3, 2 * MIB + 5, false), 0);
	CHECK(alike(&p, 0, SIZE));
	tear_down(&p);
}

static void neither_file_is_in_the_page_cache_afterwards(void)
{
	struct pair p = set_up();

	CHECK_EQ(posix_fadvise(p.from, 0, 0, POSIX_FADV_DONTNEED), 0);
	CHECK_EQ(copy(&p, 0, SIZE, true), 0);
	CHECK_EQ(cached_pages(p.from), 0);
	CHECK_EQ(cached_pages(p.to), 0);
	tear_down(&p);
}

static void pages_that_others_have_cached_stay(void)
{
	struct pair p = set_up();
	size_t before = cached_pages(p.from);

	CHECK(before > 0);
	CHECK_EQ(copy(&p, 0, SIZE, true), 0);
	CHECK_EQ(cached_pages(p.from), (int64_t)before);
	tear_down(&p);
}

static void holes_stay_holes(void)
{
	struct pair p = set_up();

	memset(p.content, 0, SIZE);
	memcpy(p.content + 3 * MIB + 10, "hello", 5);
	CHECK_EQ(ftruncate(p.from, 0), 0);
	CHECK_EQ(pwrite(p.from, "hello", 5, 3 * MIB + 10), 5);
	CHECK_EQ(pwrite(p.from, "end", 3, 5 * MIB), 3);
	CHECK_EQ(copy(&p, 0, 4 * MIB, true), 0);
	CHECK_EQ(allocated_bytes(p.to), 4096);
	CHECK_EQ(copy(&p, 4 * MIB, 5 * MIB + 3, true), 0);
	CHECK_EQ(allocated_bytes(p.to), 8192);
	CHECK_EQ(ftruncate(p.to, SIZE), 0);
	CHECK(alike(&p, 0, SIZE));
	tear_down(&p);
}

static void short_and_interrupted_transfers_are_completed(void)
{
	static const size_t BYTES[] = {1, 511, 4096, 5000, 300 * 1024};

	for (size_t i = 0; i < sizeof(BYTES) / sizeof(BYTES[0]); i++) {
		struct pair p = set_up();
		hook_fail(HOOK_COPY_READ, 2, EINTR);
		hook_fail(HOOK_COPY_WRITE, 2, EINTR);
		hook_short(HOOK_COPY_READ, 3, BYTES[i]);
		hook_short(HOOK_COPY_WRITE, 3, BYTES[i]);
		CHECK_EQ(copy(&p, 0, SIZE, true), 0);
		CHECK(alike(&p, 0, SIZE));
		tear_down(&p);
	}
}

static void a_filesystem_that_refuses_direct_transfers_gets_others(void)
{
	struct pair p = set_up();

	hook_fail(HOOK_COPY_READ, 1, EINVAL);
	hook_fail(HOOK_COPY_WRITE, 1, EINVAL);
	CHECK_EQ(copy(&p, 0, SIZE, true), 0);
	CHECK(alike(&p, 0, SIZE));
	tear_down(&p);
}

static void an_error_tells_whose_it_is(void)
{
	struct pair p = set_up();

	hook_fail(HOOK_COPY_READ, 1, EIO);
	CHECK_EQ(copy(&p, 0, SIZE, true), -EIO);
	CHECK(p.at_source);
	hook_fail(HOOK_COPY_WRITE, 1, ENOSPC);
	CHECK_EQ(copy(&p, 0, SIZE, true), -ENOSPC);
	CHECK(!p.at_source);
	hook_short(HOOK_COPY_WRITE, 1, 0);
	CHECK_EQ(copy(&p, 0, SIZE, true), -EIO);
	CHECK(!p.at_source);
	tear_down(&p);
}

static void a_source_that_became_shorter_is_no_error(void)
{
	struct pair p = set_up();

	CHECK_EQ(ftruncate(p.from, MIB + 100), 0);
	CHECK_EQ(copy(&p, 0, SIZE, true), 0);
	CHECK(alike(&p, 0, MIB + 100));
	tear_down(&p);
}

CHECK_MAIN(TEST(a_copy_is_what_its_source_is), TEST(a_range_is_copied_over_what_was_there),
	   TEST(neither_file_is_in_the_page_cache_afterwards),
	   TEST(pages_that_others_have_cached_stay), TEST(holes_stay_holes),
	   TEST(short_and_interrupted_transfers_are_completed),
	   TEST(a_filesystem_that_refuses_direct_transfers_gets_others),
	   TEST(an_error_tells_whose_it_is), TEST(a_source_that_became_shorter_is_no_error))

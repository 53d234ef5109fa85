#define _GNU_SOURCE
#include "check.h"

#include <dirent.h>
#include <ftw.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { SOON_S = 5, TEST_S = 20, PATHS = 16 };

static char dir[256];

void check_failed(const char *file, int line, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	fprintf(stderr, "%s:%d: ", file, line);
	vfprintf(stderr, format, args);
	fputc('\n', stderr);
	va_end(args);
	_exit(1); /* other threads may be in the middle of anything */
}

static uint64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* How many times longer than on a bare machine everything may take. */
static unsigned slowness(void)
{
	const char *given = getenv("PAFKAFS_TEST_SLOWNESS");

	return given != NULL ? (unsigned)atoi(given) : 1;
}

uint64_t check_deadline(void)
{
	return now_ns() + slowness() * SOON_S * 1000000000ull;
}

bool check_pause(uint64_t deadline)
{
	nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	return now_ns() < deadline;
}

const char *check_dir(void)
{
	return dir;
}

const char *check_path(const char *name)
{
	static char paths[PATHS][4096];
	static unsigned next;
	char *path = paths[next++ % PATHS];

	snprintf(path, sizeof(paths[0]), "%s/%s", dir, name);
	return path;
}

static unsigned descriptors(void)
{
	DIR *d = opendir("/proc/self/fd");
	unsigned count = 0;

	if (d == NULL)
		check_failed(__FILE__, __LINE__, "no /proc/self/fd");
	while (readdir(d) != NULL)
		count++;
	closedir(d);
	return count;
}

static void child(const struct test *test)
{
	alarm(slowness() * TEST_S);
	unsigned before = descriptors();
	test->run();
	unsigned after = descriptors();
	if (after != before)
		check_failed(__FILE__, __LINE__, "%u descriptors before, %u after", before, after);
	exit(0); /* where the sanitizer looks for leaks */
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
	(void)st, (void)type, (void)ftw;
	return remove(path);
}

static bool passes(const struct test *test)
{
	int status;

	const char *dax = getenv("PAFKAFS_DAX"); /* as scripts/dax-vm has it */
	snprintf(dir, sizeof(dir), "%s/pafkafs-test-XXXXXX", dax != NULL ? dax : "/dev/shm");
	if (mkdtemp(dir) == NULL)
		check_failed(__FILE__, __LINE__, "no directory %s", dir);
	fflush(NULL);
	pid_t pid = fork();
	if (pid == 0)
		child(test);
	waitpid(pid, &status, 0);
	nftw(dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
	bool passed = WIFEXITED(status) && WEXITSTATUS(status) == 0;
	printf("%s %s", passed ? "ok  " : "FAIL", test->name);
	if (WIFSIGNALED(status))
		printf(" (%s)", strsignal(WTERMSIG(status)));
	printf("\n");
	return passed;
}

static bool wanted(const struct test *test, int argc, char **argv)
{
	bool named = argc <= 1;

	for (int i = 1; i < argc; i++)
		named |= strcmp(argv[i], test->name) == 0;
	return named;
}

int check_main(const struct test *tests, unsigned count, int argc, char **argv)
{
	unsigned failed = 0;

	for (unsigned i = 0; i < count; i++)
		if (wanted(&tests[i], argc, argv) && !passes(&tests[i]))
			failed++;
	return failed > 0;
}

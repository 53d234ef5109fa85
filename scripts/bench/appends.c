/*
 * appends: what one append costs, by the ways to make it durable.
 *
 *   appends DIRECTORY WAY BATCH_BYTES WRITERS FILE_MIB [sync]
 *
 * WAY is pmem (the helper of native/pmem.c), pwrite, pwrite+fsync, or memcpy
 * (plain non-temporal copies into memory of the process, drained).  With
 * sync the mapping is MAP_SYNC: DIRECTORY has to be on DAX.  Each writer
 * fills a file of its own, allocated before the clock starts, as the pool and
 * the growth ahead of the writer do it.  Prints one line of JSON: bytes per
 * second of all writers and CPU seconds of the appends.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "persist.h"
#include "pmem.h"

enum { WRITERS_MAX = 64 };

static const char *way;
static size_t batch, file_bytes;
static int dir_fd;
static struct sizes *sizes;
static bool map_sync;
static pthread_barrier_t start;

struct writer {
	pthread_t thread;
	unsigned number;
	double cpu_s;
	uint64_t faults;
};

static void die(const char *what)
{
	fprintf(stderr, "appends: %s: %s\n", what, strerror(errno));
	exit(1);
}

static double seconds(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static int open_file(unsigned number)
{
	char name[32];

	snprintf(name, sizeof(name), "append-%u", number);
	int fd = openat(dir_fd, name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (fd < 0)
		die(name);
	unlinkat(dir_fd, name, 0);
	return fd;
}

static void append_pmem(struct pmem *p, const char *data)
{
	for (size_t at = 0; at + batch <= file_bytes; at += batch)
		if (pmem_write(p, data, batch, at) != 0)
			die("pmem_write");
}

static void append_pwrite(int fd, const char *data, bool sync)
{
	for (size_t at = 0; at + batch <= file_bytes; at += batch)
		if (pwrite(fd, data, batch, (off_t)at) != (ssize_t)batch ||
		    (sync && fdatasync(fd) != 0))
			die("pwrite");
}

static void append_memcpy(char *to, const char *data)
{
	for (size_t at = 0; at + batch <= file_bytes; at += batch) {
		persist_copy(to + at, data, batch);
		persist_drain();
	}
}

static void fill(int fd)
{
	char *zeros = calloc(1, 1 << 20);

	for (size_t at = 0; at < file_bytes; at += 1 << 20)
		if (pwrite(fd, zeros, 1 << 20, (off_t)at) < 0)
			die("allocating");
	fsync(fd);
	free(zeros);
}

static void *run(void *arg)
{
	struct writer *w = arg;
	int fd = open_file(w->number);
	struct rusage before, after;
	struct pmem *p = NULL;
	char *memory = NULL, *data = malloc(batch);

	memset(data, 'x', batch);
	if (strcmp(way, "pmem") == 0) {
		int slot = sizes_take(sizes, 1 + w->number, 1, 0, 0);
		p = pmem_open(fd, sizes, (unsigned)slot, map_sync);
		if (p == NULL || pmem_grow(p, file_bytes) != 0)
			die("pmem_grow");
	} else if (strcmp(way, "memcpy") == 0) {
		memory = mmap(NULL, file_bytes, PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
		if (memory == MAP_FAILED)
			die("mmap");
	} else {
		fill(fd);
	}
	pthread_barrier_wait(&start);
	getrusage(RUSAGE_THREAD, &before);
	double cpu = seconds(CLOCK_THREAD_CPUTIME_ID);
	if (p != NULL)
		append_pmem(p, data);
	else if (memory != NULL)
		append_memcpy(memory, data);
	else
		append_pwrite(fd, data, strcmp(way, "pwrite+fsync") == 0);
	w->cpu_s = seconds(CLOCK_THREAD_CPUTIME_ID) - cpu;
	getrusage(RUSAGE_THREAD, &after);
	w->faults = (uint64_t)(after.ru_minflt - before.ru_minflt);
	pthread_barrier_wait(&start);
	if (p != NULL)
		pmem_close(p);
	close(fd);
	free(data);
	return NULL;
}

int main(int argc, char **argv)
{
	static struct writer writers[WRITERS_MAX];

	if (argc < 6) {
		fprintf(stderr, "usage: appends DIRECTORY WAY BATCH WRITERS FILE_MIB [sync]\n");
		return 2;
	}
	way = argv[2];
	batch = strtoul(argv[3], NULL, 10);
	unsigned count = (unsigned)strtoul(argv[4], NULL, 10);
	file_bytes = strtoul(argv[5], NULL, 10) << 20;
	map_sync = argc > 6;
	dir_fd = open(argv[1], O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (dir_fd < 0 || batch == 0 || count == 0 || count > WRITERS_MAX)
		die(argv[1]);
	sizes = sizes_open(dir_fd, 1024, map_sync);
	if (sizes == NULL)
		die("sizes");
	pthread_barrier_init(&start, NULL, count + 1);
	for (unsigned i = 0; i < count; i++) {
		writers[i].number = i;
		pthread_create(&writers[i].thread, NULL, run, &writers[i]);
	}
	pthread_barrier_wait(&start);
	double began = seconds(CLOCK_MONOTONIC), cpu = 0;
	uint64_t faults = 0;
	pthread_barrier_wait(&start);
	double took = seconds(CLOCK_MONOTONIC) - began;
	for (unsigned i = 0; i < count; i++) {
		pthread_join(writers[i].thread, NULL);
		cpu += writers[i].cpu_s;
		faults += writers[i].faults;
	}
	double bytes = (double)count * (double)(file_bytes / batch * batch);
	printf("{\"way\": \"%s\", \"batch\": %zu, \"writers\": %u, \"bytes_per_s\": %.0f, "
	       "\"bytes_per_cpu_s\": %.0f, \"append_us\": %.3f, \"faults\": %llu}\n",
	       way, batch, count, bytes / took, bytes / cpu, cpu / (bytes / (double)batch) * 1e6,
	       (unsigned long long)faults);
	sizes_close(sizes);
	unlinkat(dir_fd, "sizes", 0);
	return 0;
}

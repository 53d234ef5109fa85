/*
 * steady: appends within what a file has grown to, with all system calls but
 * write and exit forbidden: whoever makes one is killed.
 *
 *   steady DIRECTORY JOURNAL_INFO
 *
 * Prints how many page faults the appends met, and how many transactions the
 * journal of the file system committed meanwhile.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pmem.h"

enum { GROWN = 8 << 20, BATCH = 5000 };

static void forbid_system_calls(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_write, 2, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getrusage, 1, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
	};
	struct sock_fprog program = {.len = sizeof(code) / sizeof(code[0]), .filter = code};

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
	    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
		_exit(3);
}

static void append(struct pmem *p)
{
	static char batch[BATCH];
	struct rusage before, after;
	char said[64];

	forbid_system_calls();
	getrusage(RUSAGE_SELF, &before);
	for (uint64_t at = 0; at + BATCH <= GROWN; at += BATCH)
		if (pmem_write(p, batch, BATCH, at) != 0)
			_exit(4);
	getrusage(RUSAGE_SELF, &after);
	int len = snprintf(said, sizeof(said), "faults %ld\n", after.ru_minflt - before.ru_minflt);
	(void)!write(1, said, (size_t)len);
	_exit(0);
}

static long transactions(const char *path)
{
	long count = -1;
	FILE *info = fopen(path, "r");

	if (info == NULL || fscanf(info, "%ld", &count) != 1)
		exit(5);
	fclose(info);
	return count;
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	int dir = open(argv[1], O_RDONLY | O_DIRECTORY), status;
	int fd = openat(dir, "steady", O_RDWR | O_CREAT | O_TRUNC, 0600);
	struct sizes *sizes = sizes_open(dir, 64, true);
	if (sizes == NULL)
		return 6;
	int slot = sizes_take(sizes, 1, 1, 0, 0);
	struct pmem *p = pmem_open(fd, sizes, (unsigned)slot, true);
	if (p == NULL || pmem_grow(p, GROWN) != 0)
		return 7;
	sync(); /* what others have begun is committed before the count */
	long before = transactions(argv[2]);
	pid_t child = fork();
	if (child == 0) {
		/* A fork shares no page tables of file mappings: in the parent,
		 * and in a daemon, they are there. */
		madvise(pmem_window(p), GROWN, MADV_POPULATE_WRITE);
		append(p);
	}
	waitpid(child, &status, 0);
	printf("commits %ld\n", transactions(argv[2]) - before);
	printf("status %d\n", status);
	unlinkat(dir, "steady", 0);
	unlinkat(dir, "sizes", 0);
	return 0;
}

#define _GNU_SOURCE
#include "caller.h"

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

static void *stay(void *arg)
{
	for (;;)
		pause();
	return arg;
}

static bool status_has(uint32_t pid, const char *field, const char *value)
{
	char path[64], line[256];
	bool found = false;

	snprintf(path, sizeof(path), "/proc/%u/status", pid);
	FILE *status = fopen(path, "re");
	CHECK(status != NULL);
	while (fgets(line, sizeof(line), status) != NULL)
		found |= strncmp(line, field, strlen(field)) == 0 && strstr(line, value) != NULL;
	fclose(status);
	return found;
}

uint32_t caller_new(void)
{
	pthread_t thread;
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (pid == 0) {
		if (pthread_create(&thread, NULL, stay, NULL) != 0)
			_exit(1);
		syscall(SYS_exit, 0); /* of this thread alone */
	}
	CHECK_SOON(status_has((uint32_t)pid, "State:", "Z"));
	return (uint32_t)pid;
}

void caller_kill(uint32_t pid)
{
	CHECK(kill((pid_t)pid, SIGKILL) == 0);
	CHECK_SOON(status_has(pid, "SigPnd:", "00100")); /* SIGKILL */
}

void caller_reap(uint32_t pid)
{
	kill((pid_t)pid, SIGKILL);
	CHECK_EQ(waitpid((pid_t)pid, NULL, 0), pid);
}

uint32_t caller_gone(void)
{
	pid_t pid = fork();

	if (pid == 0)
		_exit(0);
	CHECK_EQ(waitpid(pid, NULL, 0), pid);
	return (uint32_t)pid;
}

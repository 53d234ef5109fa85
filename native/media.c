#define _GNU_SOURCE
#include "media.h"

#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>

static _Thread_local sigjmp_buf *touching;
static struct sigaction before;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static int caught;

static void on_bus_error(int signal, siginfo_t *info, void *context)
{
	if (touching != NULL) {
		/* The jump restores no mask, which would cost each touch a system call. */
		sigset_t bus;
		sigemptyset(&bus);
		sigaddset(&bus, SIGBUS);
		pthread_sigmask(SIG_UNBLOCK, &bus, NULL);
		siglongjmp(*touching, 1);
	}
	if (before.sa_flags & SA_SIGINFO && before.sa_sigaction != NULL) {
		before.sa_sigaction(signal, info, context);
		return;
	}
	if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
		before.sa_handler(signal);
		return;
	}
	struct sigaction fatal = {.sa_handler = SIG_DFL};
	sigaction(SIGBUS, &fatal, NULL); /* the store is repeated, and kills */
}

static void catch(void)
{
	struct sigaction action = {.sa_sigaction = on_bus_error, .sa_flags = SA_SIGINFO};

	caught = sigaction(SIGBUS, &action, &before) == 0 ? 0 : -errno;
}

int media_catch_errors(void)
{
	pthread_once(&once, catch);
	return caught;
}

int media_touch(int (*touch)(void *), void *arg)
{
	sigjmp_buf back;

	if (sigsetjmp(back, 0) != 0) {
		touching = NULL;
		return -EIO;
	}
	touching = &back;
	int result = touch(arg);
	touching = NULL;
	return result;
}

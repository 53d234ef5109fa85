/*
 * hooks: system calls of the core that a test lets hang or fail, put in place
 * by the linker (-Wl,--wrap).
 */
#ifndef PAFKAFS_TEST_HOOKS_H
#define PAFKAFS_TEST_HOOKS_H

#include <stdbool.h>
#include <stddef.h>

/* Which call of the core. */
enum hook {
	HOOK_READ,  /* preadv2 */
	HOOK_WRITE, /* pwritev2 */
	HOOK_FSYNC, /* fsync and fdatasync */
	HOOK_OPEN,  /* sys_open_beneath: an object is opened */
	HOOK_COPY_READ,  /* pread */
	HOOK_COPY_WRITE, /* pwrite */
	HOOKS,
};

/* Calls on the file at path (NULL: any) wait until hook_release. */
void hook_hang(enum hook hook, const char *path);
/* Those that hang go on hanging, later calls do not. */
void hook_pass(enum hook hook);
/* The next times calls fail with error, without being made; they may
 * hang first. */
void hook_fail(enum hook hook, unsigned times, int error);
/* The next times calls transfer no more than so many bytes. */
void hook_short(enum hook hook, unsigned times, size_t bytes);
void hook_release(enum hook hook);
unsigned hook_hanging(enum hook hook);
unsigned hook_calls(enum hook hook); /* made or refused since the start */

#endif

/*
 * caller: processes for the pid of a request.
 *
 * A caller that is killed while the kernel waits for its request has SIGKILL
 * pending for as long as that lasts.  A thread can be kept like that without
 * a mount: the first thread of a process, ended, stays a zombie that signals
 * of the process are still noted for.
 */
#ifndef PAFKAFS_TEST_CALLER_H
#define PAFKAFS_TEST_CALLER_H

#include <stdint.h>

/* All before the first thread of the test is started. */
uint32_t caller_new(void);
void caller_kill(uint32_t pid);
void caller_reap(uint32_t pid);
/* A process that is gone altogether. */
uint32_t caller_gone(void);

#endif

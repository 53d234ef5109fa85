/*
 * fake_journal: what a power cut leaves of the metadata of one file.
 *
 * Changes are made for real, and noted: ext4 and xfs make them durable in the
 * order in which they were made, by an fsync at the latest.  So after a crash
 * the file is in any one of the states that it had since the last fsync.
 */
#ifndef PAFKAFS_TEST_FAKE_JOURNAL_H
#define PAFKAFS_TEST_FAKE_JOURNAL_H

#include <stdbool.h>
#include <stdint.h>

struct state {
	uint64_t length, mtime_ns, nonce; /* nonce 0: none */
	bool removed;
};

/* Of this file from now on: what it is now is durable.  Each change is a step
 * of fake_pmem.  -1: of none. */
void journal_watch(int fd);
/* Something else has changed it: it was removed. */
void journal_note(void);
/* The states that a crash may leave; the last is what the file is now. */
const struct state *journal_states(unsigned *count);
/* The next fsync fails with EIO, and makes nothing durable. */
void journal_fail_fsync(void);

#endif

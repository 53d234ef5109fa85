/*
 * kernel: plays the kernel for a front, over a socketpair that stands for
 * /dev/fuse, and keeps the replies until the test asks for them.
 *
 * Each request must be answered once: a second answer fails the test.
 */
#ifndef PAFKAFS_TEST_KERNEL_H
#define PAFKAFS_TEST_KERNEL_H

#include <linux/fuse.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "device.h"
#include "file.h"
#include "front.h"

struct reply {
	struct reply *next;
	size_t len; /* of data */
	bool taken; /* kept only to notice a second answer */
	struct fuse_out_header out;
	char data[];
};

enum { REPLY_BUCKETS = 4096 };

struct kernel {
	struct front *front;
	int fuse;    /* the kernel's end */
	int session; /* the session's end, played by the test */
	pthread_t receiver;
	pthread_mutex_t lock;
	pthread_cond_t came;
	struct reply *replies[REPLY_BUCKETS];
	_Atomic uint64_t unique;
};

void kernel_open(struct kernel *k, unsigned threads); /* not started yet */
void kernel_start(struct kernel *k, unsigned threads);
/* Ends the front, then the devices; all files must have been closed. */
void kernel_stop(struct kernel *k, struct device **devices, unsigned count);
/* What remains to do after front_stop. */
void kernel_close(struct kernel *k, struct device **devices, unsigned count);
/* The connection is gone: what read() of the device says from now on. */
void kernel_hang_up(struct kernel *k);

/* Requests; the unique of each.  pid is of the caller. */
uint64_t kernel_send_as(struct kernel *k, uint32_t pid, uint32_t opcode, uint64_t ino,
			const void *arg, size_t arg_len, const void *payload, size_t len);
uint64_t kernel_send(struct kernel *k, uint32_t opcode, uint64_t ino, const void *arg,
		     size_t arg_len);
uint64_t kernel_send_read(struct kernel *k, uint64_t ino, size_t len, int64_t offset);
uint64_t kernel_send_write(struct kernel *k, uint64_t ino, const void *data, size_t len,
			   int64_t offset);
uint64_t kernel_send_fsync(struct kernel *k, uint64_t ino, uint64_t fh);
void kernel_interrupt(struct kernel *k, uint64_t unique);
void kernel_send_raw(struct kernel *k, const void *packet, size_t len);

bool kernel_answered(struct kernel *k, uint64_t unique);
/* Waits for the answer; the caller frees it. */
struct reply *kernel_reply(struct kernel *k, uint64_t unique);
/* As above; the error alone (0 or -errno), or the data's length. */
int kernel_error(struct kernel *k, uint64_t unique);
int64_t kernel_data(struct kernel *k, uint64_t unique, void *data, size_t len);
/* All requests sent before have been looked at by a front of one thread. */
void kernel_barrier(struct kernel *k);

/* Whole calls: result or -errno. */
int64_t kernel_read(struct kernel *k, uint64_t ino, void *data, size_t len, int64_t offset);
int64_t kernel_write(struct kernel *k, uint64_t ino, const void *data, size_t len,
		     int64_t offset);
int kernel_fsync(struct kernel *k, uint64_t ino, uint64_t fh);
int kernel_getattr(struct kernel *k, uint64_t ino, struct fuse_attr *attr);

/* The next event of this kind; others before it are dropped. */
void kernel_wait_event(struct kernel *k, enum event_kind kind, uint64_t ino, int64_t value);
unsigned kernel_count_events(struct kernel *k, enum event_kind kind);

/* A packet at the session's end, with a deadline; its length. */
size_t session_recv(struct kernel *k, void *packet, size_t len);

enum device_kind { MEMORY, DISK, SLOW, MEMORY_POWER, SLOW_POWER };

/* A device with its objects/ below check_dir(), with room for everything. */
struct device *device_of(const char *name, enum device_kind kind);
/* A file of the home tree; its data below check_dir(). */
struct file *open_plain(struct kernel *k, uint64_t ino, struct device *d, const char *name);
struct backing *plain_backing(struct device *d, const char *name);
/* The data is at DEVICE/objects/object, the shadow beside the devices. */
struct file *open_object(struct kernel *k, uint64_t ino, struct device *d, const char *shadow,
			 const char *object, bool create);
void put_file(const char *path, const void *data, size_t len, unsigned mode);
int64_t allocated(const char *path);
/* Requests that wait for the file's gate or for room. */
unsigned parked(struct file *file);

#endif

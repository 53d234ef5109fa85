/*
 * file: an open inode, shared by all its handles: where its bytes are, and
 * what must wait while they are being moved.
 *
 * The bytes and the attributes of a file are at its backing.  A backing with
 * a shadow is an object on some device: the shadow, on the fast tier, has its
 * size, mode, owner and times, so that no stat ever waits for that device.
 *
 * Invariant: the backing is replaced only while the gate is closed and no
 * change is under way, so each change lands wholly on one backing.
 */
#ifndef PAFKAFS_FILE_H
#define PAFKAFS_FILE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>

#include "device.h"
#include "front.h"
#include "pmem.h"

struct backing {
	struct job close_job; /* first */
	_Atomic int refs;
	struct device *dev;
	int shadow_fd;      /* -1: the data's own inode has the attributes */
	char *object;       /* path below objects/; NULL for a plain file */
	pthread_mutex_t open_lock;
	pthread_mutex_t sync_lock; /* held by the fsync under way */
	_Atomic int data_fd; /* -1: an object that no I/O has opened yet */
	struct pmem *pmem;   /* it grows in persistent memory; else NULL */
	bool create;        /* the object may not exist yet */
	/* Its directory entries, or attributes of a growing file, were not fsynced. */
	_Atomic bool entries_dirty;
};

struct handle {
	struct handle *next;
	uint64_t fh;
	uint32_t error_seq_seen;
};

/* What was read of a file in the second that runs, and in the one before it.
 * Relaxed: a read at the turn of a second may count for either. */
struct read_rate {
	_Atomic uint64_t second;
	_Atomic uint64_t bytes, bytes_before;
};

struct file {
	_Atomic int refs;
	struct file *bucket_next;
	struct front *front;
	uint64_t ino;
	struct read_rate read_rate;
	/* How often the mode was set; and one more than that was when neither setuid
	 * nor setgid was seen, 0 when that is not known. */
	_Atomic uint32_t mode_changes, no_suid_at;
	_Atomic uint64_t looks; /* at what it has allocated, after a change */

	pthread_mutex_t lock; /* all below */
	struct backing *backing;
	struct backing *prepared;
	bool gate_closed;
	bool starving;     /* Python was told of the lack of room */
	bool growing;      /* a job makes it grow ahead of its writer */
	bool told_written; /* EVENT_WRITTEN was put */
	unsigned changes;  /* WRITE, FALLOCATE, truncate, FSYNC under way */
	struct request *parked, **parked_tail;
	int64_t counted_bytes; /* what the device's used_bytes holds of it */
	uint64_t look_counted; /* the one of `looks` that found so much */
	uint32_t nlink;    /* with a shadow: links of the stub */
	int64_t changed_from, changed_to; /* since a copy has looked; from > to: nothing */
	int64_t cut_to; /* smallest size since then; INT64_MAX */
	uint64_t changed_seq; /* counts changes of the bytes or the size */
	uint64_t synced_seq;  /* the last of them that an fsync covered */
	uint32_t error_seq;
	int error;         /* of the last fsync that failed */
	bool error_seen;
	struct handle *handles;
};

/* Both take their descriptors over, on failure (NULL, errno) too.  synced:
 * nothing of the object waits for an fsync, whoever wrote it. */
struct backing *backing_plain(struct device *dev, int data_fd);
struct backing *backing_object(struct device *dev, int shadow_fd, int data_fd,
			       const char *object, bool create, bool synced);
/* A plain file that grows in persistent memory; takes p over as well. */
struct backing *backing_growing(struct device *dev, int data_fd, struct pmem *p);
struct backing *backing_ref(struct backing *b);
void backing_unref(struct backing *b);
/* Where the attributes are. */
int backing_attr_fd(const struct backing *b);

/* Registers the file under ino; takes the backing over. NULL: no memory, or
 * EEXIST. */
struct file *file_open(struct front *f, uint64_t ino, struct backing *b);
struct file *file_find(struct front *f, uint64_t ino); /* takes a reference */
struct file *file_ref(struct file *file);
void file_unref(struct file *file);
/* No request finds it any more; the owner's reference is dropped. */
void file_close(struct file *file);
struct backing *file_backing(struct file *file); /* takes a reference */

/* Of the file as callers see it; 0 or -errno. */
int file_stat(struct file *file, struct stat *st);

/* Enters a change, unless the gate is closed: then r is parked (if any). */
bool file_enter(struct file *file, struct request *r);
void file_leave(struct file *file);
/* Leaves the change and parks r until Python has done what event asks for:
 * made room, or sealed the file. */
void file_leave_for(struct file *file, struct request *r, enum event_kind event);

/* True when quiet at once; else EVENT_QUIET follows. */
bool file_close_gate(struct file *file);
/* Only with the gate closed and quiet; takes the backing over. */
void file_repoint(struct file *file, struct backing *b);
/* The same without asking the device, which may hang, what b has allocated. */
void file_repoint_counted(struct file *file, struct backing *b, int64_t allocated);
/* As file_repoint, in two steps: what takes its time, and what must not happen
 * while others use the descriptors of the old backing. */
void file_prepare(struct file *file, struct backing *b);
void file_switch(struct file *file);
/* Opens the gate; all that was parked goes on. */
void file_open_gate(struct file *file);
/* Answers what waits for room with error, 0: lets it try again. */
void file_end_starving(struct file *file, int error);

/* Brings the device's used_bytes up to date after a change for which
 * reserved bytes had been taken. */
void file_settle(struct file *file, struct backing *b, int64_t reserved);

/* The backing was opened just now: what it has allocated counts already. */
void file_count(struct file *file, struct backing *b);

/* Bytes were read through the daemon; not those that the page cache had. */
void file_note_read(struct file *file, uint64_t bytes, uint64_t now_ns);
/* Bytes a second, of this second or the last, whichever had more. */
uint64_t file_read_rate(struct file *file, uint64_t now_ns);

/* True the first time. */
bool file_first_write(struct file *file);
/* One job at a time makes a file grow ahead of its writer. */
bool file_begin_growing(struct file *file);
void file_end_growing(struct file *file);

/* Bytes from..to, or the size, changed: fsync has something to do, and so has
 * who copies the file meanwhile. */
void file_mark_changed(struct file *file, int64_t from, int64_t to);
/* The file was cut to size, or made longer up to there. */
void file_mark_truncated(struct file *file, int64_t size);
/* The range that has changed since the last call, and the smallest size that
 * the file had meanwhile (INT64_MAX: it was not truncated): a copy has to be
 * cut to that first.  False: nothing. */
bool file_take_changes(struct file *file, int64_t *from, int64_t *to, int64_t *cut);
bool file_gate_is_open(struct file *file);
/* True when there is something to sync; *seq is for file_synced. */
bool file_unsynced(struct file *file, uint64_t *seq);
/* An fsync that began at seq has ended; error 0 or a positive errno, which
 * every handle that is open now will see once. */
void file_synced(struct file *file, uint64_t seq, int error);

/* A failed fsync that no handle has seen. */
bool file_error_unseen(struct file *file);
/* Whether an fsync of it has failed: the kernel calls clean what is not on the
 * device. */
bool file_sync_failed(struct file *file);
/* A handle opened after a failed fsync that nobody has seen sees it too. */
int file_add_handle(struct file *file, uint64_t fh);
unsigned file_remove_handle(struct file *file, uint64_t fh); /* handles left */
/* The error that this handle has yet to see, once; 0 when none. */
int file_handle_error(struct file *file, uint64_t fh);

#endif

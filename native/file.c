#define _GNU_SOURCE
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io.h"
#include "request.h"

/* XFS gives what it allocated ahead of the writer back at the last close. */
static void close_counted(struct backing *b, int data_fd)
{
	char path[32];
	struct stat before, after;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", data_fd);
	int pin = open(path, O_PATH | O_CLOEXEC);
	bool counted = pin >= 0 && fstat(data_fd, &before) == 0 && before.st_nlink > 0;
	close(data_fd);
	if (counted && fstat(pin, &after) == 0 && after.st_nlink > 0)
		device_release(b->dev, (int64_t)(before.st_blocks - after.st_blocks) * 512);
	if (pin >= 0)
		close(pin);
}

/* Closing the last descriptor of a removed file frees its blocks: 0.2 s for
 * 1 GiB.  Only a worker has that time. */
static void backing_close(struct job *job, char *scratch)
{
	struct backing *b = (struct backing *)job;
	int data_fd = atomic_load(&b->data_fd);

	(void)scratch;
	if (b->pmem != NULL)
		pmem_close(b->pmem);
	if (data_fd >= 0)
		close_counted(b, data_fd);
	if (b->shadow_fd >= 0)
		close(b->shadow_fd);
	pthread_mutex_destroy(&b->open_lock);
	pthread_mutex_destroy(&b->sync_lock);
	device_unref(b->dev);
	free(b->object);
	free(b);
}

static struct backing *backing_new(struct device *dev, int shadow_fd, int data_fd)
{
	struct backing *b = calloc(1, sizeof(*b));

	if (b == NULL) {
		if (data_fd >= 0)
			close(data_fd);
		if (shadow_fd >= 0)
			close(shadow_fd);
		errno = ENOMEM;
		return NULL;
	}
	b->close_job.run = backing_close;
	atomic_init(&b->refs, 1);
	atomic_init(&b->data_fd, data_fd);
	b->dev = device_ref(dev);
	b->shadow_fd = shadow_fd;
	pthread_mutex_init(&b->open_lock, NULL);
	pthread_mutex_init(&b->sync_lock, NULL);
	return b;
}

struct backing *backing_plain(struct device *dev, int data_fd)
{
	return backing_new(dev, -1, data_fd);
}

struct backing *backing_growing(struct device *dev, int data_fd, struct pmem *p)
{
	struct backing *b = backing_new(dev, -1, data_fd);

	if (b == NULL) {
		pmem_close(p);
		return NULL;
	}
	b->pmem = p;
	b->entries_dirty = true;
	return b;
}

struct backing *backing_object(struct device *dev, int shadow_fd, int data_fd,
			       const char *object, bool create, bool synced)
{
	struct backing *b = backing_new(dev, shadow_fd, data_fd);

	if (b == NULL)
		return NULL;
	b->object = strdup(object);
	b->create = create;
	b->entries_dirty = !synced;
	if (b->object == NULL) {
		backing_unref(b);
		errno = ENOMEM;
		return NULL;
	}
	return b;
}

struct backing *backing_ref(struct backing *b)
{
	atomic_fetch_add(&b->refs, 1);
	return b;
}

void backing_unref(struct backing *b)
{
	if (atomic_fetch_sub(&b->refs, 1) != 1)
		return;
	if (b->dev->workers != NULL)
		workers_submit(b->dev->workers, &b->close_job);
	else
		backing_close(&b->close_job, NULL);
}

int backing_attr_fd(const struct backing *b)
{
	return b->shadow_fd >= 0 ? b->shadow_fd : atomic_load(&b->data_fd);
}

static struct file **bucket(struct front *f, uint64_t ino)
{
	return &f->buckets[(ino * 0x9e3779b97f4a7c15u >> 32) % f->bucket_count];
}

static void grow_table(struct front *f)
{
	unsigned old_count = f->bucket_count;
	struct file **old = f->buckets;
	struct file **more = calloc(old_count * 2u, sizeof(*more));

	if (more == NULL)
		return; /* longer chains are slower, not wrong */
	f->buckets = more;
	f->bucket_count = old_count * 2;
	for (unsigned i = 0; i < old_count; i++) {
		struct file *next;
		for (struct file *file = old[i]; file != NULL; file = next) {
			next = file->bucket_next;
			struct file **head = bucket(f, file->ino);
			file->bucket_next = *head;
			*head = file;
		}
	}
	free(old);
}

static int64_t allocated_bytes(int fd)
{
	struct stat st;

	return fd >= 0 && fstat(fd, &st) == 0 ? (int64_t)st.st_blocks * 512 : 0;
}

struct file *file_open(struct front *f, uint64_t ino, struct backing *b)
{
	struct file *file = calloc(1, sizeof(*file)), *other;

	if (file == NULL) {
		backing_unref(b);
		errno = ENOMEM;
		return NULL;
	}
	atomic_init(&file->refs, 1);
	file->front = f;
	file->ino = ino;
	file->backing = b;
	file->parked_tail = &file->parked;
	file->changed_from = file->cut_to = INT64_MAX;
	file->changed_to = -1;
	file->nlink = 1;
	file->changed_seq = b->entries_dirty && b->object != NULL ? 1 : 0;
	file->counted_bytes = allocated_bytes(atomic_load(&b->data_fd));
	pthread_mutex_init(&file->lock, NULL);

	pthread_mutex_lock(&f->files_lock);
	struct file **head = bucket(f, ino);
	for (other = *head; other != NULL && other->ino != ino; other = other->bucket_next)
		;
	if (other == NULL) {
		file->bucket_next = *head;
		*head = file;
		if (++f->file_count > f->bucket_count)
			grow_table(f);
	}
	pthread_mutex_unlock(&f->files_lock);
	if (other != NULL) {
		file_unref(file);
		errno = EEXIST;
		return NULL;
	}
	return file;
}

struct file *file_find(struct front *f, uint64_t ino)
{
	struct file *file;

	pthread_mutex_lock(&f->files_lock);
	for (file = *bucket(f, ino); file != NULL && file->ino != ino; file = file->bucket_next)
		;
	if (file != NULL)
		file_ref(file);
	pthread_mutex_unlock(&f->files_lock);
	return file;
}

struct file *file_ref(struct file *file)
{
	atomic_fetch_add(&file->refs, 1);
	return file;
}

void file_unref(struct file *file)
{
	if (atomic_fetch_sub(&file->refs, 1) != 1)
		return;
	struct handle *next;
	for (struct handle *h = file->handles; h != NULL; h = next) {
		next = h->next;
		free(h);
	}
	backing_unref(file->backing);
	if (file->prepared != NULL)
		backing_unref(file->prepared);
	pthread_mutex_destroy(&file->lock);
	free(file);
}

void file_close(struct file *file)
{
	struct front *f = file->front;
	struct file **at;

	pthread_mutex_lock(&f->files_lock);
	for (at = bucket(f, file->ino); *at != file; at = &(*at)->bucket_next)
		;
	*at = file->bucket_next;
	f->file_count--;
	pthread_mutex_unlock(&f->files_lock);
	file_unref(file);
}

struct backing *file_backing(struct file *file)
{
	pthread_mutex_lock(&file->lock);
	struct backing *b = backing_ref(file->backing);
	pthread_mutex_unlock(&file->lock);
	return b;
}

static int backing_stat(struct file *file, struct backing *b, struct stat *st)
{
	int err = fstat(backing_attr_fd(b), st) == 0 ? 0 : -errno;

	if (err == 0 && b->pmem != NULL) {
		uint64_t mtime = pmem_mtime_ns(b->pmem);
		st->st_size = (off_t)pmem_size(b->pmem);
		st->st_blocks = (st->st_size + 511) / 512;
		st->st_mtim.tv_sec = (time_t)(mtime / 1000000000u);
		st->st_mtim.tv_nsec = (long)(mtime % 1000000000u);
	} else if (err == 0 && b->shadow_fd >= 0) {
		pthread_mutex_lock(&file->lock);
		/* Until its object is opened, the size is the best guess. */
		st->st_blocks = atomic_load(&b->data_fd) >= 0
					? file->counted_bytes / 512
					: (st->st_size + 511) / 512;
		st->st_nlink = file->nlink;
		pthread_mutex_unlock(&file->lock);
	}
	return err;
}

int file_stat(struct file *file, struct stat *st)
{
	struct backing *b, *now;
	int err;

	do { /* a plain file that began to grow meanwhile may look longer than it is */
		b = file_backing(file);
		err = backing_stat(file, b, st);
		now = file_backing(file);
		backing_unref(b);
		backing_unref(now);
	} while (now != b);
	return err;
}

static void park(struct file *file, struct request *r)
{
	atomic_store(&r->started, false);
	r->park_next = NULL;
	*file->parked_tail = r;
	file->parked_tail = &r->park_next;
}

bool file_enter(struct file *file, struct request *r)
{
	pthread_mutex_lock(&file->lock);
	bool entered = !file->gate_closed;
	if (entered)
		file->changes++;
	else if (r != NULL)
		park(file, r);
	pthread_mutex_unlock(&file->lock);
	return entered;
}

static void leave(struct file *file)
{
	if (--file->changes == 0 && file->gate_closed)
		events_put(file->front->events, EVENT_QUIET, file->ino, 0);
}

void file_leave(struct file *file)
{
	pthread_mutex_lock(&file->lock);
	leave(file);
	pthread_mutex_unlock(&file->lock);
}

void file_leave_for(struct file *file, struct request *r, enum event_kind event)
{
	pthread_mutex_lock(&file->lock);
	r->for_room = true;
	park(file, r);
	leave(file);
	if (!file->starving) {
		file->starving = true;
		events_put(file->front->events, event, file->ino, 0);
	}
	pthread_mutex_unlock(&file->lock);
}

bool file_close_gate(struct file *file)
{
	pthread_mutex_lock(&file->lock);
	file->gate_closed = true;
	bool quiet = file->changes == 0;
	pthread_mutex_unlock(&file->lock);
	return quiet;
}

void file_repoint(struct file *file, struct backing *b)
{
	file_repoint_counted(file, b, allocated_bytes(atomic_load(&b->data_fd)));
}

void file_repoint_counted(struct file *file, struct backing *b, int64_t allocated)
{
	pthread_mutex_lock(&file->lock);
	struct backing *old = file->backing;
	file->backing = b;
	file->counted_bytes = allocated;
	file->told_written = false;
	file->synced_seq = file->changed_seq; /* the copy was fsynced */
	pthread_mutex_unlock(&file->lock);
	backing_unref(old);
}

void file_prepare(struct file *file, struct backing *b)
{
	pthread_mutex_lock(&file->lock);
	struct backing *old = file->prepared;
	file->prepared = b;
	pthread_mutex_unlock(&file->lock);
	if (old != NULL)
		backing_unref(old);
}

void file_switch(struct file *file)
{
	pthread_mutex_lock(&file->lock);
	struct backing *b = file->prepared;
	file->prepared = NULL;
	pthread_mutex_unlock(&file->lock);
	if (b != NULL)
		file_repoint(file, b);
}

/* Takes the parked requests out: all, or those that wait for room. */
static struct request *unpark(struct file *file, bool only_for_room)
{
	struct request *out = NULL, **out_tail = &out, *r, *next;

	r = file->parked;
	file->parked = NULL;
	file->parked_tail = &file->parked;
	for (; r != NULL; r = next) {
		next = r->park_next;
		if (only_for_room && !r->for_room) {
			park(file, r);
			continue;
		}
		r->park_next = NULL;
		*out_tail = r;
		out_tail = &r->park_next;
	}
	return out;
}

void file_open_gate(struct file *file)
{
	struct request *next;

	pthread_mutex_lock(&file->lock);
	file->gate_closed = false;
	file->starving = false;
	struct request *r = unpark(file, false);
	pthread_mutex_unlock(&file->lock);
	for (; r != NULL; r = next) {
		next = r->park_next;
		io_resubmit(r);
	}
}

void file_end_starving(struct file *file, int error)
{
	struct request *next;

	pthread_mutex_lock(&file->lock);
	file->starving = false;
	struct request *r = unpark(file, true);
	pthread_mutex_unlock(&file->lock);
	for (; r != NULL; r = next) {
		next = r->park_next;
		if (error == 0) {
			io_resubmit(r);
			continue;
		}
		request_reply(r, error, NULL, 0);
		request_free(r);
	}
}

void file_settle(struct file *file, struct backing *b, int64_t reserved)
{
	/* Not under the lock, which GETATTR takes: a network disk may hang in it.
	 * Of two that overtake each other the one that looked last knows of both. */
	uint64_t look = atomic_fetch_add(&file->looks, 1) + 1;
	int64_t now = allocated_bytes(atomic_load(&b->data_fd)), delta = 0;

	pthread_mutex_lock(&file->lock);
	if (b == file->backing && look > file->look_counted) {
		delta = now - file->counted_bytes;
		file->counted_bytes = now;
		file->look_counted = look;
	}
	pthread_mutex_unlock(&file->lock);
	device_release(b->dev, reserved - delta);
}

void file_count(struct file *file, struct backing *b)
{
	int64_t now = allocated_bytes(atomic_load(&b->data_fd));

	pthread_mutex_lock(&file->lock);
	/* A READ that a re-pointing overtook opens the old object. */
	if (b == file->backing)
		file->counted_bytes = now;
	pthread_mutex_unlock(&file->lock);
}

enum { NS_PER_S = 1000000000 };

void file_note_read(struct file *file, uint64_t bytes, uint64_t now_ns)
{
	struct read_rate *rate = &file->read_rate;
	uint64_t now = now_ns / NS_PER_S;
	uint64_t second = atomic_load_explicit(&rate->second, memory_order_relaxed);

	if (second < now && atomic_compare_exchange_strong(&rate->second, &second, now)) {
		uint64_t before = atomic_exchange(&rate->bytes, 0);
		atomic_store(&rate->bytes_before, second + 1 == now ? before : 0);
	}
	atomic_fetch_add_explicit(&rate->bytes, bytes, memory_order_relaxed);
}

uint64_t file_read_rate(struct file *file, uint64_t now_ns)
{
	struct read_rate *rate = &file->read_rate;
	uint64_t second = atomic_load(&rate->second), bytes = atomic_load(&rate->bytes);
	uint64_t before = atomic_load(&rate->bytes_before), now = now_ns / NS_PER_S;

	if (second + 1 < now)
		return 0;
	return second == now && before > bytes ? before : bytes;
}

bool file_first_write(struct file *file)
{
	pthread_mutex_lock(&file->lock);
	bool first = !file->told_written;
	file->told_written = true;
	pthread_mutex_unlock(&file->lock);
	return first;
}

bool file_begin_growing(struct file *file)
{
	pthread_mutex_lock(&file->lock);
	bool begun = !file->growing;
	file->growing = true;
	pthread_mutex_unlock(&file->lock);
	return begun;
}

void file_end_growing(struct file *file)
{
	pthread_mutex_lock(&file->lock);
	file->growing = false;
	pthread_mutex_unlock(&file->lock);
}

void file_mark_changed(struct file *file, int64_t from, int64_t to)
{
	pthread_mutex_lock(&file->lock);
	file->changed_seq++;
	if (from < file->changed_from)
		file->changed_from = from;
	if (to > file->changed_to)
		file->changed_to = to;
	pthread_mutex_unlock(&file->lock);
}

void file_mark_truncated(struct file *file, int64_t size)
{
	file_mark_changed(file, size, size);
	pthread_mutex_lock(&file->lock);
	if (size < file->cut_to)
		file->cut_to = size;
	pthread_mutex_unlock(&file->lock);
}

bool file_take_changes(struct file *file, int64_t *from, int64_t *to, int64_t *cut)
{
	pthread_mutex_lock(&file->lock);
	*from = file->changed_from;
	*to = file->changed_to;
	*cut = file->cut_to;
	file->changed_from = file->cut_to = INT64_MAX;
	file->changed_to = -1;
	pthread_mutex_unlock(&file->lock);
	return *from <= *to;
}

bool file_gate_is_open(struct file *file)
{
	pthread_mutex_lock(&file->lock);
	bool open = !file->gate_closed;
	pthread_mutex_unlock(&file->lock);
	return open;
}

bool file_unsynced(struct file *file, uint64_t *seq)
{
	pthread_mutex_lock(&file->lock);
	*seq = file->changed_seq;
	bool unsynced = file->synced_seq != file->changed_seq;
	pthread_mutex_unlock(&file->lock);
	return unsynced;
}

void file_synced(struct file *file, uint64_t seq, int error)
{
	pthread_mutex_lock(&file->lock);
	/* After a failure too: the kernel below has marked the pages clean, and
	 * a second fsync that "succeeds" would say nothing about them. */
	if (seq > file->synced_seq)
		file->synced_seq = seq;
	if (error != 0) {
		file->error = error;
		file->error_seq++;
		file->error_seen = false;
	}
	pthread_mutex_unlock(&file->lock);
	if (error != 0)
		events_put(file->front->events, EVENT_IO_ERROR, file->ino, error);
}

bool file_error_unseen(struct file *file)
{
	pthread_mutex_lock(&file->lock);
	bool unseen = file->error_seq > 0 && !file->error_seen;
	pthread_mutex_unlock(&file->lock);
	return unseen;
}

bool file_sync_failed(struct file *file)
{
	pthread_mutex_lock(&file->lock);
	bool failed = file->error_seq > 0;
	pthread_mutex_unlock(&file->lock);
	return failed;
}

int file_add_handle(struct file *file, uint64_t fh)
{
	struct handle *h = malloc(sizeof(*h));

	if (h == NULL)
		return -ENOMEM;
	pthread_mutex_lock(&file->lock);
	bool unseen = file->error_seq > 0 && !file->error_seen;
	*h = (struct handle){
		.next = file->handles,
		.fh = fh,
		.error_seq_seen = file->error_seq - (unseen ? 1 : 0),
	};
	file->handles = h;
	pthread_mutex_unlock(&file->lock);
	return 0;
}

unsigned file_remove_handle(struct file *file, uint64_t fh)
{
	struct handle *gone = NULL;
	unsigned left = 0;

	pthread_mutex_lock(&file->lock);
	for (struct handle **at = &file->handles; *at != NULL;) {
		if ((*at)->fh == fh && gone == NULL) {
			gone = *at;
			*at = gone->next;
			continue;
		}
		left++;
		at = &(*at)->next;
	}
	pthread_mutex_unlock(&file->lock);
	free(gone);
	return left;
}

int file_handle_error(struct file *file, uint64_t fh)
{
	int error = 0;

	pthread_mutex_lock(&file->lock);
	for (struct handle *h = file->handles; h != NULL; h = h->next) {
		if (h->fh != fh || h->error_seq_seen == file->error_seq)
			continue;
		h->error_seq_seen = file->error_seq;
		file->error_seen = true;
		error = file->error;
	}
	pthread_mutex_unlock(&file->lock);
	return error;
}

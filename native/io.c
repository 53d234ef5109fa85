#define _GNU_SOURCE
#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "object.h"
#include "request.h"
#include "sys.h"

/* How long the kernel may keep attributes: the daemon is the only writer and
 * invalidates what it changes by itself. */
enum { ATTR_VALID_S = 3600 };

/* One operation under way.  r is NULL as long as it runs in the thread that
 * read it, on that thread's buffers. */
struct io {
	struct front *f;
	struct file *file;
	struct request *r;
	const struct fuse_in_header *in;
	const void *arg;
	const char *payload;
	char *scratch;
	struct backing *b;
	uint64_t began_ns;
};

/* An operation answers its request, passes it on, or leaves it to the session. */
enum io_result {
	IO_DONE,     /* answered */
	IO_PASSED,   /* parked, or given to a worker: no longer ours */
	IO_DECLINED, /* for the session after all */
};

/* Before the answer: who asks afterwards finds it counted. */
static void count(struct io *io)
{
	latency_add(&io->b->dev->latency, io->in->opcode, monotonic_ns() - io->began_ns);
}

static enum io_result answer(struct io *io, int error, const void *data, size_t len)
{
	count(io);
	if (io->r != NULL)
		request_reply(io->r, error, data, len);
	else
		front_reply(io->f, io->in->unique, error, data, len);
	return IO_DONE;
}

static void run_job(struct job *job, char *scratch);

/* The request leaves the buffer it was read into. */
static bool detach(struct io *io)
{
	if (io->r == NULL) {
		io->r = request_new(io->f, io->file, io->in);
		if (io->r != NULL) {
			io->r->began_ns = io->began_ns;
			io->r->job.run = run_job;
		}
	}
	return io->r != NULL;
}

static enum io_result to_worker(struct io *io)
{
	if (!detach(io))
		return answer(io, ENOMEM, NULL, 0);
	if (io->b->dev->workers == NULL) /* stopped: the mount is ending */
		return answer(io, ENODEV, NULL, 0);
	io->r->dev = io->b->dev;
	atomic_store(&io->r->started, false); /* it may be given up while it queues */
	workers_submit(io->b->dev->workers, &io->r->job);
	return IO_PASSED;
}

/* Only workers may block on this device. */
static bool must_defer(const struct io *io)
{
	return io->r == NULL && io->b->dev->slow;
}

/* As must_defer, for what a fast device may make wait too: fsync, allocation
 * and synchronous writes.  Memory never does. */
static bool should_defer(const struct io *io)
{
	return io->r == NULL && !io->b->dev->memory;
}

static size_t within_size(const struct pmem *p, uint64_t offset, size_t want)
{
	uint64_t size = pmem_size(p);

	if (offset >= size)
		return 0;
	return want < size - offset ? want : (size_t)(size - offset);
}

/* What was read from a plain file that has begun to grow meanwhile may end in
 * zeros that are not part of it. */
static size_t still_visible(struct io *io, uint64_t offset, size_t done)
{
	struct backing *b = file_backing(io->file);

	if (b != io->b && b->pmem != NULL)
		done = within_size(b->pmem, offset, done);
	backing_unref(b);
	return done;
}

static enum io_result read_(struct io *io)
{
	const struct fuse_read_in *arg = io->arg;
	size_t want = arg->size < IO_BYTES_MAX ? arg->size : IO_BYTES_MAX, done = 0;

	if (must_defer(io))
		return to_worker(io);
	int err = object_open(io->file, io->b);
	if (err < 0)
		return answer(io, -err, NULL, 0);
	int fd = atomic_load(&io->b->data_fd);
	if (io->b->pmem != NULL)
		want = within_size(io->b->pmem, arg->offset, want);
	while (done < want) {
		struct iovec iov = {io->scratch + done, want - done};
		ssize_t n = preadv2(fd, &iov, 1, (off_t)(arg->offset + done),
				    should_defer(io) ? RWF_NOWAIT : 0);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && io->r == NULL && (errno == EAGAIN || errno == EOPNOTSUPP))
			return to_worker(io); /* not in the page cache */
		if (n < 0) {
			events_put(io->f->events, EVENT_IO_ERROR, io->file->ino, errno);
			return answer(io, errno, NULL, 0);
		}
		if (n == 0)
			break;
		done += (size_t)n;
	}
	if (io->b->dev->sizes != NULL)
		done = still_visible(io, arg->offset, done);
	file_note_read(io->file, done, io->began_ns);
	return answer(io, 0, io->scratch, done);
}

/* Room that the device does not have is not needed where blocks are already
 * allocated: an overwrite succeeds on a full device. */
static bool is_allocated(int fd, off_t offset, off_t end)
{
	off_t data = lseek(fd, offset, SEEK_DATA);

	return data == offset && lseek(fd, offset, SEEK_HOLE) >= end;
}

static int write_all(int fd, const char *data, size_t len, off_t offset, bool durable)
{
	for (size_t done = 0; done < len;) {
		struct iovec iov = {(void *)(data + done), len - done};
		ssize_t n = pwritev2(fd, &iov, 1, offset + (off_t)done, durable ? RWF_DSYNC : 0);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		done += (size_t)n;
	}
	return 0;
}

/* setuid and setgid go before the first byte changes.  The kernel sees to that by a SETATTR, but
 * for a write that bypasses its cache: there it only says so. */
static int drop_privileges(struct file *file, struct backing *b, const struct fuse_write_in *arg)
{
	int fds[] = {backing_attr_fd(b), atomic_load(&b->data_fd)};
	struct stat st;

	/* That is said of each write of a broker that is not root. */
	uint32_t changes = atomic_load(&file->mode_changes);

	if (!(arg->write_flags & FUSE_WRITE_KILL_SUIDGID) ||
	    atomic_load(&file->no_suid_at) == changes + 1)
		return 0;
	if (fstat(fds[0], &st) != 0)
		return -errno;
	mode_t mode = st.st_mode & (mode_t)~S_ISUID;
	if (mode & S_IXGRP)
		mode &= (mode_t)~S_ISGID;
	if (mode == st.st_mode) {
		atomic_store(&file->no_suid_at, changes + 1);
		return 0;
	}
	for (unsigned i = 0; i < (b->shadow_fd >= 0 ? 2 : 1); i++)
		if (fchmod(fds[i], mode & 07777) != 0)
			return -errno;
	return 0;
}

static bool is_full(int err)
{
	return err == -ENOSPC || err == -EDQUOT;
}

/* Who waits for room and tries again would be told success by the next sync,
 * whatever the first one has lost. */
static int sync_failed(int error)
{
	return is_full(-error) ? -EIO : -error;
}

/* Writes to the backing and, in power mode, makes it durable. */
static int write_backing(struct io *io, const struct fuse_write_in *arg)
{
	struct backing *b = io->b;
	off_t offset = (off_t)arg->offset;
	bool grew = false;
	int err = drop_privileges(io->file, b, arg);

	if (err < 0)
		return err;
	err = write_all(atomic_load(&b->data_fd), io->payload, arg->size, offset, b->dev->power);
	file_mark_changed(io->file, offset, offset + arg->size);
	if (err < 0 || b->shadow_fd < 0)
		return err;
	err = object_sync_entries(b);
	if (err < 0)
		return sync_failed(-err);
	err = object_touch_shadow(io->file, b, offset + arg->size, &grew);
	if (err < 0 || !b->dev->power)
		return err;
	return grew && fdatasync(b->shadow_fd) != 0 ? sync_failed(errno) : 0;
}

static enum io_result park_for(struct io *io, enum event_kind event)
{
	if (!detach(io)) {
		file_leave(io->file);
		return answer(io, ENOMEM, NULL, 0);
	}
	file_leave_for(io->file, io->r, event);
	return IO_PASSED;
}

static enum io_result park_for_room(struct io *io)
{
	return park_for(io, EVENT_NO_ROOM);
}

/* Enters a change with the data open.  On false the request was answered or
 * passed on, as *result tells. */
static bool enter_change(struct io *io, enum io_result *result)
{
	if (!file_enter(io->file, io->r)) {
		/* A worker will find the gate open, or park it. */
		*result = io->r == NULL ? to_worker(io) : IO_PASSED;
		return false;
	}
	struct backing *now = file_backing(io->file);
	bool moved = now != io->b;
	backing_unref(io->b);
	io->b = now;
	if (moved) { /* this thread may not be one that may block there */
		file_leave(io->file);
		*result = to_worker(io);
		return false;
	}
	int err = object_open(io->file, io->b);
	if (err == 0)
		return true;
	if (is_full(err) && io->in->opcode != FUSE_FSYNC) { /* no room for a new object */
		*result = park_for_room(io);
		return false;
	}
	file_leave(io->file);
	*result = answer(io, -err, NULL, 0);
	return false;
}

/* -- files that grow in persistent memory ------------------------------------ */

/* So much at a time: as much again as it has, within bounds. */
enum { GROW_MIN = 2 << 20, GROW_MAX = 32 << 20 };

static uint64_t growth(const struct pmem *p)
{
	uint64_t size = pmem_size(p);

	return size < GROW_MIN ? GROW_MIN : size > GROW_MAX ? GROW_MAX : size;
}

/* Where to grow to ahead of the writer: not beyond where it will roll. */
static uint64_t growth_end(const struct backing *b)
{
	uint64_t capacity = pmem_capacity(b->pmem), end = capacity + growth(b->pmem);
	uint64_t segment = atomic_load(&b->dev->segment_bytes);

	if (segment == 0 || end <= segment)
		return end;
	return capacity < segment ? segment : capacity + GROW_MIN;
}

/* Up to end; -ENOSPC when the device has no room.  Within a change. */
static int grow(struct file *file, struct backing *b, uint64_t end)
{
	uint64_t capacity = pmem_capacity(b->pmem);
	int64_t reserved = end > capacity ? (int64_t)(end - capacity) : 0;

	if (!device_reserve(b->dev, reserved))
		return -ENOSPC;
	int err = pmem_grow(b->pmem, end);
	file_settle(file, b, reserved);
	return err;
}

struct grow_ahead {
	struct job job; /* first */
	struct file *file;
};

static void run_grow_ahead(struct job *job, char *scratch)
{
	struct grow_ahead *g = (struct grow_ahead *)job;

	(void)scratch;
	if (file_enter(g->file, NULL)) {
		struct backing *b = file_backing(g->file);
		int err = b->pmem != NULL ? grow(g->file, b, growth_end(b)) : 0;
		/* Without room the writer will find out.  EIO may be the error of an
		 * fdatasync, which the kernel tells once: so do we. */
		if (err == -EIO)
			file_synced(g->file, 0, -err);
		backing_unref(b);
		file_leave(g->file);
	}
	file_end_growing(g->file);
	file_unref(g->file);
	free(g);
}

/* The writer shall not wait for it: half of what was added last is left.  One
 * that has all it is expected to need rolls, or waits once. */
static void grow_ahead_if_need_be(struct io *io, uint64_t end)
{
	struct pmem *p = io->b->pmem;
	uint64_t capacity = pmem_capacity(p);
	uint64_t segment = atomic_load(&io->b->dev->segment_bytes);

	if (capacity == segment || end + growth(p) / 2 < capacity || io->b->dev->workers == NULL ||
	    !file_begin_growing(io->file))
		return;
	struct grow_ahead *g = malloc(sizeof(*g));
	if (g == NULL) {
		file_end_growing(io->file);
		return;
	}
	*g = (struct grow_ahead){.job.run = run_grow_ahead, .file = file_ref(io->file)};
	workers_submit(io->b->dev->workers, &g->job);
}

static enum io_result write_growing(struct io *io, const struct fuse_write_in *arg)
{
	struct fuse_write_out out = {.size = arg->size};
	uint64_t end = arg->offset + arg->size;
	enum io_result result;

	if (!enter_change(io, &result))
		return result;
	if (arg->offset > pmem_size(io->b->pmem)) /* only plain files have holes */
		return park_for(io, EVENT_SEAL);
	int err = drop_privileges(io->file, io->b, arg);
	if (err == 0)
		err = pmem_write(io->b->pmem, io->payload, arg->size, arg->offset);
	if (err == -EAGAIN && io->r == NULL) {
		file_leave(io->file);
		return to_worker(io);
	}
	if (err == -EAGAIN) {
		err = grow(io->file, io->b, end);
		if (err == 0)
			err = pmem_write(io->b->pmem, io->payload, arg->size, arg->offset);
	}
	if (is_full(err))
		return park_for_room(io);
	if (err == -EFBIG) /* no window is so large: as any other file */
		return park_for(io, EVENT_SEAL);
	if (err == 0) {
		file_mark_changed(io->file, (int64_t)arg->offset, (int64_t)end);
		grow_ahead_if_need_be(io, end);
	}
	file_leave(io->file);
	if (err < 0) {
		events_put(io->f->events, EVENT_IO_ERROR, io->file->ino, -err);
		return answer(io, -err, NULL, 0);
	}
	return answer(io, 0, &out, sizeof(out));
}

int io_grow(struct file *file, uint64_t end)
{
	struct backing *b = file_backing(file);
	int err = b->pmem != NULL ? grow(file, b, end) : -EINVAL;

	backing_unref(b);
	return err;
}

int io_start_growing(struct file *file, unsigned number)
{
	struct backing *b = file_backing(file), *growing = NULL;
	int fd = fcntl(atomic_load(&b->data_fd), F_DUPFD_CLOEXEC, 0);
	int err = fd < 0 ? -errno : 0;

	if (err < 0)
		sizes_give_back(b->dev->sizes, number);
	struct pmem *p = err < 0 ? NULL : pmem_open(fd, b->dev->sizes, number, b->dev->map_sync);
	if (err == 0 && p == NULL) {
		err = -errno;
		close(fd);
	}
	if (p != NULL) {
		growing = backing_growing(b->dev, fd, p);
		err = growing == NULL ? -errno : 0;
	}
	if (growing != NULL)
		file_prepare(file, growing);
	backing_unref(b);
	return err;
}

int io_seal(struct file *file)
{
	struct backing *b = file_backing(file), *plain = NULL;
	int err = 0;

	if (b->pmem != NULL) {
		/* What may fail comes before the seal, which cannot be undone. */
		int fd = fcntl(atomic_load(&b->data_fd), F_DUPFD_CLOEXEC, 0);
		plain = fd < 0 ? NULL : backing_plain(b->dev, fd);
		err = plain == NULL ? -errno : pmem_seal(b->pmem);
	}
	if (plain != NULL && err == 0) {
		file_settle(file, b, 0); /* the tail is given back */
		file_prepare(file, plain);
	} else if (plain != NULL) {
		backing_unref(plain);
	}
	backing_unref(b);
	return err;
}

static enum io_result write_(struct io *io)
{
	const struct fuse_write_in *arg = io->arg;
	struct fuse_write_out out = {.size = arg->size};
	enum io_result result;

	if (io->b->pmem != NULL)
		return write_growing(io, arg);
	if (must_defer(io) || (io->b->dev->power && should_defer(io)))
		return to_worker(io);
	if (!enter_change(io, &result))
		return result;
	int fd = atomic_load(&io->b->data_fd);
	int64_t reserved = arg->size;
	if (!device_reserve(io->b->dev, reserved)) {
		reserved = 0;
		if (!is_allocated(fd, (off_t)arg->offset, (off_t)(arg->offset + arg->size)))
			return park_for_room(io);
	}
	int err = write_backing(io, arg);
	file_settle(io->file, io->b, reserved);
	if (io->b->dev->sizes != NULL && io->b->shadow_fd < 0 && file_first_write(io->file))
		events_put(io->f->events, EVENT_WRITTEN, io->file->ino, 0);
	if (is_full(err))
		return park_for_room(io);
	file_leave(io->file);
	if (err < 0) {
		events_put(io->f->events, EVENT_IO_ERROR, io->file->ino, -err);
		return answer(io, -err, NULL, 0);
	}
	return answer(io, 0, &out, sizeof(out));
}

/* What is written to it is durable at once, and its entry has been synced. */
static bool is_durable(const struct backing *b)
{
	return b->pmem != NULL && b->dev->map_sync && !b->entries_dirty;
}

static int sync_opened(struct backing *b, bool data_only)
{
	int fd = atomic_load(&b->data_fd);

	if (b->object == NULL)
		b->entries_dirty = false; /* before: what changes meanwhile is not covered */
	if ((data_only ? fdatasync(fd) : fsync(fd)) != 0) {
		b->entries_dirty = true;
		return -errno;
	}
	if (b->shadow_fd >= 0 && fsync(b->shadow_fd) != 0)
		return -errno;
	/* The entries of an object are durable since it has a length. */
	return b->pmem != NULL && sizes_sync(b->dev->sizes) < 0 ? -EIO : 0;
}

static int sync_locked(struct file *file, struct backing *b, bool data_only)
{
	uint64_t seq;

	/* A clean file on a slow device costs nothing: Kafka fsyncs every
	 * segment when it stops. */
	if (!file_unsynced(file, &seq) && b->shadow_fd >= 0)
		return 0;
	if (is_durable(b))
		return 0;
	/* A failure to open it is one as any other: who closes the file does not
	 * try again, and the next one sees it. */
	int err = object_open(file, b);
	if (err == 0)
		err = sync_opened(b, data_only);
	file_synced(file, seq, -err);
	return err;
}

/* One at a time: the kernel reports a failure to one fsync of a descriptor, and
 * one that overlapped it would take its own success for the data's. */
static int sync_backing(struct file *file, struct backing *b, bool data_only)
{
	pthread_mutex_lock(&b->sync_lock);
	int err = sync_locked(file, b, data_only);
	pthread_mutex_unlock(&b->sync_lock);
	return err;
}

static enum io_result fsync_(struct io *io)
{
	const struct fuse_fsync_in *arg = io->arg;
	enum io_result result;
	uint64_t seq;

	/* A clean file on a slow device: nothing there may be touched. */
	if (must_defer(io) && !file_unsynced(io->file, &seq) && file_gate_is_open(io->file))
		return answer(io, file_handle_error(io->file, arg->fh), NULL, 0);
	/* What was written there is durable, and so is the file since its first fsync. */
	if (is_durable(io->b))
		return answer(io, file_handle_error(io->file, arg->fh), NULL, 0);
	if (should_defer(io))
		return to_worker(io);
	if (!enter_change(io, &result))
		return result;
	int err = sync_backing(io->file, io->b, arg->fsync_flags & FUSE_FSYNC_FDATASYNC);
	file_leave(io->file);
	/* Who was killed while it hung has seen no error: the next one shall. */
	if (io->r != NULL && !request_claim(io->r))
		return IO_DONE;
	count(io);
	int unseen = file_handle_error(io->file, arg->fh);
	front_reply(io->f, io->in->unique, unseen != 0 ? unseen : -err, NULL, 0);
	return IO_DONE;
}

static enum io_result flush(struct io *io)
{
	/* Nothing is kept back until close: the kernel need not ask again. */
	return answer(io, ENOSYS, NULL, 0);
}

static void to_fuse_attr(uint64_t ino, const struct stat *st, struct fuse_attr *attr)
{
	*attr = (struct fuse_attr){
		.ino = ino,
		.size = (uint64_t)st->st_size,
		.blocks = (uint64_t)st->st_blocks,
		.atime = (uint64_t)st->st_atim.tv_sec,
		.mtime = (uint64_t)st->st_mtim.tv_sec,
		.ctime = (uint64_t)st->st_ctim.tv_sec,
		.atimensec = (uint32_t)st->st_atim.tv_nsec,
		.mtimensec = (uint32_t)st->st_mtim.tv_nsec,
		.ctimensec = (uint32_t)st->st_ctim.tv_nsec,
		.mode = st->st_mode,
		.nlink = (uint32_t)st->st_nlink,
		.uid = st->st_uid,
		.gid = st->st_gid,
		.blksize = 4096,
	};
}

static enum io_result getattr(struct io *io)
{
	struct fuse_attr_out out = {.attr_valid = ATTR_VALID_S};
	struct stat st;
	int err = file_stat(io->file, &st);

	if (err < 0)
		return answer(io, -err, NULL, 0);
	to_fuse_attr(io->file->ino, &st, &out.attr);
	return answer(io, 0, &out, sizeof(out));
}

static int truncate_backing(struct file *file, struct backing *b, int64_t size)
{
	int err = object_open(file, b);

	if (err < 0)
		return err;
	if (sys_truncate(atomic_load(&b->data_fd), size) != 0)
		return -errno;
	file_mark_truncated(file, size);
	file_settle(file, b, 0);
	if (b->shadow_fd < 0)
		return 0;
	/* The object first: after a crash in between it wins. */
	err = size > 0 ? object_sync_entries(b) : 0;
	if (err == 0 && sys_truncate(b->shadow_fd, size) != 0)
		err = -errno;
	return err;
}

/* Freeing more than this takes its time. */
enum { LONG_FREE_BYTES = 16 << 20 };

/* A truncation for which the session has nothing to decide: of a plain file
 * with the gate open, and without so much to free that it takes its time. */
static int truncate_here(struct io *io, int64_t size)
{
	int err = -EAGAIN;

	if (!file_enter(io->file, NULL))
		return err;
	struct backing *now = file_backing(io->file);
	struct stat st;
	int fd = atomic_load(&now->data_fd);
	if (now->shadow_fd < 0 && now->pmem == NULL && !now->dev->slow && fstat(fd, &st) == 0 &&
	    (int64_t)st.st_blocks * 512 <= LONG_FREE_BYTES)
		err = truncate_backing(io->file, now, size);
	backing_unref(now);
	file_leave(io->file);
	return err;
}

enum {
	SETATTR_SIZE_ONLY = FATTR_SIZE | FATTR_FH | FATTR_LOCKOWNER | FATTR_MTIME |
			    FATTR_MTIME_NOW,
};

static enum io_result setattr(struct io *io)
{
	const struct fuse_setattr_in *arg = io->arg;
	bool size_only = arg->valid & FATTR_SIZE && !(arg->valid & ~(uint32_t)SETATTR_SIZE_ONLY) &&
			 (!(arg->valid & FATTR_MTIME) || arg->valid & FATTR_MTIME_NOW);

	if (!size_only || truncate_here(io, (int64_t)arg->size) != 0)
		return IO_DECLINED;
	return getattr(io);
}

enum { FALLOCATE_MODES = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE };

static int fallocate_backing(struct io *io, const struct fuse_fallocate_in *arg)
{
	struct backing *b = io->b;
	bool grew;

	if (fallocate(atomic_load(&b->data_fd), (int)arg->mode, (off_t)arg->offset,
		      (off_t)arg->length) != 0)
		return -errno;
	file_mark_changed(io->file, (int64_t)arg->offset, (int64_t)(arg->offset + arg->length));
	if (b->shadow_fd < 0)
		return 0;
	int64_t end = arg->mode & FALLOC_FL_KEEP_SIZE ? 0
						      : (int64_t)(arg->offset + arg->length);
	int err = object_sync_entries(b);
	return err < 0 ? err : object_touch_shadow(io->file, b, end, &grew);
}

static enum io_result fallocate_(struct io *io)
{
	const struct fuse_fallocate_in *arg = io->arg;
	int64_t reserved = arg->mode & FALLOC_FL_PUNCH_HOLE ? 0 : (int64_t)arg->length;
	enum io_result result;

	if (arg->mode & ~(uint32_t)FALLOCATE_MODES)
		return answer(io, EOPNOTSUPP, NULL, 0);
	if (must_defer(io) || should_defer(io))
		return to_worker(io);
	if (!enter_change(io, &result))
		return result;
	if (io->b->pmem != NULL) /* only plain files have holes */
		return park_for(io, EVENT_SEAL);
	if (!device_reserve(io->b->dev, reserved))
		return park_for_room(io);
	int err = fallocate_backing(io, arg);
	file_settle(io->file, io->b, reserved);
	if (is_full(err))
		return park_for_room(io);
	file_leave(io->file);
	return answer(io, -err, NULL, 0);
}

static enum io_result lseek_(struct io *io)
{
	const struct fuse_lseek_in *arg = io->arg;
	struct fuse_lseek_out out;

	if (must_defer(io))
		return to_worker(io);
	int err = object_open(io->file, io->b);
	if (err < 0)
		return answer(io, -err, NULL, 0);
	off_t at = lseek(atomic_load(&io->b->data_fd), (off_t)arg->offset, (int)arg->whence);
	if (at < 0)
		return answer(io, errno, NULL, 0);
	if (io->b->pmem != NULL) { /* what is allocated ahead is not there */
		off_t size = (off_t)pmem_size(io->b->pmem);
		if ((off_t)arg->offset >= size)
			return answer(io, ENXIO, NULL, 0);
		at = at < size ? at : size;
	}
	out.offset = (uint64_t)at;
	return answer(io, 0, &out, sizeof(out));
}

/* Between plain files with room for the result; for all else EOPNOTSUPP makes
 * the kernel copy by READ and WRITE, which can wait and spill. */
static ssize_t copy_plain(struct io *io, struct file *to_file,
			  const struct fuse_copy_file_range_in *arg)
{
	struct backing *to = file_backing(to_file);
	ssize_t copied = -EOPNOTSUPP;
	off_t from_off = (off_t)arg->off_in, to_off = (off_t)arg->off_out;
	int64_t reserved = arg->len < IO_BYTES_MAX ? (int64_t)arg->len : IO_BYTES_MAX;

	if (io->b->shadow_fd < 0 && io->b->pmem == NULL && to->shadow_fd < 0 &&
	    to->pmem == NULL && !to->dev->power &&
	    device_reserve(to->dev, reserved)) {
		copied = copy_file_range(atomic_load(&io->b->data_fd), &from_off,
					 atomic_load(&to->data_fd), &to_off,
					 (size_t)reserved, 0);
		if (copied < 0)
			copied = errno == EXDEV || is_full(-errno) ? -EOPNOTSUPP : -errno;
		file_mark_changed(to_file, (int64_t)arg->off_out,
				  (int64_t)arg->off_out + reserved);
		file_settle(to_file, to, reserved);
	}
	backing_unref(to);
	return copied;
}

static enum io_result copy_file_range_(struct io *io)
{
	const struct fuse_copy_file_range_in *arg = io->arg;
	struct fuse_write_out out = {0};

	if (must_defer(io) || should_defer(io))
		return to_worker(io);
	struct file *to = file_find(io->f, arg->nodeid_out);
	if (to == NULL)
		return answer(io, EBADF, NULL, 0);
	ssize_t copied = -EOPNOTSUPP;
	if (file_enter(to, NULL)) {
		copied = copy_plain(io, to, arg);
		file_leave(to);
	}
	file_unref(to);
	if (copied < 0)
		return answer(io, (int)-copied, NULL, 0);
	out.size = (uint32_t)copied;
	return answer(io, 0, &out, sizeof(out));
}

typedef enum io_result operation(struct io *io);

static operation *operation_of(uint32_t opcode)
{
	switch (opcode) {
	case FUSE_READ: return read_;
	case FUSE_WRITE: return write_;
	case FUSE_FSYNC: return fsync_;
	case FUSE_FLUSH: return flush;
	case FUSE_GETATTR: return getattr;
	case FUSE_SETATTR: return setattr;
	case FUSE_FALLOCATE: return fallocate_;
	case FUSE_LSEEK: return lseek_;
	case FUSE_COPY_FILE_RANGE: return copy_file_range_;
	default: return NULL;
	}
}

static enum io_result run(struct io *io)
{
	io->arg = io->in + 1;
	io->payload = (const char *)io->arg + sizeof(struct fuse_write_in);
	io->b = file_backing(io->file);
	/* Moved while it was queued: this worker may not block for the other. */
	bool elsewhere = io->r != NULL && io->r->dev != io->b->dev;
	enum io_result result = elsewhere ? to_worker(io) : operation_of(io->in->opcode)(io);
	backing_unref(io->b);
	return result;
}

static void run_job(struct job *job, char *scratch)
{
	struct request *r = (struct request *)job;
	struct io io = {.f = r->front, .file = r->file, .r = r, .in = r->in,
			.scratch = scratch, .began_ns = r->began_ns};

	r->for_room = false;
	if (!request_begin(r) || run(&io) == IO_DONE)
		request_free(r);
}

bool io_dispatch(struct front *f, const struct fuse_in_header *in, char *scratch)
{
	if (operation_of(in->opcode) == NULL)
		return false;
	struct file *file = file_find(f, in->nodeid);
	if (file == NULL)
		return false;
	struct io io = {.f = f, .file = file, .in = in, .scratch = scratch,
			.began_ns = monotonic_ns()};
	enum io_result result = run(&io);
	if (result == IO_DONE && io.r != NULL)
		request_free(io.r);
	file_unref(file);
	return result != IO_DECLINED;
}

void io_resubmit(struct request *r)
{
	struct backing *b = file_backing(r->file);

	r->dev = b->dev;
	r->job.run = run_job;
	if (b->dev->workers != NULL) {
		workers_submit(b->dev->workers, &r->job);
	} else {
		request_reply(r, ENODEV, NULL, 0);
		request_free(r);
	}
	backing_unref(b);
}

int io_truncate(struct file *file, int64_t size)
{
	if (!file_enter(file, NULL))
		return -EAGAIN;
	struct backing *b = file_backing(file);
	int err = b->pmem != NULL ? -EBUSY : truncate_backing(file, b, size);
	backing_unref(b);
	file_leave(file);
	return err;
}

/* A Kafka started on tree/ sees the object's times. */
static void copy_times(struct backing *b)
{
	struct stat shadow;
	int fd = atomic_load(&b->data_fd);

	if (b->shadow_fd >= 0 && fd >= 0 && fstat(b->shadow_fd, &shadow) == 0)
		(void)futimens(fd, (struct timespec[]){shadow.st_atim, shadow.st_mtim});
}

int io_sync_at_gate(struct file *file)
{
	struct backing *b = file_backing(file);
	uint64_t seq;
	int err = file_unsynced(file, &seq) ? sync_backing(file, b, false) : 0;

	backing_unref(b);
	return err;
}

int io_sync(struct file *file)
{
	if (!file_enter(file, NULL))
		return -EAGAIN;
	struct backing *b = file_backing(file);
	copy_times(b);
	int err = sync_backing(file, b, false);
	backing_unref(b);
	file_leave(file);
	return err;
}

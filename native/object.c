#define _GNU_SOURCE
#include "object.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "sys.h"

/* Searched by a Kafka that runs on tree/, listed by nobody. */
enum { OBJECT_DIR_MODE = 0711 };

/* After that objects/ itself is gone. */
enum { CREATE_TRIES = 8 };

static int reconcile(struct file *file, struct backing *b, int data_fd)
{
	struct stat object, shadow;

	if (fstat(data_fd, &object) != 0 || fstat(b->shadow_fd, &shadow) != 0)
		return -errno;
	/* Times alone tell nothing: a utimens may not have reached the object. */
	if (object.st_size == shadow.st_size)
		return 0;
	struct timespec times[2] = {object.st_atim, object.st_mtim};
	if (sys_truncate(b->shadow_fd, object.st_size) != 0 || futimens(b->shadow_fd, times) != 0)
		return -errno;
	events_put(file->front->events, EVENT_RECONCILED, file->ino, 0);
	return 0;
}

/* Makes the directory if need be and opens it, but no symlink; or -errno. */
static int descend(int dir, const char *name)
{
	if (mkdirat(dir, name, OBJECT_DIR_MODE) != 0 && errno != EEXIST)
		return -errno;
	int fd;

	do
		fd = openat(dir, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	while (fd < 0 && errno == EINTR);
	return fd < 0 ? -errno : fd;
}

int object_make_dirs(int dir_fd, const char *path)
{
	char name[NAME_MAX + 1];
	int dir = dir_fd;

	for (const char *slash; (slash = strchr(path, '/')) != NULL; path = slash + 1) {
		size_t len = (size_t)(slash - path);
		int next = -ENAMETOOLONG;
		if (len < sizeof(name)) {
			memcpy(name, path, len);
			name[len] = '\0';
			next = descend(dir, name);
		}
		if (dir != dir_fd)
			close(dir);
		if (next < 0)
			return next;
		dir = next;
	}
	if (dir != dir_fd)
		close(dir);
	return 0;
}

/* A new object gets the owner and mode of its shadow: a Kafka that runs on
 * tree/ opens it by itself. */
static int create(struct backing *b)
{
	struct stat shadow;
	int err, fd, tries = 0;

	do { /* again when the removal of its last object took the directory */
		err = object_make_dirs(b->dev->objects_fd, b->object);
		if (err != 0 && err != -ENOENT)
			return err;
		fd = sys_open_beneath(b->dev->objects_fd, b->object,
				      O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	} while (fd == -ENOENT && ++tries < CREATE_TRIES);
	if (fd < 0)
		return fd;
	if (fstat(b->shadow_fd, &shadow) == 0 &&
	    futimens(fd, (struct timespec[]){shadow.st_atim, shadow.st_mtim}) == 0 &&
	    (geteuid() != 0 || fchown(fd, shadow.st_uid, shadow.st_gid) == 0) &&
	    fchmod(fd, shadow.st_mode & 07777) == 0)
		return fd;
	err = -errno;
	close(fd);
	return err;
}

static int open_existing(struct backing *b)
{
	int fd = sys_open_beneath(b->dev->objects_fd, b->object, O_RDWR | O_CLOEXEC, 0);

	if (fd == -EACCES) /* mode 0400, and we are not root */
		fd = sys_open_beneath(b->dev->objects_fd, b->object, O_RDONLY | O_CLOEXEC, 0);
	return fd;
}

static int open_locked(struct file *file, struct backing *b)
{
	struct stat shadow;

	if (atomic_load(&b->data_fd) >= 0)
		return 0;
	int fd = open_existing(b);
	if (fd == -ENOENT && (b->create || (fstat(b->shadow_fd, &shadow) == 0 &&
					    shadow.st_size == 0))) {
		/* Nothing was ever acked in it: the crash came between the
		 * stub and the object. */
		fd = create(b);
		b->entries_dirty = true;
	}
	int err = fd < 0 ? fd : reconcile(file, b, fd);
	if (err < 0) {
		if (fd >= 0)
			close(fd);
		/* A lost object must not look like a name that is not there. */
		events_put(file->front->events, EVENT_OBJECT_ERROR, file->ino, -err);
		return err == -ENOENT || err == -ELOOP || err == -EXDEV ? -EIO : err;
	}
	atomic_store(&b->data_fd, fd);
	file_count(file, b);
	return 0;
}

int object_open(struct file *file, struct backing *b)
{
	if (atomic_load(&b->data_fd) >= 0)
		return 0;
	pthread_mutex_lock(&b->open_lock);
	int err = open_locked(file, b);
	pthread_mutex_unlock(&b->open_lock);
	return err;
}

int object_touch_shadow(struct file *file, struct backing *b, int64_t end, bool *grew)
{
	struct timespec now[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_nsec = UTIME_NOW}};
	struct stat shadow;
	int err = 0;

	pthread_mutex_lock(&file->lock); /* two WRITEs may both extend the file */
	*grew = false;
	if (fstat(b->shadow_fd, &shadow) != 0)
		err = -errno;
	else if (end > shadow.st_size)
		err = sys_truncate(b->shadow_fd, end) == 0 ? 0 : -errno;
	else if (futimens(b->shadow_fd, now) != 0)
		err = -errno;
	if (err == 0)
		*grew = end > shadow.st_size;
	pthread_mutex_unlock(&file->lock);
	return err;
}

static int sync_dir(int objects_fd, const char *dir)
{
	int fd = sys_open_beneath(objects_fd, dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);

	if (fd < 0)
		return fd;
	int err = fsync(fd) == 0 ? 0 : -errno;
	close(fd);
	return err;
}

int object_sync_entries(struct backing *b)
{
	if (!b->entries_dirty)
		return 0;
	pthread_mutex_lock(&b->open_lock);
	char *dir = b->entries_dirty ? strdup(b->object) : NULL;
	int err = b->entries_dirty && dir == NULL ? -ENOMEM : 0;
	while (dir != NULL && err == 0) {
		char *slash = strrchr(dir, '/');
		if (slash == NULL) {
			err = sync_dir(b->dev->objects_fd, ".");
			break;
		}
		*slash = '\0';
		err = sync_dir(b->dev->objects_fd, dir);
	}
	free(dir);
	if (err == 0)
		b->entries_dirty = false;
	pthread_mutex_unlock(&b->open_lock);
	return err;
}

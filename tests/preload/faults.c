#define _GNU_SOURCE
/*
 * faults: an LD_PRELOAD library that counts the libc calls on files below one
 * directory, and lets one of them fail, fall short, hang or end the process.
 *
 * $PAFKAFS_FAULTS is a file that is mapped as struct control, by the test too;
 * tests/faults.py has the same layout.  Which libc calls there are to be caught
 * was compared with strace; stores into mappings are no calls.
 */
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

enum action { COUNT, FAIL, SHORT, HANG, DIE, TEAR };

/* What a call is: those of the kinds that the test asks for count. */
enum kind {
	CHANGE = 1, /* what lies on the device is another afterwards */
	SYNC = 2,
	READ = 4,
	PARTIAL = 8, /* may transfer less than it was asked to */
	ROOM = 16,   /* may find no room */
	SLOW = 32,   /* may be interrupted */
	TORN = 64,   /* may change a part */
};

enum { CALLS_KEPT = 2048, WHERE_KEPT = 100 };

struct control {
	int32_t armed;
	int32_t action;
	int32_t error;
	int32_t hit;   /* the call has come */
	int64_t which; /* of the calls, from 1 */
	int64_t calls; /* since it was armed */
	int64_t kinds;
	char root[256];
	char call[CALLS_KEPT][128]; /* the first ones: name and place */
};

static struct control *control;

__attribute__((constructor)) static void map_control(void)
{
	const char *path = getenv("PAFKAFS_FAULTS");
	int fd = path == NULL ? -1 : open(path, O_RDWR | O_CLOEXEC);
	void *map = fd < 0 ? MAP_FAILED
			   : mmap(NULL, sizeof(*control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (map == MAP_FAILED) {
		fprintf(stderr, "faults: PAFKAFS_FAULTS is no file to control them\n");
		_exit(127);
	}
	close(fd);
	control = map;
}

/* Where a call goes, as an absolute path; empty: unknown. */
static void place(char *out, size_t size, int fd, const char *path)
{
	char link[64];
	const char *rest = path;
	ssize_t n = 0;

	if (path != NULL && strncmp(path, "/proc/self/fd/", 14) == 0) {
		fd = (int)strtol(path + 14, (char **)&rest, 10);
		rest = *rest == '/' ? rest + 1 : NULL;
	} else if (path != NULL && path[0] == '/') {
		fd = -1;
		n = snprintf(out, size, "%s", path);
	}
	if (fd >= 0) {
		snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
		n = syscall(SYS_readlink, link, out, size - 1);
		if (n > 0 && rest != NULL && n < (ssize_t)size)
			n += snprintf(out + n, size - (size_t)n, "/%s", rest);
	}
	out[n < 0 ? 0 : n < (ssize_t)size ? n : (ssize_t)size - 1] = 0;
}

static const char *below_root(const char *where)
{
	size_t len = strlen(control->root);

	if (strncmp(where, control->root, len) != 0 || (where[len] != '/' && where[len] != 0))
		return NULL;
	return where + len;
}

static void end_here(void)
{
	kill(getpid(), SIGKILL);
	for (;;)
		pause();
}

/* What is to happen to a call with up to two places: COUNT is nothing. */
static enum action meet_two(const char *call, unsigned kind, int fd, const char *path, int fd2,
			    const char *path2)
{
	char where[4096];
	const char *below;
	int saved = errno;

	if (control == NULL || !__atomic_load_n(&control->armed, __ATOMIC_ACQUIRE) ||
	    (kind & (unsigned)control->kinds) == 0)
		return COUNT;
	place(where, sizeof(where), fd, path);
	below = below_root(where);
	if (below == NULL && path2 != NULL) {
		place(where, sizeof(where), fd2, path2);
		below = below_root(where);
	}
	errno = saved;
	if (below == NULL)
		return COUNT;
	int64_t number = __atomic_add_fetch(&control->calls, 1, __ATOMIC_ACQ_REL);
	if (number <= CALLS_KEPT)
		snprintf(control->call[number - 1], sizeof(control->call[0]), "%s %.*s", call,
			 WHERE_KEPT, below);
	if (number != control->which)
		return COUNT;
	__atomic_store_n(&control->hit, 1, __ATOMIC_RELEASE);
	if (control->action == DIE)
		end_here();
	while (control->action == HANG && __atomic_load_n(&control->armed, __ATOMIC_ACQUIRE))
		usleep(1000);
	if (control->action == FAIL)
		errno = control->error;
	return (enum action)control->action;
}

static enum action meet(const char *call, unsigned kind, int fd, const char *path)
{
	return meet_two(call, kind, fd, path, -1, NULL);
}

#define REAL(name)                                                                             \
	static __typeof__(name) *real;                                                         \
	if (real == NULL)                                                                      \
		real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define WRAP(name, kind, parameters, fd, path, arguments)                                      \
	int name parameters                                                                    \
	{                                                                                      \
		REAL(name);                                                                    \
		return meet(#name, kind, fd, path) == FAIL ? -1 : real arguments;              \
	}

#define WRAP_TWO(name, kind, parameters, fd, path, fd2, path2, arguments)                      \
	int name parameters                                                                    \
	{                                                                                      \
		REAL(name);                                                                    \
		if (meet_two(#name, kind, fd, path, fd2, path2) == FAIL)                       \
			return -1;                                                             \
		return real arguments;                                                         \
	}

/* With some of the bytes; torn: and no more of this process. */
#define WRAP_TRANSFER(name, kind, parameters, fd, whole, part)                                 \
	ssize_t name parameters                                                                \
	{                                                                                      \
		REAL(name);                                                                    \
		enum action action = meet(#name, PARTIAL | SLOW | (kind), fd, NULL);           \
		if (action == FAIL)                                                            \
			return -1;                                                             \
		if (action != SHORT && action != TEAR)                                         \
			return real whole;                                                     \
		ssize_t done = real part;                                                      \
		if (action == TEAR)                                                            \
			end_here();                                                            \
		return done;                                                                   \
	}

#define WRITE (CHANGE | ROOM)
#define SOME(bytes) (((bytes) + 2) / 3)

WRAP_TRANSFER(read, READ, (int fd, void *data, size_t n), fd, (fd, data, n), (fd, data, SOME(n)))
WRAP_TRANSFER(pread, READ, (int fd, void *data, size_t n, off_t at), fd, (fd, data, n, at),
	      (fd, data, SOME(n), at))
WRAP_TRANSFER(pread64, READ, (int fd, void *data, size_t n, off64_t at), fd, (fd, data, n, at),
	      (fd, data, SOME(n), at))
WRAP_TRANSFER(write, WRITE | TORN, (int fd, const void *data, size_t n), fd, (fd, data, n),
	      (fd, data, SOME(n)))
WRAP_TRANSFER(pwrite, WRITE | TORN, (int fd, const void *data, size_t n, off_t at), fd,
	      (fd, data, n, at), (fd, data, SOME(n), at))
WRAP_TRANSFER(pwrite64, WRITE | TORN, (int fd, const void *data, size_t n, off64_t at), fd,
	      (fd, data, n, at), (fd, data, SOME(n), at))
WRAP_TRANSFER(copy_file_range, WRITE | TORN,
	      (int from, off64_t *at, int to, off64_t *to_at, size_t n, unsigned flags), to,
	      (from, at, to, to_at, n, flags), (from, at, to, to_at, SOME(n), flags))

/* Of the first buffer only. */
static struct iovec some_of(const struct iovec *iov)
{
	return (struct iovec){iov->iov_base, SOME(iov->iov_len)};
}

#define WRAP_VECTOR(name, kind)                                                                \
	WRAP_TRANSFER(name, kind,                                                              \
		      (int fd, const struct iovec *iov, int count, off64_t at, int flags), fd, \
		      (fd, iov, count, at, flags),                                             \
		      (fd, (struct iovec[]){some_of(iov)}, 1, at, flags))

WRAP_VECTOR(preadv2, READ)
WRAP_VECTOR(preadv64v2, READ)
WRAP_VECTOR(pwritev2, WRITE | TORN)
WRAP_VECTOR(pwritev64v2, WRITE | TORN)

WRAP(fsync, SYNC | ROOM | SLOW, (int fd), fd, NULL, (fd))
WRAP(fdatasync, SYNC | ROOM | SLOW, (int fd), fd, NULL, (fd))
WRAP(syncfs, SYNC | ROOM, (int fd), fd, NULL, (fd))
WRAP(sync_file_range, READ, (int fd, off64_t at, off64_t n, unsigned flags), fd, NULL,
     (fd, at, n, flags))

/* Which file is mapped there is not asked: only files below the root are ever synced so. */
WRAP(msync, SYNC | ROOM, (void *at, size_t n, int flags), -1,
     control == NULL ? NULL : control->root, (at, n, flags))

WRAP(truncate, CHANGE | SLOW, (const char *path, off_t size), -1, path, (path, size))
WRAP(truncate64, CHANGE | SLOW, (const char *path, off64_t size), -1, path, (path, size))
WRAP(ftruncate, CHANGE | SLOW, (int fd, off_t size), fd, NULL, (fd, size))
WRAP(ftruncate64, CHANGE | SLOW, (int fd, off64_t size), fd, NULL, (fd, size))
WRAP(fallocate, WRITE | SLOW, (int fd, int mode, off_t at, off_t len), fd, NULL,
     (fd, mode, at, len))
WRAP(fallocate64, WRITE | SLOW, (int fd, int mode, off64_t at, off64_t len), fd, NULL,
     (fd, mode, at, len))

WRAP(chmod, CHANGE, (const char *path, mode_t mode), -1, path, (path, mode))
WRAP(fchmod, CHANGE, (int fd, mode_t mode), fd, NULL, (fd, mode))
WRAP(fchmodat, CHANGE, (int fd, const char *path, mode_t mode, int flags), fd, path,
     (fd, path, mode, flags))
WRAP(chown, CHANGE, (const char *path, uid_t uid, gid_t gid), -1, path, (path, uid, gid))
WRAP(lchown, CHANGE, (const char *path, uid_t uid, gid_t gid), -1, path, (path, uid, gid))
WRAP(fchown, CHANGE, (int fd, uid_t uid, gid_t gid), fd, NULL, (fd, uid, gid))
WRAP(fchownat, CHANGE, (int fd, const char *path, uid_t uid, gid_t gid, int flags), fd, path,
     (fd, path, uid, gid, flags))
WRAP(futimens, CHANGE, (int fd, const struct timespec t[2]), fd, NULL, (fd, t))
WRAP(utimensat, CHANGE, (int fd, const char *path, const struct timespec t[2], int flags), fd,
     path, (fd, path, t, flags))
WRAP(fsetxattr, WRITE, (int fd, const char *name, const void *value, size_t n, int flags), fd,
     NULL, (fd, name, value, n, flags))
WRAP(fremovexattr, CHANGE, (int fd, const char *name), fd, NULL, (fd, name))

WRAP(mkdir, WRITE, (const char *path, mode_t mode), -1, path, (path, mode))
WRAP(mkdirat, WRITE, (int fd, const char *path, mode_t mode), fd, path, (fd, path, mode))
WRAP(rmdir, CHANGE, (const char *path), -1, path, (path))
WRAP(unlink, CHANGE, (const char *path), -1, path, (path))
WRAP(unlinkat, CHANGE, (int fd, const char *path, int flags), fd, path, (fd, path, flags))
WRAP(mknod, WRITE, (const char *path, mode_t mode, dev_t dev), -1, path, (path, mode, dev))
WRAP(mknodat, WRITE, (int fd, const char *path, mode_t mode, dev_t dev), fd, path,
     (fd, path, mode, dev))
WRAP(symlink, WRITE, (const char *text, const char *path), -1, path, (text, path))
WRAP(symlinkat, WRITE, (const char *text, int fd, const char *path), fd, path,
     (text, fd, path))
WRAP(link, WRITE, (const char *old, const char *new), -1, new, (old, new))
WRAP(linkat, WRITE, (int from, const char *old, int to, const char *new, int flags), to, new,
     (from, old, to, new, flags))
WRAP_TWO(rename, WRITE, (const char *old, const char *new), -1, new, -1, old, (old, new))
WRAP_TWO(renameat, WRITE, (int from, const char *old, int to, const char *new), to, new, from,
	 old, (from, old, to, new))
WRAP_TWO(renameat2, WRITE,
	 (int from, const char *old, int to, const char *new, unsigned flags), to, new, from,
	 old, (from, old, to, new, flags))

WRAP(flock, READ | SLOW, (int fd, int operation), fd, NULL, (fd, operation))
WRAP(stat, READ, (const char *path, struct stat *st), -1, path, (path, st))
WRAP(stat64, READ, (const char *path, struct stat64 *st), -1, path, (path, st))
WRAP(lstat, READ, (const char *path, struct stat *st), -1, path, (path, st))
WRAP(lstat64, READ, (const char *path, struct stat64 *st), -1, path, (path, st))
WRAP(fstat, READ, (int fd, struct stat *st), fd, NULL, (fd, st))
WRAP(fstat64, READ, (int fd, struct stat64 *st), fd, NULL, (fd, st))
WRAP(fstatat, READ, (int fd, const char *path, struct stat *st, int flags), fd, path,
     (fd, path, st, flags))
WRAP(fstatat64, READ, (int fd, const char *path, struct stat64 *st, int flags), fd, path,
     (fd, path, st, flags))
WRAP(statvfs64, READ, (const char *path, struct statvfs64 *st), -1, path, (path, st))
WRAP(fstatvfs64, READ, (int fd, struct statvfs64 *st), fd, NULL, (fd, st))

#define WRAP_VALUE(type, failed, name, parameters, fd, path, arguments)                        \
	type name parameters                                                                   \
	{                                                                                      \
		REAL(name);                                                                    \
		return meet(#name, READ, fd, path) == FAIL ? failed : real arguments;          \
	}

WRAP_VALUE(ssize_t, -1, readlink, (const char *path, char *to, size_t n), -1, path,
	   (path, to, n))
WRAP_VALUE(ssize_t, -1, readlinkat, (int fd, const char *path, char *to, size_t n), fd, path,
	   (fd, path, to, n))
WRAP_VALUE(ssize_t, -1, fgetxattr, (int fd, const char *name, void *to, size_t n), fd, NULL,
	   (fd, name, to, n))
WRAP_VALUE(off_t, -1, lseek, (int fd, off_t at, int whence), fd, NULL, (fd, at, whence))
WRAP_VALUE(off64_t, -1, lseek64, (int fd, off64_t at, int whence), fd, NULL, (fd, at, whence))
WRAP_VALUE(DIR *, NULL, opendir, (const char *path), -1, path, (path))
WRAP_VALUE(DIR *, NULL, fdopendir, (int fd), fd, NULL, (fd))
WRAP_VALUE(struct dirent64 *, NULL, readdir64, (DIR * dir), dirfd(dir), NULL, (dir))

void *mmap64(void *at, size_t n, int protection, int flags, int fd, off64_t offset)
{
	REAL(mmap64);
	if (fd >= 0 && meet("mmap64", READ, fd, NULL) == FAIL)
		return MAP_FAILED;
	return real(at, n, protection, flags, fd, offset);
}

void *mmap(void *at, size_t n, int protection, int flags, int fd, off_t offset)
{
	REAL(mmap);
	if (fd >= 0 && meet("mmap", READ, fd, NULL) == FAIL)
		return MAP_FAILED;
	return real(at, n, protection, flags, fd, offset);
}

static bool makes_a_file(int flags)
{
	return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE;
}

static unsigned kind_of_open(int flags)
{
	return SLOW | (makes_a_file(flags) ? WRITE : flags & O_TRUNC ? CHANGE : READ);
}

#define WRAP_OPEN(name, parameters, fd, path, ...)                                             \
	int name parameters                                                                    \
	{                                                                                      \
		REAL(name);                                                                    \
		va_list list;                                                                  \
		va_start(list, flags);                                                         \
		mode_t mode = makes_a_file(flags) ? va_arg(list, mode_t) : 0;                  \
		va_end(list);                                                                  \
		if (meet(#name, kind_of_open(flags), fd, path) == FAIL)                        \
			return -1;                                                             \
		return real(__VA_ARGS__, flags, mode);                                         \
	}

WRAP_OPEN(open, (const char *path, int flags, ...), -1, path, path)
WRAP_OPEN(open64, (const char *path, int flags, ...), -1, path, path)
WRAP_OPEN(openat, (int fd, const char *path, int flags, ...), fd, path, fd, path)
WRAP_OPEN(openat64, (int fd, const char *path, int flags, ...), fd, path, fd, path)

/* openat2 has no function of its own. */
long syscall(long number, ...)
{
	REAL(syscall);
	long a[6];
	va_list list;

	va_start(list, number);
	for (int i = 0; i < 6; i++)
		a[i] = va_arg(list, long);
	va_end(list);
	if (number == SYS_openat2) {
		const struct open_how *how = (const struct open_how *)a[2];
		if (meet("openat2", kind_of_open((int)how->flags), (int)a[0],
			 (const char *)a[1]) == FAIL)
			return -1;
	}
	return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* The system calls of pafkafs._native that are not about open files. */
#define _GNU_SOURCE
#include "module.h"

#include <errno.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <unistd.h>

#include "copy.h"
#include "object.h"
#include "persist.h"
#include "sys.h"

static PyObject *py_open_beneath(PyObject *self, PyObject *args)
{
	int dir_fd, flags, fd;
	unsigned mode = 0;
	const char *path;

	(void)self;
	if (!PyArg_ParseTuple(args, "iyi|I", &dir_fd, &path, &flags, &mode))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	fd = sys_open_beneath(dir_fd, path, flags, mode);
	Py_END_ALLOW_THREADS
	if (fd < 0)
		return none_or_errno(fd);
	return PyLong_FromLong(fd);
}

static PyObject *py_make_dirs(PyObject *self, PyObject *args)
{
	const char *path;
	int dir_fd, err;

	(void)self;
	if (!PyArg_ParseTuple(args, "iy", &dir_fd, &path))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	err = object_make_dirs(dir_fd, path);
	Py_END_ALLOW_THREADS
	return none_or_errno(err);
}

/* Inline, with the GIL: microseconds, and atomic for the trio thread. */
static PyObject *py_rename(PyObject *self, PyObject *args)
{
	const char *from, *to;
	int from_dir, to_dir;
	unsigned flags;

	(void)self;
	if (!PyArg_ParseTuple(args, "iyiyI", &from_dir, &from, &to_dir, &to, &flags))
		return NULL;
	return none_or_errno(renameat2(from_dir, from, to_dir, to, flags) == 0 ? 0 : -errno);
}

/* The errno with which the source could not be read, or 0; what the target
 * refuses is an OSError. */
static PyObject *py_copy_data(PyObject *self, PyObject *args)
{
	struct copy_request request;
	int keep_holes, urgent, err;
	long long offset, end;
	bool at_source;

	(void)self;
	if (!PyArg_ParseTuple(args, "iiLLpp", &request.from_fd, &request.to_fd, &offset, &end,
			      &keep_holes, &urgent))
		return NULL;
	request.offset = offset;
	request.end = end;
	request.keep_holes = keep_holes;
	request.urgent = urgent;
	Py_BEGIN_ALLOW_THREADS
	err = copy_data(&request, &at_source);
	Py_END_ALLOW_THREADS
	if (at_source)
		return PyLong_FromLong(-err);
	return err < 0 ? none_or_errno(err) : PyLong_FromLong(0);
}

static PyObject *py_is_dax(PyObject *self, PyObject *args)
{
	int dir_fd;

	(void)self;
	if (!PyArg_ParseTuple(args, "i", &dir_fd))
		return NULL;
	int dax = sys_is_dax(dir_fd);
	if (dax < 0)
		return none_or_errno(dax);
	return PyBool_FromLong(dax);
}

static PyObject *py_syncfs(PyObject *self, PyObject *args)
{
	int fd, err;

	(void)self;
	if (!PyArg_ParseTuple(args, "i", &fd))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	err = syncfs(fd) == 0 ? 0 : -errno;
	Py_END_ALLOW_THREADS
	return none_or_errno(err);
}

static PyObject *py_mount(PyObject *self, PyObject *args)
{
	const char *source, *target, *type, *options;
	int err;

	(void)self;
	if (!PyArg_ParseTuple(args, "yyyy", &source, &target, &type, &options))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	err = mount(source, target, type, MS_NOSUID | MS_NODEV, options) == 0 ? 0 : -errno;
	Py_END_ALLOW_THREADS
	return none_or_errno(err);
}

static PyObject *py_umount(PyObject *self, PyObject *args)
{
	const char *target;
	int lazy, err;

	(void)self;
	if (!PyArg_ParseTuple(args, "yp", &target, &lazy))
		return NULL;
	Py_BEGIN_ALLOW_THREADS
	err = umount2(target, UMOUNT_NOFOLLOW | (lazy ? MNT_DETACH : 0)) == 0 ? 0 : -errno;
	Py_END_ALLOW_THREADS
	return none_or_errno(err);
}

/* The kernel must not wait for our own mount to reclaim memory for us. */
static PyObject *py_set_io_flusher(PyObject *self, PyObject *ignored)
{
	(void)self;
	(void)ignored;
	return none_or_errno(prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0 ? 0 : -errno);
}

static PyObject *py_caches_survive(PyObject *self, PyObject *ignored)
{
	(void)self;
	(void)ignored;
	return PyBool_FromLong(persist_caches_survive());
}

PyMethodDef syscall_methods[] = {
	{"open_beneath", py_open_beneath, METH_VARARGS, NULL},
	{"make_dirs", py_make_dirs, METH_VARARGS, NULL},
	{"rename", py_rename, METH_VARARGS, NULL},
	{"copy_data", py_copy_data, METH_VARARGS, NULL},
	{"syncfs", py_syncfs, METH_VARARGS, NULL},
	{"caches_survive", py_caches_survive, METH_NOARGS, NULL},
	{"is_dax", py_is_dax, METH_VARARGS, NULL},
	{"mount", py_mount, METH_VARARGS, NULL},
	{"umount", py_umount, METH_VARARGS, NULL},
	{"set_io_flusher", py_set_io_flusher, METH_NOARGS, NULL},
	{NULL, NULL, 0, NULL},
};

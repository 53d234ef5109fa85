/* pafkafs._native.File: made by Front.open_plain and Front.open_object. */
#define _GNU_SOURCE
#include "module.h"

#include <errno.h>

#include "io.h"
#include "object.h"

static struct file *opened(FileObject *self)
{
	if (self->file == NULL)
		PyErr_SetString(PyExc_ValueError, "file is closed");
	return self->file;
}

static void close_it(FileObject *self)
{
	if (self->file != NULL)
		file_close(self->file);
	self->file = NULL;
}

static void file_dealloc(FileObject *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);
	freefunc free_slot = PyType_GetSlot(type, Py_tp_free);

	close_it(self);
	Py_XDECREF(self->front);
	free_slot(self);
	Py_DECREF(type);
}

static PyObject *close_py(FileObject *self, PyObject *ignored)
{
	(void)ignored;
	close_it(self);
	Py_RETURN_NONE;
}

static PyObject *add_handle(FileObject *self, PyObject *arg)
{
	unsigned long long fh = PyLong_AsUnsignedLongLong(arg);

	if (PyErr_Occurred() || opened(self) == NULL)
		return NULL;
	return none_or_errno(file_add_handle(self->file, fh));
}

static PyObject *remove_handle(FileObject *self, PyObject *arg)
{
	unsigned long long fh = PyLong_AsUnsignedLongLong(arg);

	if (PyErr_Occurred() || opened(self) == NULL)
		return NULL;
	return PyLong_FromUnsignedLong(file_remove_handle(self->file, fh));
}

static PyObject *close_gate(FileObject *self, PyObject *ignored)
{
	(void)ignored;
	if (opened(self) == NULL)
		return NULL;
	return PyBool_FromLong(file_close_gate(self->file));
}

static PyObject *open_gate(FileObject *self, PyObject *ignored)
{
	(void)ignored;
	if (opened(self) == NULL)
		return NULL;
	file_open_gate(self->file);
	Py_RETURN_NONE;
}

static PyObject *end_starving(FileObject *self, PyObject *arg)
{
	long error = PyLong_AsLong(arg);

	if (PyErr_Occurred() || opened(self) == NULL)
		return NULL;
	file_end_starving(self->file, (int)error);
	Py_RETURN_NONE;
}

static PyObject *repoint_plain(FileObject *self, PyObject *args)
{
	DeviceObject *device;
	int data_fd;

	if (opened(self) == NULL ||
	    !PyArg_ParseTuple(args, "O!i", native_state()->device_type, &device, &data_fd))
		return NULL;
	struct backing *b = backing_plain(device->dev, data_fd);
	if (b == NULL)
		return PyErr_SetFromErrno(PyExc_OSError);
	file_repoint(self->file, b);
	Py_RETURN_NONE;
}

static PyObject *repoint_object(FileObject *self, PyObject *args)
{
	DeviceObject *device;
	const char *object;
	int shadow_fd, data_fd;
	long long allocated;

	if (opened(self) == NULL ||
	    !PyArg_ParseTuple(args, "O!iiyL", native_state()->device_type, &device, &shadow_fd,
			      &data_fd, &object, &allocated))
		return NULL;
	struct backing *b = backing_object(device->dev, shadow_fd, data_fd, object, false, true);
	if (b == NULL)
		return PyErr_SetFromErrno(PyExc_OSError);
	file_repoint_counted(self->file, b, allocated);
	Py_RETURN_NONE;
}

static PyObject *grow_py(FileObject *self, PyObject *arg)
{
	unsigned long long end = PyLong_AsUnsignedLongLong(arg);
	struct file *file = opened(self);
	int err;

	if (file == NULL || PyErr_Occurred())
		return NULL;
	file_ref(file);
	Py_BEGIN_ALLOW_THREADS
	err = io_grow(file, end);
	file_unref(file);
	Py_END_ALLOW_THREADS
	return none_or_errno(err);
}

static PyObject *start_growing_py(FileObject *self, PyObject *args)
{
	struct file *file = opened(self);
	unsigned number;
	int err;

	if (file == NULL || !PyArg_ParseTuple(args, "I", &number))
		return NULL;
	file_ref(file);
	Py_BEGIN_ALLOW_THREADS
	err = io_start_growing(file, number);
	file_unref(file);
	Py_END_ALLOW_THREADS
	return none_or_errno(err);
}

static PyObject *switch_py(FileObject *self, PyObject *ignored)
{
	(void)ignored;
	if (opened(self) == NULL)
		return NULL;
	file_switch(self->file);
	Py_RETURN_NONE;
}

static PyObject *set_mtime_py(FileObject *self, PyObject *arg)
{
	unsigned long long mtime_ns = PyLong_AsUnsignedLongLong(arg);

	if (opened(self) == NULL || PyErr_Occurred())
		return NULL;
	struct backing *b = file_backing(self->file);
	int err = b->pmem != NULL ? pmem_set_mtime(b->pmem, mtime_ns) : 0;
	backing_unref(b);
	return none_or_errno(err);
}

/* What takes no argument and may block. */
static PyObject *without_gil(FileObject *self, int (*act)(struct file *))
{
	int err;

	if (opened(self) == NULL)
		return NULL;
	struct file *file = file_ref(self->file);
	Py_BEGIN_ALLOW_THREADS
	err = act(file);
	file_unref(file);
	Py_END_ALLOW_THREADS
	return none_or_errno(err);
}

static PyObject *seal_py(FileObject *self, PyObject *ignored)
{
	(void)ignored;
	return without_gil(self, io_seal);
}

/* (size, mtime in ns) of a file that grows in persistent memory, or None. */
static PyObject *get_growing(FileObject *self, void *closure)
{
	(void)closure;
	if (opened(self) == NULL)
		return NULL;
	struct backing *b = file_backing(self->file);
	PyObject *result = Py_None;
	if (b->pmem != NULL)
		result = Py_BuildValue("(KK)", (unsigned long long)pmem_size(b->pmem),
				       (unsigned long long)pmem_mtime_ns(b->pmem));
	else
		Py_INCREF(result);
	backing_unref(b);
	return result;
}

static PyObject *truncate_py(FileObject *self, PyObject *arg)
{
	long long size = PyLong_AsLongLong(arg);
	int err;

	if (PyErr_Occurred() || opened(self) == NULL)
		return NULL;
	struct file *file = file_ref(self->file);
	Py_BEGIN_ALLOW_THREADS
	err = io_truncate(file, size);
	file_unref(file);
	Py_END_ALLOW_THREADS
	return none_or_errno(err);
}

static PyObject *sync_py(FileObject *self, PyObject *ignored)
{
	(void)ignored;
	return without_gil(self, io_sync);
}

static PyObject *sync_at_gate_py(FileObject *self, PyObject *ignored)
{
	(void)ignored;
	return without_gil(self, io_sync_at_gate);
}

static int open_object_data(struct file *file)
{
	struct backing *b = file_backing(file);
	int err = b->shadow_fd >= 0 ? object_open(file, b) : 0;

	backing_unref(b);
	return err;
}

static PyObject *open_data(FileObject *self, PyObject *ignored)
{
	(void)ignored;
	return without_gil(self, open_object_data);
}

static PyObject *take_changes(FileObject *self, PyObject *ignored)
{
	int64_t from, to, cut;

	(void)ignored;
	if (opened(self) == NULL)
		return NULL;
	if (!file_take_changes(self->file, &from, &to, &cut))
		Py_RETURN_NONE;
	return Py_BuildValue("(LLL)", (long long)from, (long long)to, (long long)cut);
}

static PyObject *mode_changed(FileObject *self, PyObject *ignored)
{
	(void)ignored;
	if (opened(self) == NULL)
		return NULL;
	atomic_fetch_add(&self->file->mode_changes, 1);
	Py_RETURN_NONE;
}

static PyObject *mark_changed(FileObject *self, PyObject *ignored)
{
	(void)ignored;
	if (opened(self) == NULL)
		return NULL;
	file_mark_changed(self->file, INT64_MAX, -1); /* attributes, no bytes */
	struct backing *b = file_backing(self->file);
	if (b->pmem != NULL)
		b->entries_dirty = true;
	backing_unref(b);
	Py_RETURN_NONE;
}

static PyObject *get_ino(FileObject *self, void *closure)
{
	(void)closure;
	return opened(self) == NULL ? NULL : PyLong_FromUnsignedLongLong(self->file->ino);
}

/* Valid until the file is closed or re-pointed, both by the caller. */
static PyObject *get_attr_fd(FileObject *self, void *closure)
{
	(void)closure;
	return opened(self) == NULL ? NULL
				    : PyLong_FromLong(backing_attr_fd(self->file->backing));
}

static PyObject *get_data_fd(FileObject *self, void *closure)
{
	(void)closure;
	return opened(self) == NULL
		       ? NULL
		       : PyLong_FromLong(atomic_load(&self->file->backing->data_fd));
}

static PyObject *get_counted(FileObject *self, void *closure)
{
	(void)closure;
	if (opened(self) == NULL)
		return NULL;
	pthread_mutex_lock(&self->file->lock);
	int64_t bytes = self->file->counted_bytes;
	pthread_mutex_unlock(&self->file->lock);
	return PyLong_FromLongLong(bytes);
}

static PyObject *get_read_rate(FileObject *self, void *closure)
{
	(void)closure;
	if (opened(self) == NULL)
		return NULL;
	return PyLong_FromUnsignedLongLong(file_read_rate(self->file, monotonic_ns()));
}

/* What it has allocated beyond its logical size; 0 of what does not grow. */
static PyObject *get_ahead(FileObject *self, void *closure)
{
	int64_t bytes = 0;

	(void)closure;
	if (opened(self) == NULL)
		return NULL;
	pthread_mutex_lock(&self->file->lock);
	if (self->file->backing->pmem != NULL)
		bytes = self->file->counted_bytes - (int64_t)pmem_size(self->file->backing->pmem);
	pthread_mutex_unlock(&self->file->lock);
	return PyLong_FromLongLong(bytes > 0 ? bytes : 0);
}

static PyObject *get_error_unseen(FileObject *self, void *closure)
{
	(void)closure;
	return opened(self) == NULL ? NULL : PyBool_FromLong(file_error_unseen(self->file));
}

static PyObject *get_sync_failed(FileObject *self, void *closure)
{
	(void)closure;
	return opened(self) == NULL ? NULL : PyBool_FromLong(file_sync_failed(self->file));
}

static PyObject *get_unsynced(FileObject *self, void *closure)
{
	uint64_t seq;

	(void)closure;
	return opened(self) == NULL ? NULL : PyBool_FromLong(file_unsynced(self->file, &seq));
}

static int set_nlink(FileObject *self, PyObject *value, void *closure)
{
	unsigned long nlink = value == NULL ? 0 : PyLong_AsUnsignedLong(value);

	(void)closure;
	if (PyErr_Occurred() || opened(self) == NULL)
		return -1;
	pthread_mutex_lock(&self->file->lock);
	self->file->nlink = (uint32_t)nlink;
	pthread_mutex_unlock(&self->file->lock);
	return 0;
}

static PyObject *get_nlink(FileObject *self, void *closure)
{
	(void)closure;
	return opened(self) == NULL ? NULL : PyLong_FromUnsignedLong(self->file->nlink);
}

static PyMethodDef methods[] = {
	{"close", (PyCFunction)close_py, METH_NOARGS, NULL},
	{"add_handle", (PyCFunction)add_handle, METH_O, NULL},
	{"remove_handle", (PyCFunction)remove_handle, METH_O, NULL},
	{"close_gate", (PyCFunction)close_gate, METH_NOARGS, NULL},
	{"open_gate", (PyCFunction)open_gate, METH_NOARGS, NULL},
	{"end_starving", (PyCFunction)end_starving, METH_O, NULL},
	{"repoint_plain", (PyCFunction)repoint_plain, METH_VARARGS, NULL},
	{"repoint_object", (PyCFunction)repoint_object, METH_VARARGS, NULL},
	{"grow", (PyCFunction)grow_py, METH_O, NULL},
	{"start_growing", (PyCFunction)start_growing_py, METH_VARARGS, NULL},
	{"set_mtime", (PyCFunction)set_mtime_py, METH_O, NULL},
	{"switch_backing", (PyCFunction)switch_py, METH_NOARGS, NULL},
	{"seal", (PyCFunction)seal_py, METH_NOARGS, NULL},
	{"truncate", (PyCFunction)truncate_py, METH_O, NULL},
	{"sync", (PyCFunction)sync_py, METH_NOARGS, NULL},
	{"open_data", (PyCFunction)open_data, METH_NOARGS, NULL},
	{"sync_at_gate", (PyCFunction)sync_at_gate_py, METH_NOARGS, NULL},
	{"take_changes", (PyCFunction)take_changes, METH_NOARGS, NULL},
	{"mark_changed", (PyCFunction)mark_changed, METH_NOARGS, NULL},
	{"mode_changed", (PyCFunction)mode_changed, METH_NOARGS, NULL},
	{NULL, NULL, 0, NULL},
};

static PyGetSetDef members[] = {
	{"ino", (getter)get_ino, NULL, NULL, NULL},
	{"attr_fd", (getter)get_attr_fd, NULL, NULL, NULL},
	{"data_fd", (getter)get_data_fd, NULL, NULL, NULL},
	{"counted_bytes", (getter)get_counted, NULL, NULL, NULL},
	{"read_bytes_per_s", (getter)get_read_rate, NULL, NULL, NULL},
	{"ahead_bytes", (getter)get_ahead, NULL, NULL, NULL},
	{"growing", (getter)get_growing, NULL, NULL, NULL},
	{"error_unseen", (getter)get_error_unseen, NULL, NULL, NULL},
	{"sync_failed", (getter)get_sync_failed, NULL, NULL, NULL},
	{"unsynced", (getter)get_unsynced, NULL, NULL, NULL},
	{"nlink", (getter)get_nlink, (setter)set_nlink, NULL, NULL},
	{NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
	{Py_tp_dealloc, file_dealloc},
	{Py_tp_methods, methods},
	{Py_tp_getset, members},
	{0, NULL},
};

PyType_Spec file_spec = {
	.name = "pafkafs._native.File",
	.basicsize = sizeof(FileObject),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
	.slots = slots,
};

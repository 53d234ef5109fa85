/* pafkafs._native.Front */
#define _GNU_SOURCE
#include "module.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static PyObject *front_new_py(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"fuse_fd", "threads", NULL};
	unsigned threads;
	int fuse_fd;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "iI", names, &fuse_fd, &threads))
		return NULL;
	allocfunc alloc = PyType_GetSlot(type, Py_tp_alloc);
	FrontObject *self = (FrontObject *)alloc(type, 0);
	if (self == NULL)
		return NULL;
	self->front = front_new(fuse_fd, threads, &self->session_fd);
	if (self->front == NULL) {
		Py_DECREF(self);
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	return (PyObject *)self;
}

static void front_dealloc(FrontObject *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);
	freefunc free_slot = PyType_GetSlot(type, Py_tp_free);

	/* Requests that hang in a device still point to it. */
	if (self->front != NULL && self->started == self->stopped &&
	    self->front->inflight == NULL &&
	    self->front->file_count == 0)
		front_free(self->front);
	free_slot(self);
	Py_DECREF(type);
}

static PyObject *start(FrontObject *self, PyObject *ignored)
{
	(void)ignored;
	int err = front_start(self->front);
	self->started = err == 0;
	return none_or_errno(err);
}

static PyObject *stop(FrontObject *self, PyObject *ignored)
{
	(void)ignored;
	if (self->started && !self->stopped) {
		Py_BEGIN_ALLOW_THREADS
		front_stop(self->front);
		Py_END_ALLOW_THREADS
		self->stopped = true;
	}
	Py_RETURN_NONE;
}

static PyObject *take_events(FrontObject *self, PyObject *ignored)
{
	PyObject *list = PyList_New(0);
	struct event *next;

	(void)ignored;
	for (struct event *ev = events_take(self->front->events); ev != NULL; ev = next) {
		next = ev->next;
		PyObject *item = Py_BuildValue("(iKL)", (int)ev->kind,
					       (unsigned long long)ev->ino, (long long)ev->value);
		free(ev);
		if (list == NULL || item == NULL || PyList_Append(list, item) != 0)
			Py_CLEAR(list);
		Py_XDECREF(item);
	}
	return list;
}

static PyObject *wrap_file(FrontObject *self, uint64_t ino, struct backing *b)
{
	if (b == NULL)
		return PyErr_SetFromErrno(PyExc_OSError);
	struct file *file = file_open(self->front, ino, b);
	if (file == NULL)
		return PyErr_SetFromErrno(PyExc_OSError);
	PyTypeObject *type = native_state()->file_type;
	allocfunc alloc = PyType_GetSlot(type, Py_tp_alloc);
	FileObject *wrapped = (FileObject *)alloc(type, 0);
	if (wrapped == NULL) {
		file_close(file);
		return NULL;
	}
	Py_INCREF((PyObject *)self);
	wrapped->front = (PyObject *)self;
	wrapped->file = file;
	return (PyObject *)wrapped;
}

static PyObject *open_plain(FrontObject *self, PyObject *args)
{
	unsigned long long ino;
	DeviceObject *device;
	int data_fd;

	if (!PyArg_ParseTuple(args, "KO!i", &ino, native_state()->device_type, &device, &data_fd))
		return NULL;
	return wrap_file(self, ino, backing_plain(device->dev, data_fd));
}

/* Takes the descriptor and the slot over, on failure too. */
static PyObject *open_growing(FrontObject *self, PyObject *args)
{
	unsigned long long ino;
	DeviceObject *device;
	unsigned number;
	int data_fd;

	if (!PyArg_ParseTuple(args, "KO!iI", &ino, native_state()->device_type, &device, &data_fd,
			      &number))
		return NULL;
	struct device *dev = device->dev;
	struct pmem *p = pmem_open(data_fd, dev->sizes, number, dev->map_sync);
	if (p == NULL) {
		int err = -errno;
		close(data_fd);
		return none_or_errno(err);
	}
	return wrap_file(self, ino, backing_growing(dev, data_fd, p));
}

static PyObject *open_object(FrontObject *self, PyObject *args)
{
	unsigned long long ino;
	DeviceObject *device;
	const char *object;
	int shadow_fd, create, synced;

	if (!PyArg_ParseTuple(args, "KO!iypp", &ino, native_state()->device_type, &device,
			      &shadow_fd, &object, &create, &synced))
		return NULL;
	return wrap_file(self, ino,
			 backing_object(device->dev, shadow_fd, -1, object, create, synced));
}

static PyObject *get_session_fd(FrontObject *self, void *closure)
{
	(void)closure;
	return PyLong_FromLong(self->session_fd);
}

static PyObject *get_event_fd(FrontObject *self, void *closure)
{
	(void)closure;
	return PyLong_FromLong(events_fd(self->front->events));
}

static PyObject *get_answered(FrontObject *self, void *closure)
{
	(void)closure;
	return PyLong_FromUnsignedLongLong(atomic_load(&self->front->answered));
}

static PyObject *get_forwarded(FrontObject *self, void *closure)
{
	(void)closure;
	return PyLong_FromUnsignedLongLong(atomic_load(&self->front->forwarded));
}

static PyObject *get_mapped_direct_io(FrontObject *self, void *closure)
{
	(void)closure;
	return PyBool_FromLong(atomic_load(&self->front->mapped_direct_io));
}

static PyObject *get_ended(FrontObject *self, void *closure)
{
	(void)closure;
	return PyBool_FromLong(self->started &&
			       atomic_load(&self->front->readers_alive) == 0);
}

static PyMethodDef methods[] = {
	{"start", (PyCFunction)start, METH_NOARGS, NULL},
	{"stop", (PyCFunction)stop, METH_NOARGS, NULL},
	{"take_events", (PyCFunction)take_events, METH_NOARGS, NULL},
	{"open_plain", (PyCFunction)open_plain, METH_VARARGS, NULL},
	{"open_growing", (PyCFunction)open_growing, METH_VARARGS, NULL},
	{"open_object", (PyCFunction)open_object, METH_VARARGS, NULL},
	{NULL, NULL, 0, NULL},
};

static PyGetSetDef members[] = {
	{"session_fd", (getter)get_session_fd, NULL, NULL, NULL},
	{"event_fd", (getter)get_event_fd, NULL, NULL, NULL},
	{"answered", (getter)get_answered, NULL, NULL, NULL},
	{"forwarded", (getter)get_forwarded, NULL, NULL, NULL},
	{"ended", (getter)get_ended, NULL, NULL, NULL},
	{"mapped_direct_io", (getter)get_mapped_direct_io, NULL, NULL, NULL},
	{NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
	{Py_tp_new, front_new_py},
	{Py_tp_dealloc, front_dealloc},
	{Py_tp_methods, methods},
	{Py_tp_getset, members},
	{0, NULL},
};

PyType_Spec front_spec = {
	.name = "pafkafs._native.Front",
	.basicsize = sizeof(FrontObject),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = slots,
};

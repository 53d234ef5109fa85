/* pafkafs._native.Device */
#define _GNU_SOURCE
#include "module.h"

#include <errno.h>

static PyObject *device_new_py(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
	static char *names[] = {"objects_fd", "slow", "memory", "power", NULL};
	int objects_fd, slow, memory, power;

	if (!PyArg_ParseTupleAndKeywords(args, kwargs, "i$ppp", names, &objects_fd, &slow,
					 &memory, &power))
		return NULL;
	allocfunc alloc = PyType_GetSlot(type, Py_tp_alloc);
	DeviceObject *self = (DeviceObject *)alloc(type, 0);
	if (self == NULL)
		return NULL;
	self->dev = device_new(objects_fd, slow, memory, power);
	if (self->dev == NULL) {
		Py_DECREF(self);
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	return (PyObject *)self;
}

static void device_dealloc(DeviceObject *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);
	freefunc free_slot = PyType_GetSlot(type, Py_tp_free);

	if (self->dev != NULL)
		device_unref(self->dev);
	free_slot(self);
	Py_DECREF(type);
}

static PyObject *device_stop_py(DeviceObject *self, PyObject *ignored)
{
	unsigned hung;

	(void)ignored;
	Py_BEGIN_ALLOW_THREADS
	hung = device_stop(self->dev);
	Py_END_ALLOW_THREADS
	return PyLong_FromUnsignedLong(hung);
}

static PyObject *device_add_used(DeviceObject *self, PyObject *arg)
{
	long long bytes = PyLong_AsLongLong(arg);

	if (bytes == -1 && PyErr_Occurred())
		return NULL;
	device_release(self->dev, -bytes);
	Py_RETURN_NONE;
}

static PyObject *get_used(DeviceObject *self, void *closure)
{
	(void)closure;
	return PyLong_FromLongLong(atomic_load(&self->dev->used_bytes));
}

static PyObject *get_limit(DeviceObject *self, void *closure)
{
	(void)closure;
	return PyLong_FromLongLong(atomic_load(&self->dev->limit_bytes));
}

static int set_bytes(_Atomic int64_t *where, PyObject *value)
{
	long long bytes = value == NULL ? -1 : PyLong_AsLongLong(value);

	if (bytes == -1 && PyErr_Occurred())
		return -1;
	atomic_store(where, bytes);
	return 0;
}

static int set_used(DeviceObject *self, PyObject *value, void *closure)
{
	(void)closure;
	return set_bytes(&self->dev->used_bytes, value);
}

static int set_limit(DeviceObject *self, PyObject *value, void *closure)
{
	(void)closure;
	return set_bytes(&self->dev->limit_bytes, value);
}

static PyObject *get_segment(DeviceObject *self, void *closure)
{
	(void)closure;
	return PyLong_FromUnsignedLongLong(atomic_load(&self->dev->segment_bytes));
}

static int set_segment(DeviceObject *self, PyObject *value, void *closure)
{
	unsigned long long bytes = value == NULL ? 0 : PyLong_AsUnsignedLongLong(value);

	(void)closure;
	if (PyErr_Occurred())
		return -1;
	atomic_store(&self->dev->segment_bytes, (bytes + 4095) & ~4095ull);
	return 0;
}

static PyObject *get_stuck(DeviceObject *self, void *closure)
{
	(void)closure;
	return PyLong_FromUnsignedLongLong(
		self->dev->workers == NULL ? 0 : workers_stuck_ns(self->dev->workers));
}

static PyObject *get_queued(DeviceObject *self, void *closure)
{
	(void)closure;
	return PyLong_FromUnsignedLong(
		self->dev->workers == NULL ? 0 : workers_queued(self->dev->workers));
}

static PyObject *counts_of(struct latency *l, unsigned operation)
{
	PyObject *counts = PyTuple_New(LATENCY_BUCKETS);

	for (unsigned i = 0; counts != NULL && i < LATENCY_BUCKETS; i++) {
		unsigned long long n = atomic_load(&l->of[operation].count[i]);
		PyObject *item = PyLong_FromUnsignedLongLong(n);
		if (item == NULL || PyTuple_SetItem(counts, (Py_ssize_t)i, item) != 0)
			Py_CLEAR(counts);
	}
	return counts;
}

static PyObject *device_latencies(DeviceObject *self, PyObject *ignored)
{
	PyObject *list = PyList_New(0);
	struct latency *l = &self->dev->latency;

	(void)ignored;
	for (unsigned i = 0; list != NULL && i < LATENCY_OPERATIONS; i++) {
		PyObject *counts = counts_of(l, i);
		PyObject *item = counts == NULL ? NULL
						: Py_BuildValue("(sKN)", latency_name(i),
								(unsigned long long)atomic_load(
									&l->of[i].sum_ns),
								counts);
		if (item == NULL || PyList_Append(list, item) != 0)
			Py_CLEAR(list);
		Py_XDECREF(item);
	}
	return list;
}

static PyObject *device_open_sizes(DeviceObject *self, PyObject *args)
{
	int dir_fd, sync;
	unsigned count;

	if (!PyArg_ParseTuple(args, "iIp", &dir_fd, &count, &sync))
		return NULL;
	if (self->dev->sizes != NULL)
		return none_or_errno(-EBUSY);
	Py_BEGIN_ALLOW_THREADS
	self->dev->sizes = sizes_open(dir_fd, count, sync);
	Py_END_ALLOW_THREADS
	if (self->dev->sizes == NULL)
		return PyErr_SetFromErrno(PyExc_OSError);
	self->dev->map_sync = sync;
	Py_RETURN_NONE;
}

static struct sizes *opened_sizes(DeviceObject *self)
{
	if (self->dev->sizes == NULL)
		PyErr_SetString(PyExc_ValueError, "the sizes are not open");
	return self->dev->sizes;
}

static PyObject *device_slots(DeviceObject *self, PyObject *ignored)
{
	struct sizes *s = opened_sizes(self);
	PyObject *list = s == NULL ? NULL : PyList_New(0);

	(void)ignored;
	for (unsigned i = 1; list != NULL && i < s->count; i++) {
		struct slot_values slot;
		int err = sizes_load(s, i, &slot);
		if (err < 0) {
			Py_DECREF(list);
			return none_or_errno(err);
		}
		if (slot.nonce == 0)
			continue;
		PyObject *item = Py_BuildValue(
			"(IKKKKKK)", i, (unsigned long long)slot.nonce,
			(unsigned long long)slot.ino, (unsigned long long)slot.size,
			(unsigned long long)slot.mtime_ns, (unsigned long long)slot.grown,
			(unsigned long long)slot.settled);
		if (item == NULL || PyList_Append(list, item) != 0)
			Py_CLEAR(list);
		Py_XDECREF(item);
	}
	return list;
}

/* (in use, there are); (0, 0) where no file grows. */
static PyObject *get_slot_counts(DeviceObject *self, void *closure)
{
	const struct sizes *s = self->dev->sizes;

	(void)closure;
	if (s == NULL)
		return Py_BuildValue("(II)", 0u, 0u);
	return Py_BuildValue("(II)", atomic_load(&s->used), s->count - 1);
}

static PyObject *device_take_slot(DeviceObject *self, PyObject *args)
{
	unsigned long long nonce, ino, size, mtime_ns;

	if (opened_sizes(self) == NULL ||
	    !PyArg_ParseTuple(args, "KKKK", &nonce, &ino, &size, &mtime_ns))
		return NULL;
	int number = sizes_take(self->dev->sizes, nonce, ino, size, mtime_ns);
	return number < 0 ? none_or_errno(number) : PyLong_FromLong(number);
}

static PyObject *device_give_slot_back(DeviceObject *self, PyObject *arg)
{
	unsigned long number = PyLong_AsUnsignedLong(arg);

	if (PyErr_Occurred() || opened_sizes(self) == NULL)
		return NULL;
	if (number == 0 || number >= self->dev->sizes->count)
		return none_or_errno(-EINVAL);
	sizes_give_back(self->dev->sizes, (unsigned)number);
	Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
	{"open_sizes", (PyCFunction)device_open_sizes, METH_VARARGS, NULL},
	{"slots", (PyCFunction)device_slots, METH_NOARGS, NULL},
	{"take_slot", (PyCFunction)device_take_slot, METH_VARARGS, NULL},
	{"give_slot_back", (PyCFunction)device_give_slot_back, METH_O, NULL},
	{"latencies", (PyCFunction)device_latencies, METH_NOARGS, NULL},
	{"stop", (PyCFunction)device_stop_py, METH_NOARGS, NULL},
	{"add_used", (PyCFunction)device_add_used, METH_O, NULL},
	{NULL, NULL, 0, NULL},
};

static PyGetSetDef members[] = {
	{"used_bytes", (getter)get_used, (setter)set_used, NULL, NULL},
	{"limit_bytes", (getter)get_limit, (setter)set_limit, NULL, NULL},
	{"segment_bytes", (getter)get_segment, (setter)set_segment, NULL, NULL},
	{"stuck_ns", (getter)get_stuck, NULL, NULL, NULL},
	{"queued", (getter)get_queued, NULL, NULL, NULL},
	{"slot_counts", (getter)get_slot_counts, NULL, NULL, NULL},
	{NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
	{Py_tp_new, device_new_py},
	{Py_tp_dealloc, device_dealloc},
	{Py_tp_methods, methods},
	{Py_tp_getset, members},
	{0, NULL},
};

PyType_Spec device_spec = {
	.name = "pafkafs._native.Device",
	.basicsize = sizeof(DeviceObject),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = slots,
};

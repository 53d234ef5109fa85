/*
 * module: what the Python types of pafkafs._native share.
 */
#ifndef PAFKAFS_MODULE_H
#define PAFKAFS_MODULE_H

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "device.h"
#include "file.h"
#include "front.h"

typedef struct {
	PyObject_HEAD
	struct device *dev;
} DeviceObject;

typedef struct {
	PyObject_HEAD
	struct front *front;
	int session_fd;
	bool started, stopped;
} FrontObject;

typedef struct {
	PyObject_HEAD
	struct file *file; /* NULL once closed */
	PyObject *front;
} FileObject;

extern PyType_Spec device_spec, front_spec, file_spec;
extern PyMethodDef syscall_methods[];

struct module_state {
	PyTypeObject *device_type, *front_type, *file_type;
};

struct module_state *native_state(void);

/* None for 0, OSError for -errno. */
PyObject *none_or_errno(int result);

#endif

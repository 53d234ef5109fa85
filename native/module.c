#include "module.h"

#include <errno.h>

static struct module_state state;

struct module_state *native_state(void)
{
	return &state;
}

PyObject *none_or_errno(int result)
{
	if (result < 0) {
		errno = -result;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	Py_RETURN_NONE;
}

static PyTypeObject *add_type(PyObject *m, PyType_Spec *spec)
{
	PyObject *type = PyType_FromSpec(spec);

	if (type == NULL || PyModule_AddType(m, (PyTypeObject *)type) != 0)
		return NULL;
	return (PyTypeObject *)type;
}

static struct PyModuleDef native_module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "pafkafs._native",
	.m_doc = "The data path of pafkafs: the kernel connection and open files.",
	.m_size = -1,
	.m_methods = syscall_methods,
};

PyMODINIT_FUNC PyInit__native(void);

PyMODINIT_FUNC PyInit__native(void)
{
	PyObject *m = PyModule_Create(&native_module);

	if (m == NULL)
		return NULL;
	state.device_type = add_type(m, &device_spec);
	state.front_type = add_type(m, &front_spec);
	state.file_type = add_type(m, &file_spec);
	if (state.device_type == NULL || state.front_type == NULL || state.file_type == NULL ||
	    PyModule_AddIntConstant(m, "EVENT_NO_ROOM", EVENT_NO_ROOM) != 0 ||
	    PyModule_AddIntConstant(m, "EVENT_QUIET", EVENT_QUIET) != 0 ||
	    PyModule_AddIntConstant(m, "EVENT_OBJECT_ERROR", EVENT_OBJECT_ERROR) != 0 ||
	    PyModule_AddIntConstant(m, "EVENT_RECONCILED", EVENT_RECONCILED) != 0 ||
	    PyModule_AddIntConstant(m, "EVENT_IO_ERROR", EVENT_IO_ERROR) != 0 ||
	    PyModule_AddIntConstant(m, "EVENT_READY", EVENT_READY) != 0 ||
	    PyModule_AddIntConstant(m, "EVENT_ENDED", EVENT_ENDED) != 0 ||
	    PyModule_AddIntConstant(m, "EVENT_SEAL", EVENT_SEAL) != 0 ||
	    PyModule_AddIntConstant(m, "EVENT_WRITTEN", EVENT_WRITTEN) != 0 ||
	    PyModule_AddStringConstant(m, "NONCE_ATTRIBUTE", NONCE_ATTRIBUTE) != 0) {
		Py_DECREF(m);
		return NULL;
	}
	return m;
}

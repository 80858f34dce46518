/* The one place that includes Python.h, inside the Limited API of 3.11. */
#ifndef OPGUARD_PY_PYTHON_H
#define OPGUARD_PY_PYTHON_H

#define PY_SSIZE_T_CLEAN
#ifndef Py_GIL_DISABLED
#define Py_LIMITED_API 0x030b0000
#endif
#include <Python.h>

#include "core/base.h"

#endif

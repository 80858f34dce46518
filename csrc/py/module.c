/* opguard._C: puts the families together. What a family offers is in its own
 * file; nothing but the module's life cycle is here. */
#include "py/state.h"

static const og_family *const families[] = {
    &og_ops_family,        &og_sanitize_family,    &og_detach_family,
    &og_guards_family,     &og_files_family,       &og_flags_family,
    &og_arena_family,      &og_pool_ledger_family, &og_pool_pages_family,
    &og_pool_lease_family,
};

#define FAMILY_COUNT (sizeof families / sizeof *families)

static int
no_memory(void)
{
    PyErr_NoMemory();
    return -1;
}

static int
module_exec(PyObject *module)
{
    og_state *state = og_state_get(module);
    for (size_t i = 0; i < FAMILY_COUNT; i++) {
        const og_family *family = families[i];
        if (family->methods != NULL &&
            PyModule_AddFunctions(module, family->methods) < 0) {
            return -1;
        }
        if (family->exec != NULL && family->exec(module, state) < 0) {
            /* PyStructSequence_NewType runs out of memory without a word. */
            return PyErr_Occurred() != NULL ? -1 : no_memory();
        }
    }
    return 0;
}

static int
module_traverse(PyObject *module, visitproc visit, void *arg)
{
    og_state *state = og_state_get(module);
    for (size_t i = 0; state != NULL && i < FAMILY_COUNT; i++) {
        if (families[i]->traverse != NULL) {
            int result = families[i]->traverse(state, visit, arg);
            if (result != 0) {
                return result;
            }
        }
    }
    return 0;
}

static int
module_clear(PyObject *module)
{
    og_state *state = og_state_get(module);
    for (size_t i = 0; state != NULL && i < FAMILY_COUNT; i++) {
        if (families[i]->clear != NULL) {
            (void)families[i]->clear(state);
        }
    }
    return 0;
}

static void
module_free(void *module)
{
    (void)module_clear((PyObject *)module);
}

static PyModuleDef_Slot module_slots[] = {
    {Py_mod_exec, (void *)module_exec},
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_USED},
#endif
    {0, NULL},
};

PyDoc_STRVAR(module_doc,
             "The C core of opguard; use it through the package opguard.");

static struct PyModuleDef module_def = {
    PyModuleDef_HEAD_INIT,   .m_name = "opguard._C",
    .m_doc = module_doc,     .m_size = sizeof(og_state),
    .m_slots = module_slots, .m_traverse = module_traverse,
    .m_clear = module_clear, .m_free = module_free,
};

PyMODINIT_FUNC
PyInit__C(void);

PyMODINIT_FUNC
PyInit__C(void)
{
    return PyModuleDef_Init(&module_def);
}

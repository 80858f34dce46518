/* Who holds which modules in eval or train mode.
 *
 * Every lease is registered before it looks at its modules, so that another
 * thread that wants the opposite meets it. Where all is in the wanted mode
 * already nothing else is done. What a lease has changed it puts back when it
 * ends, unless a lease that still runs needs it as it is: the duty is then
 * handed over. While a tree is being switched, which may call the `train` of
 * user classes, other threads wait at a lock. */
#include "py/state.h"
#include "py/walk.h"

#define LOCK_MICROSECONDS 10000000

/* The collector has cleared the module and its lock: a guard that it frees
 * later has nobody left to put modes back for. */
static bool
is_cleared(const og_guards_state *guards)
{
    return guards->name_training == NULL || guards->lock == NULL;
}

static int
lock_leases(og_guards_state *guards)
{
    unsigned long self = PyThread_get_thread_ident();
    if (guards->lock_depth > 0 && guards->lock_owner == self) {
        guards->lock_depth++;
        return 0;
    }
    if (PyThread_acquire_lock_timed(guards->lock, 0, 0) != PY_LOCK_ACQUIRED) {
        PyLockStatus status;
        Py_BEGIN_ALLOW_THREADS
            status = PyThread_acquire_lock_timed(guards->lock,
                                                 LOCK_MICROSECONDS, 0);
        Py_END_ALLOW_THREADS
        if (status != PY_LOCK_ACQUIRED) {
            PyErr_SetString(
                PyExc_RuntimeError,
                "expected another thread to finish switching a model between "
                "train and eval within 10 s, it has not; look for a train() "
                "method that waits for a guard");
            return -1;
        }
    }
    guards->lock_owner = self;
    guards->lock_depth = 1;
    return 0;
}

static void
unlock_leases(og_guards_state *guards)
{
    if (--guards->lock_depth == 0) {
        PyThread_release_lock(guards->lock);
    }
}

/* Waits for another thread that is switching; a look where there is none. */
static int
await_switching(og_guards_state *guards)
{
    if (guards->lock_depth == 0 ||
        guards->lock_owner == PyThread_get_thread_ident()) {
        return 0;
    }
    if (lock_leases(guards) < 0) {
        return -1;
    }
    unlock_leases(guards);
    return 0;
}

static void
link_lease(og_guards_state *guards, og_lease *lease)
{
    lease->next = NULL;
    lease->previous = guards->newest;
    *(guards->newest == NULL ? &guards->oldest : &guards->newest->next) =
        lease;
    guards->newest = lease;
    lease->serial = ++guards->generation;
}

static void
unlink_lease(og_guards_state *guards, og_lease *lease)
{
    *(lease->previous == NULL ? &guards->oldest : &lease->previous->next) =
        lease->next;
    *(lease->next == NULL ? &guards->newest : &lease->next->previous) =
        lease->previous;
    lease->next = lease->previous = NULL;
    guards->generation++;
}

static void
free_lease(og_lease *lease)
{
    for (size_t i = 0; i < lease->count; i++) {
        Py_DECREF(lease->changes[i].module);
    }
    PyMem_Free(lease->changes);
    Py_XDECREF(lease->roots);
    PyMem_Free(lease);
}

static int
reserve_changes(og_lease *lease, size_t capacity)
{
    if (capacity <= lease->capacity) {
        return 0;
    }
    og_change *changes =
        PyMem_Realloc(lease->changes, capacity * sizeof *changes);
    if (changes == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    lease->changes = changes;
    lease->capacity = capacity;
    return 0;
}

static int
add_change(og_lease *lease, PyObject *module, bool before)
{
    if (lease->count == lease->capacity &&
        reserve_changes(lease, lease->capacity * 2 + 16) < 0) {
        return -1;
    }
    lease->changes[lease->count++] = (og_change){Py_NewRef(module), before};
    return 0;
}

/* Switches one module: by its own train() where it has one. */
static int
switch_module(og_guards_state *guards, PyObject *module, bool mode)
{
    PyObject *value = mode ? Py_True : Py_False;
    int own = og_module_own_train(guards, module);
    if (own < 0) {
        return -1;
    }
    if (own) {
        PyObject *done = PyObject_CallMethodObjArgs(module, guards->name_train,
                                                    value, NULL);
        Py_XDECREF(done);
        return done == NULL ? -1 : 0;
    }
    PyObject *dict = PyObject_GenericGetDict(module, NULL);
    int result =
        dict == NULL ? -1 : PyDict_SetItem(dict, guards->name_training, value);
    Py_XDECREF(dict);
    return result;
}

/* As switch_module, but a train() that fails leaves `training` set all the
 * same: 0, or -1 with its exception set. */
static int
force_module(og_guards_state *guards, PyObject *module, bool mode)
{
    if (switch_module(guards, module, mode) == 0) {
        return 0;
    }
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *dict = PyObject_GenericGetDict(module, NULL);
    if (dict == NULL ||
        (PyDict_GetItemWithError(dict, guards->name_training) != NULL &&
         PyDict_SetItem(dict, guards->name_training,
                        mode ? Py_True : Py_False) < 0)) {
        PyErr_WriteUnraisable(module);
    }
    Py_XDECREF(dict);
    PyErr_Restore(type, value, trace);
    return -1;
}

static int
raise_conflict(PyObject *module, bool mode)
{
    PyErr_Format(PyExc_RuntimeError,
                 "expected to put %R into %s mode, another thread's guard "
                 "holds it in %s mode; give each thread a model of its own, "
                 "or the same train_mode",
                 Py_TYPE(module), mode ? "train" : "eval",
                 mode ? "eval" : "train");
    return -1;
}

/* -1 with a sentence when another thread holds what is to be switched. */
static int
check_conflicts(og_guards_state *guards, const og_lease *lease,
                const og_tree *tree, const signed char *before)
{
    og_tree held = {NULL, 0, 0, NULL, 0};
    for (og_lease *other = guards->oldest; other != NULL;) {
        if (other->mode != lease->mode && other->thread != lease->thread) {
            uint64_t generation = guards->generation;
            if (og_tree_collect(guards, other->roots, &held) < 0) {
                return -1;
            }
            for (size_t i = 0; i < tree->count; i++) {
                if (before[i] != (signed char)lease->mode &&
                    og_tree_has(&held, tree->modules[i])) {
                    og_tree_free(&held);
                    return raise_conflict(tree->modules[i], lease->mode);
                }
            }
            og_tree_free(&held);
            if (generation != guards->generation) {
                other = guards->oldest; /* the list changed: start again */
                continue;
            }
        }
        other = other->next;
    }
    return 0;
}

/* Switches the tree below pile from the top; what is below a module that
 * switches itself is left to it. */
static int
switch_tree(og_guards_state *guards, og_pile *pile, og_tree *seen, bool mode)
{
    PyObject *module;
    int result = 0;
    while (result == 0 && (module = og_pile_pop(pile)) != NULL) {
        int added = og_tree_add(seen, module);
        int own = added > 0 ? og_module_own_train(guards, module) : 0;
        result = added < 0 || own < 0 ? -1 : 0;
        if (result == 0 && added && own) {
            PyObject *alone = PyTuple_Pack(1, module);
            int right =
                alone == NULL ? -1 : og_tree_in_mode(guards, alone, mode);
            Py_XDECREF(alone);
            result = right < 0    ? -1
                     : right == 0 ? switch_module(guards, module, mode)
                                  : 0;
        }
        else if (result == 0 && added) {
            int now = og_module_mode(guards, module);
            result = now < 0            ? -1
                     : now != (int)mode ? switch_module(guards, module, mode)
                                        : 0;
            if (result == 0) {
                result = og_pile_push_children(guards, pile, module);
            }
        }
        Py_DECREF(module);
    }
    return result;
}

/* Notes in lease which modules of tree are not as they were before. */
static int
note_changes(og_guards_state *guards, og_lease *lease, const og_tree *tree,
             const signed char *before)
{
    for (size_t i = 0; i < tree->count; i++) {
        int now = og_module_mode(guards, tree->modules[i]);
        if (now < 0 || (now != before[i] &&
                        add_change(lease, tree->modules[i], before[i]) < 0)) {
            return -1;
        }
    }
    return 0;
}

static int
put_back_all(og_guards_state *guards, og_lease *lease)
{
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    for (size_t i = 0; i < lease->count; i++) {
        const og_change *change = &lease->changes[i];
        int now = og_module_mode(guards, change->module);
        if (now < 0 ||
            (now != (int)change->before &&
             switch_module(guards, change->module, change->before) < 0)) {
            if (type == NULL) {
                PyErr_Fetch(&type, &value, &trace);
            }
            else {
                PyErr_WriteUnraisable(change->module);
            }
        }
    }
    int result = type == NULL ? 0 : -1;
    PyErr_Restore(type, value, trace);
    return result;
}

/* The slow road: something has to change. The lock is held. */
static int
switch_lease(og_guards_state *guards, og_lease *lease)
{
    og_tree tree = {NULL, 0, 0, NULL, 0}, seen = {NULL, 0, 0, NULL, 0};
    og_pile pile = {NULL, 0, 0};
    signed char *before = NULL;
    int result = -1;
    if (og_tree_collect(guards, lease->roots, &tree) < 0) {
        return -1;
    }
    before = PyMem_Malloc(tree.count + 1);
    if (before == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    /* Nothing is switched before there is room to remember it. */
    if (reserve_changes(lease, tree.count) < 0) {
        goto done;
    }
    for (size_t i = 0; i < tree.count; i++) {
        int mode = og_module_mode(guards, tree.modules[i]);
        if (mode < 0) {
            goto done;
        }
        before[i] = (signed char)mode;
    }
    if (check_conflicts(guards, lease, &tree, before) < 0 ||
        og_pile_push_roots(&pile, lease->roots) < 0) {
        goto done;
    }
    result = switch_tree(guards, &pile, &seen, lease->mode);
    if (result == 0) {
        result = note_changes(guards, lease, &tree, before);
    }
    else {
        PyObject *type, *value, *trace;
        PyErr_Fetch(&type, &value, &trace);
        if (note_changes(guards, lease, &tree, before) < 0) {
            PyErr_WriteUnraisable(lease->roots);
        }
        PyErr_Restore(type, value, trace);
    }
    if (result < 0) {
        (void)put_back_all(guards, lease);
    }
done:
    PyMem_Free(before);
    og_pile_free(&pile);
    og_tree_free(&seen);
    og_tree_free(&tree);
    return result;
}

og_lease *
og_lease_take(og_guards_state *guards, PyObject *roots, bool mode)
{
    if (is_cleared(guards)) {
        PyErr_SetString(PyExc_RuntimeError,
                        "expected opguard's module to be alive, the "
                        "interpreter has cleared it; leave guards before it "
                        "ends");
        return NULL;
    }
    if (await_switching(guards) < 0) {
        return NULL;
    }
    og_lease *lease = PyMem_Calloc(1, sizeof *lease);
    if (lease == NULL) {
        PyErr_NoMemory();
        return NULL;
    }
    lease->roots = Py_NewRef(roots);
    lease->mode = mode;
    lease->thread = PyThread_get_thread_ident();
    link_lease(guards, lease);
    int right = og_tree_in_mode(guards, roots, mode);
    if (right == 0) {
        right = lock_leases(guards);
        if (right == 0) {
            right = switch_lease(guards, lease);
            unlock_leases(guards);
        }
    }
    if (right < 0) {
        unlink_lease(guards, lease);
        free_lease(lease);
        return NULL;
    }
    return lease;
}

/* What the leases still running cover, as of one generation. */
typedef struct covers {
    og_lease **leases;
    og_tree *trees;
    size_t *counts; /* changes each had when this was made */
    size_t count;
    uint64_t generation;
} covers;

static void
free_covers(covers *all)
{
    for (size_t i = 0; i < all->count; i++) {
        og_tree_free(&all->trees[i]);
    }
    PyMem_Free(all->leases);
    PyMem_Free(all->trees);
    PyMem_Free(all->counts);
    *all = (covers){NULL, NULL, NULL, 0, 0};
}

static int
find_covers(og_guards_state *guards, covers *all)
{
    size_t count = 0;
    free_covers(all);
    for (og_lease *other = guards->oldest; other != NULL;
         other = other->next) {
        count++;
    }
    all->leases = PyMem_Calloc(count + 1, sizeof *all->leases);
    all->trees = PyMem_Calloc(count + 1, sizeof *all->trees);
    all->counts = PyMem_Calloc(count + 1, sizeof *all->counts);
    all->generation = guards->generation;
    if (all->leases == NULL || all->trees == NULL || all->counts == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    og_lease *other = guards->oldest;
    for (; other != NULL && all->count < count; other = other->next) {
        size_t i = all->count;
        all->leases[i] = other;
        all->counts[i] = other->count;
        if (og_tree_collect(guards, other->roots, &all->trees[i]) < 0) {
            return -1;
        }
        all->count++;
        if (all->generation != guards->generation) {
            break; /* changed meanwhile: what is known is made again */
        }
    }
    return 0;
}

static og_change *
find_change(og_lease *lease, size_t count, PyObject *module)
{
    for (size_t i = 0; i < count && i < lease->count; i++) {
        if (lease->changes[i].module == module) {
            return &lease->changes[i];
        }
    }
    return NULL;
}

/* The leases on one module are a pile: the newest says its mode, and each
 * that changed it knows what was there before. One that goes from the middle
 * hands what it knows to the next above. 1: done; 0: it was on top; -1. */
static int
hand_over(const covers *all, const og_change *change, const og_lease *lease)
{
    for (size_t i = 0; i < all->count; i++) {
        og_lease *above = all->leases[i];
        if (above->serial < lease->serial ||
            !og_tree_has(&all->trees[i], change->module)) {
            continue;
        }
        og_change *theirs = find_change(above, all->counts[i], change->module);
        if (theirs != NULL) {
            theirs->before = change->before;
            return 1;
        }
        return add_change(above, change->module, change->before) < 0 ? -1 : 1;
    }
    return 0;
}

static int
put_back(og_guards_state *guards, covers *all, const og_change *change,
         const og_lease *lease)
{
    int known = 0, handed = 0;
    while (known == 0 && guards->oldest != NULL &&
           all->generation != guards->generation) {
        known = find_covers(guards, all);
    }
    if (known == 0 && guards->oldest != NULL) {
        handed = hand_over(all, change, lease);
        known = handed < 0 ? -1 : 0;
    }
    if (handed > 0) {
        return 0;
    }
    /* Not knowing who else needs it, it is put back: -1 tells why. */
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    int now = og_module_mode(guards, change->module);
    if (now >= 0 && now != (int)change->before) {
        now = force_module(guards, change->module, change->before);
    }
    if (type == NULL) {
        return now < 0 ? -1 : 0;
    }
    if (now < 0) {
        PyErr_WriteUnraisable(change->module);
    }
    PyErr_Restore(type, value, trace);
    return known;
}

int
og_lease_return(og_guards_state *guards, og_lease *lease)
{
    PyObject *type = NULL, *value = NULL, *trace = NULL;
    covers all = {NULL, NULL, NULL, 0, 0};
    if (lease->count == 0 || is_cleared(guards)) {
        unlink_lease(guards, lease);
        free_lease(lease);
        return 0;
    }
    bool locked = lock_leases(guards) == 0;
    if (!locked) {
        PyErr_Fetch(&type, &value, &trace);
    }
    unlink_lease(guards, lease);
    for (size_t i = 0; i < lease->count; i++) {
        if (put_back(guards, &all, &lease->changes[i], lease) < 0) {
            if (type == NULL) {
                PyErr_Fetch(&type, &value, &trace);
            }
            else {
                PyErr_WriteUnraisable(lease->changes[i].module);
            }
        }
    }
    if (locked) {
        unlock_leases(guards);
    }
    free_covers(&all);
    free_lease(lease);
    int result = type == NULL ? 0 : -1;
    PyErr_Restore(type, value, trace);
    return result;
}

int
og_leases_exec(og_guards_state *guards)
{
    guards->lock = PyThread_allocate_lock();
    if (guards->lock == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

void
og_leases_clear(og_guards_state *guards)
{
    if (guards->lock != NULL && guards->lock_depth == 0) {
        PyThread_free_lock(guards->lock);
        guards->lock = NULL;
    }
}

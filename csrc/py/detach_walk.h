/* The walk of detach_to_cpu, shared by the detach_*.c files.
 *
 * The walk goes depth first over a stack of nodes on the heap, linked by
 * `parent`; C never recurses into a container. A node is one container: its
 * children are snapshotted into `items` before any user code runs, and each
 * is replaced there by its detached value.
 *
 * Cycles: a container that can be made empty ("early": list, dict, objects)
 * is handed to whoever meets it again while its node is pending. One that
 * cannot (tuple, frozenset) is waited for: the one that met it notes a wait
 * and is parked when it has seen all its children. Tensors on an accelerator
 * are waited for in the same way, so that all are brought over at once.
 * When a node completes it delivers to those who wait. What still waits at
 * the end is a ring of immutable containers, which gets a sentence. */
#ifndef OPGUARD_PY_DETACH_WALK_H
#define OPGUARD_PY_DETACH_WALK_H

#include "py/state.h"

typedef struct og_node og_node;

typedef struct og_wait {
    og_node *node;
    Py_ssize_t slot;
    struct og_wait *next;
} og_wait;

struct og_node {
    og_node *parent; /* whose child it is; kept valid until the walk ends */
    Py_ssize_t slot; /* which child */
    og_shape *shape; /* counted; NULL for the root of a run */
    og_base base;
    PyObject *source; /* owned; NULL for a root */
    PyObject *early;  /* owned: the result before it is filled, or NULL */
    PyObject *extra;  /* owned: list of attribute names and slots, or the
                         context of a handler; or NULL */
    PyObject **items; /* owned references: content first, then attributes */
    Py_ssize_t count, room, content;
    Py_ssize_t next;    /* first child not looked at */
    Py_ssize_t missing; /* children that are waited for */
    bool changed;       /* some child became another object */
    bool rekeyed;       /* some child at an even place did: a key */
    bool handed;        /* early was given to somebody */
    bool plain;         /* tensor: itself will do when nothing changed */
    bool scanned;       /* off the stack */
    og_wait *waits;
    og_node *older, *newer; /* list of the nodes that live */
};

typedef struct og_memo_entry {
    PyObject *key;   /* owned, so that its address stays its own */
    PyObject *value; /* owned, NULL while pending */
    og_node *node;   /* pending: who makes it */
} og_memo_entry;

typedef struct og_memo {
    og_memo_entry *entries;
    size_t size; /* a power of two, or 0 */
    size_t used;
} og_memo;

typedef struct og_remote {
    PyObject *tensor; /* owned: detached, on its device */
    og_node *node;    /* whose waits it is delivered to */
} og_remote;

typedef struct og_walk {
    og_state *state;
    bool copy;
    bool far;         /* for tests: take host memory for a device */
    PyObject *models; /* borrowed or NULL */
    uintptr_t *owned; /* sorted storage addresses of models, or NULL */
    Py_ssize_t owned_count;
    bool owned_ready;
    PyObject *mode; /* owned: out of inference mode while it lives */
    PyObject *call; /* owned: the `detach` of registered functions */
    og_memo memo;
    og_node *top;
    og_node *nodes;    /* newest */
    og_node *spare;    /* for reuse, linked by parent */
    Py_ssize_t parked; /* nodes off the stack that lack something */
    og_remote *remotes;
    Py_ssize_t remote_count, remote_room;
} og_walk;

/* What became of a child. */
typedef enum og_seen {
    OG_SEEN_ERROR = -1,
    OG_SEEN_DONE,   /* *value is its detached value, a new reference */
    OG_SEEN_PUSHED, /* walk->top is its node */
    OG_SEEN_WAIT    /* a wait was noted */
} og_seen;

/* --- detach_memo.c --- */

/* Borrowed, NULL when absent; valid until the next insert. */
og_memo_entry *
og_memo_find(const og_memo *memo, PyObject *key);
/* value may be NULL (pending); takes new references. key must be absent. */
int
og_memo_insert(og_memo *memo, PyObject *key, PyObject *value, og_node *node);
/* Room for `more` keys, or less when there is no memory: only a hint. */
void
og_memo_hint(og_memo *memo, size_t more);
void
og_memo_free(og_memo *memo);

/* --- detach_shape.c --- */

/* Borrowed from the cache: count it before running user code. value is one
 * of the type's instances. */
og_shape *
og_shape_of(og_state *state, PyObject *value);
og_shape *
og_shape_new(og_base base);
void
og_shape_release(og_shape *shape);
void
og_shape_cache_clear(og_detach_state *detach);

/* --- detach_nodes.c --- */

og_node *
og_node_new(og_walk *walk, og_base base, og_shape *shape, PyObject *source);
/* Takes one reference to item, also when it fails. */
int
og_node_push(og_node *node, PyObject *item);
/* Frees what the node owns; the node itself stays until the walk ends. */
void
og_node_empty(og_node *node);
int
og_node_wait(og_node *on, og_node *waiter, Py_ssize_t slot);
void
og_walk_free(og_walk *walk);

/* --- detach_parts.c: taking apart --- */

/* Snapshots source's children. 1: done; 0: nothing to look for inside. */
int
og_node_expand(og_walk *walk, og_node *node);

/* --- detach_build.c: building again --- */

/* The empty result, borrowed from node; NULL without an exception when the
 * type has none. */
PyObject *
og_node_early(og_walk *walk, og_node *node);
/* The filled result, a new reference. */
PyObject *
og_node_finish(og_walk *walk, og_node *node);

/* --- detach_leaf.c --- */

/* Looks the tensor class's descriptors up when another class was bound. */
int
og_leaf_bind(og_state *state);
/* A tensor of exactly the bound class or Parameter. */
og_seen
og_leaf_exact(og_walk *walk, og_node *node, Py_ssize_t slot, PyObject *tensor,
              PyObject **value);
/* A tensor of any class, by its methods. plain: it would do itself. */
PyObject *
og_leaf_any(og_walk *walk, PyObject *tensor, bool *plain);
/* The at::TensorImpl of a tensor of the bound class or a subclass; NULL
 * without an exception when there is none. */
void *
og_leaf_impl(og_detach_state *detach, PyObject *tensor);
/* Leaves inference mode and grad mode until the walk ends. */
int
og_walk_plain_mode(og_walk *walk);
/* Brings the waiting tensors of accelerators over and delivers them. */
int
og_walk_fetch(og_walk *walk);

/* --- detach_owned.c --- */

/* 1 when tensor's storage is that of a parameter or buffer of the models, 0
 * when not, -1 on error. */
int
og_walk_owns(og_walk *walk, PyObject *tensor);

/* --- detach.c --- */

/* The walk of one value; nested ones share the walk of the outermost. */
PyObject *
og_walk_run(og_walk *walk, PyObject *value);
/* Hands value to the memo and to everybody who waits for node. */
int
og_node_complete(og_walk *walk, og_node *node, PyObject *value);

/* --- detach_path.c --- */

/* Says in the exception where in the value it happened. As a note for
 * errors of tensors and registered functions, whose type matters; as one
 * sentence of ours, with theirs as its cause, for containers. */
void
og_blame_note(og_node *node, Py_ssize_t slot);
void
og_blame_container(og_node *node, Py_ssize_t slot, PyObject *child);
/* Sets a TypeError "<what> at <path>...". format has two %s: path, type. */
void
og_refuse(og_node *node, Py_ssize_t slot, PyObject *child, const char *format);

#endif

/* Module trees read without running Python: `training`, `_modules` and `train`
 * by each module's own __dict__. Explicit stacks; nothing is recursive. */
#ifndef OPGUARD_PY_WALK_H
#define OPGUARD_PY_WALK_H

#include "py/guards.h"

/* The modules of a tree, each once, parents before children; all owned. */
typedef struct og_tree {
    PyObject **modules;
    size_t count, capacity;
    size_t *slots; /* index + 1 of each, hashed by address; 0: free */
    size_t slot_count;
} og_tree;

/* 1: it is in `training` = true, 0: false, -1 with an exception set. */
int
og_module_mode(og_guards_state *guards, PyObject *module);

/* Whether `train` is the module's own and not torch's: its mode is then
 * switched by calling that. -1 with an exception set. */
int
og_module_own_train(og_guards_state *guards, PyObject *module);

/* 1: every module below roots (a tuple) is in mode; 0: one is not; -1. */
int
og_tree_in_mode(og_guards_state *guards, PyObject *roots, bool mode);

/* Fills tree, which is all zero; -1 with an exception set, tree then empty. */
int
og_tree_collect(og_guards_state *guards, PyObject *roots, og_tree *tree);

bool
og_tree_has(const og_tree *tree, PyObject *module);

/* Adds module when it is not there: 1 added, 0 there, -1 with exception. */
int
og_tree_add(og_tree *tree, PyObject *module);

void
og_tree_free(og_tree *tree);

/* A growing stack of owned references. */
typedef struct og_pile {
    PyObject **items;
    size_t count, capacity;
} og_pile;

int
og_pile_push(og_pile *pile, PyObject *item);

/* A new reference, or NULL (no exception) when it is empty. */
PyObject *
og_pile_pop(og_pile *pile);

void
og_pile_free(og_pile *pile);

/* Pushes the children of module. */
int
og_pile_push_children(og_guards_state *guards, og_pile *pile,
                      PyObject *module);

/* Pushes the items of a tuple, last first, so that they pop in order. */
int
og_pile_push_roots(og_pile *pile, PyObject *roots);

#endif

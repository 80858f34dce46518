/* Two small containers for the walks of sanitizing: a map keyed by address
 * and a growing array of owned references. All zero is empty. Memory comes
 * from PyMem_Malloc, so the GIL is needed. */
#ifndef OPGUARD_PY_SANITIZE_MAP_H
#define OPGUARD_PY_SANITIZE_MAP_H

#include "py/python.h"

typedef struct og_map_entry {
    const void *key; /* NULL: free */
    void *value;
} og_map_entry;

typedef struct og_map {
    og_map_entry *entries;
    size_t capacity; /* zero or a power of two */
    size_t used;
} og_map;

/* 1 when key is new, 0 when it was there (its value stays), -1 without
 * memory, with no exception set. Keys and values are borrowed: the caller
 * keeps the objects alive for as long as their addresses are in the map. */
int
og_map_put(og_map *map, const void *key, void *value);

/* The entry of key or NULL; valid until the next put. */
og_map_entry *
og_map_find(const og_map *map, const void *key);

void
og_map_free(og_map *map);

typedef struct og_refs {
    PyObject **items;
    size_t count;
    size_t capacity;
} og_refs;

/* Appends a new reference to object (NULL allowed); -1 without memory, with
 * no exception set and nothing taken. */
int
og_refs_push(og_refs *refs, PyObject *object);

/* Releases everything. */
void
og_refs_free(og_refs *refs);

#endif

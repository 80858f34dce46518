/* Open addressing, linear probing, grown at three quarters. */
#include "py/sanitize_map.h"

#include <string.h>

static size_t
slot_of(const og_map_entry *entries, size_t capacity, const void *key)
{
    size_t mask = capacity - 1;
    uint64_t mixed = (uint64_t)(uintptr_t)key * UINT64_C(0x9E3779B97F4A7C15);
    size_t at = (size_t)(mixed >> 32) & mask;
    while (entries[at].key != NULL && entries[at].key != key) {
        at = (at + 1) & mask;
    }
    return at;
}

static int
map_grow(og_map *map)
{
    size_t capacity = map->capacity == 0 ? 16 : map->capacity * 2;
    og_map_entry *entries = PyMem_Malloc(capacity * sizeof *entries);
    if (entries == NULL) {
        return -1;
    }
    memset(entries, 0, capacity * sizeof *entries);
    for (size_t i = 0; i < map->capacity; i++) {
        if (map->entries[i].key != NULL) {
            entries[slot_of(entries, capacity, map->entries[i].key)] =
                map->entries[i];
        }
    }
    PyMem_Free(map->entries);
    map->entries = entries;
    map->capacity = capacity;
    return 0;
}

int
og_map_put(og_map *map, const void *key, void *value)
{
    if ((map->used + 1) * 4 > map->capacity * 3 && map_grow(map) < 0) {
        return -1;
    }
    og_map_entry *entry =
        &map->entries[slot_of(map->entries, map->capacity, key)];
    if (entry->key != NULL) {
        return 0;
    }
    entry->key = key;
    entry->value = value;
    map->used++;
    return 1;
}

og_map_entry *
og_map_find(const og_map *map, const void *key)
{
    if (map->capacity == 0) {
        return NULL;
    }
    og_map_entry *entry =
        &map->entries[slot_of(map->entries, map->capacity, key)];
    return entry->key == NULL ? NULL : entry;
}

void
og_map_free(og_map *map)
{
    PyMem_Free(map->entries);
    memset(map, 0, sizeof *map);
}

int
og_refs_push(og_refs *refs, PyObject *object)
{
    if (refs->count == refs->capacity) {
        size_t capacity = refs->capacity == 0 ? 16 : refs->capacity * 2;
        PyObject **items =
            PyMem_Realloc(refs->items, capacity * sizeof *items);
        if (items == NULL) {
            return -1;
        }
        refs->items = items;
        refs->capacity = capacity;
    }
    refs->items[refs->count++] = Py_XNewRef(object);
    return 0;
}

void
og_refs_free(og_refs *refs)
{
    /* Releasing may run finalizers; what they see is an empty array. */
    PyObject **items = refs->items;
    size_t count = refs->count;
    memset(refs, 0, sizeof *refs);
    for (size_t i = 0; i < count; i++) {
        Py_XDECREF(items[i]);
    }
    PyMem_Free(items);
}

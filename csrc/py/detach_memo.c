/* The memo of a walk: what each object became, by address. It owns a
 * reference to each key, so that no address is used twice meanwhile. */
#include "py/detach_walk.h"

#define FIRST_SIZE 64

static size_t
place(const og_memo *memo, PyObject *key)
{
    /* Objects are 16 bytes apart; the multiplier spreads what is left. */
    uint64_t hash = ((uint64_t)(uintptr_t)key >> 4) * 0x9E3779B97F4A7C15u;
    size_t i = (size_t)(hash >> 20) & (memo->size - 1);
    while (memo->entries[i].key != NULL && memo->entries[i].key != key) {
        i = (i + 1) & (memo->size - 1);
    }
    return i;
}

og_memo_entry *
og_memo_find(const og_memo *memo, PyObject *key)
{
    if (memo->size == 0) {
        return NULL;
    }
    og_memo_entry *entry = &memo->entries[place(memo, key)];
    return entry->key == NULL ? NULL : entry;
}

static int
resize(og_memo *memo, size_t size)
{
    og_memo bigger = {NULL, size, memo->used};
    if (size > SIZE_MAX / 2 / sizeof *bigger.entries) {
        return -1;
    }
    bigger.entries = PyMem_Calloc(size, sizeof *bigger.entries);
    if (bigger.entries == NULL) {
        return -1;
    }
    for (size_t i = 0; i < memo->size; i++) {
        if (memo->entries[i].key != NULL) {
            bigger.entries[place(&bigger, memo->entries[i].key)] =
                memo->entries[i];
        }
    }
    PyMem_Free(memo->entries);
    *memo = bigger;
    return 0;
}

void
og_memo_hint(og_memo *memo, size_t more)
{
    size_t size = memo->size == 0 ? FIRST_SIZE : memo->size;
    while (size < SIZE_MAX / 4 && (memo->used + more) * 3 > size * 2) {
        size *= 2;
    }
    if (size > memo->size) {
        (void)resize(memo, size);
    }
}

int
og_memo_insert(og_memo *memo, PyObject *key, PyObject *value, og_node *node)
{
    if ((memo->used + 1) * 3 > memo->size * 2 &&
        resize(memo, memo->size == 0 ? FIRST_SIZE : memo->size * 2) < 0) {
        PyErr_NoMemory();
        return -1;
    }
    og_memo_entry *entry = &memo->entries[place(memo, key)];
    entry->key = Py_NewRef(key);
    entry->value = Py_XNewRef(value);
    entry->node = node;
    memo->used++;
    return 0;
}

void
og_memo_free(og_memo *memo)
{
    og_memo old = *memo;
    *memo = (og_memo){NULL, 0, 0};
    for (size_t i = 0; i < old.size; i++) {
        Py_XDECREF(old.entries[i].value);
        Py_XDECREF(old.entries[i].key);
    }
    PyMem_Free(old.entries);
}

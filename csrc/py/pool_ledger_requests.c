/* The methods of `_C.Ledger` that are about owners, leases and requests. */
#include "py/pool_ledger_object.h"

LEDGER_METHOD(add_owner)
{
    int64_t parent = 0, thread = 0, owner = 0;
    og_error error;
    if (og_ledger_arguments("add_owner", count, 0, 2) < 0 ||
        (count > 0 && og_ledger_int(args[0], "parent", &parent) < 0) ||
        (count > 1 && og_ledger_int(args[1], "thread", &thread) < 0)) {
        return NULL;
    }
    if (og_ledger_add_owner(ledger_in(self), parent, thread, &owner, &error) !=
        OG_OK) {
        return og_ledger_raise(&error);
    }
    PyObject *result = PyLong_FromLongLong(owner);
    if (result == NULL) {
        (void)og_ledger_drop_owner(ledger_in(self), owner, NULL);
    }
    return result;
}

LEDGER_METHOD(drop_owner)
{
    int64_t owner;
    og_error error;
    if (og_ledger_arguments("drop_owner", count, 1, 1) < 0 ||
        og_ledger_int(args[0], "owner", &owner) < 0) {
        return NULL;
    }
    if (og_ledger_drop_owner(ledger_in(self), owner, &error) != OG_OK) {
        return og_ledger_raise(&error);
    }
    return Py_NewRef(Py_None);
}

LEDGER_METHOD(forfeit)
{
    int64_t owner;
    og_error error;
    if (og_ledger_arguments("forfeit", count, 1, 1) < 0 ||
        og_ledger_int(args[0], "owner", &owner) < 0) {
        return NULL;
    }
    int result = og_ledger_forfeit(ledger_in(self), owner, &error);
    return og_ledger_bool(result, &error);
}

LEDGER_METHOD(enter)
{
    int64_t owner, tick = 0;
    og_error error;
    og_numbers units;
    if (og_ledger_arguments("enter", count, 2, 3) < 0 ||
        og_ledger_int(args[0], "owner", &owner) < 0 ||
        (count > 2 && og_ledger_int(args[2], "tick", &tick) < 0)) {
        return NULL;
    }
    PyObject *result = NULL;
    if (og_ledger_numbers(args[1], "units", &units) == 0) {
        int entered = og_ledger_enter(ledger_in(self), owner, units.at,
                                      units.count, tick, &error);
        result = og_ledger_bool(entered, &error);
    }
    og_numbers_release(&units);
    return result;
}

LEDGER_METHOD(leave)
{
    int64_t owner;
    og_error error;
    og_numbers units;
    og_extras extras;
    if (og_ledger_arguments("leave", count, 2, 3) < 0 ||
        og_ledger_int(args[0], "owner", &owner) < 0) {
        return NULL;
    }
    PyObject *result = NULL;
    int failed = og_ledger_numbers(args[1], "units", &units);
    if (og_ledger_extras(count > 2 && failed == 0 ? args[2] : NULL, &extras) <
            0 ||
        failed < 0) {
        goto done;
    }
    int pump = og_ledger_leave(ledger_in(self), owner, units.at, units.count,
                               extras.at, extras.count, &error);
    result = og_ledger_bool(pump, &error);
done:
    og_numbers_release(&units);
    og_extras_release(&extras);
    return result;
}

/* --- requests --- */

static PyObject *
build_answer(PyTypeObject *type, const og_pool_answer *from)
{
    PyObject *values[] = {
        PyLong_FromLong(from->verdict),
        PyLong_FromLongLong(from->verdict == OG_POOL_WAIT ? from->ticket : 0),
        og_ledger_tuple(from->evict, from->evict_count),
        og_ledger_tuple(from->load, from->load_count),
        og_ledger_tuple(from->pending, from->pending_count),
        og_ledger_holder_tuple(from->holders, from->holder_count, false),
        PyLong_FromLongLong(from->need),
        PyLong_FromLongLong(from->have),
        PyLong_FromLongLong(from->pool),
    };
    return og_ledger_record(type, values, 9);
}

/* The answer of a ticket, which ends unless it waits. When that cannot be
 * told, the ticket stays for another try, or is cancelled. */
static PyObject *
answer_of(PyObject *self, int64_t ticket, bool cancel)
{
    og_state *state = (og_state *)PyType_GetModuleState(Py_TYPE(self));
    og_pool_answer answer;
    og_error error;
    PyObject *result = NULL;
    if (og_ledger_answer(ledger_in(self), ticket, &answer, &error) != OG_OK) {
        result = og_ledger_raise(&error);
        goto done;
    }
    result = build_answer(state->pool_ledger.answer_type, &answer);
    bool waits = answer.verdict == OG_POOL_WAIT;
    og_pool_answer_clear(&answer);
    if (result != NULL && !waits &&
        og_ledger_take(ledger_in(self), ticket, &error) != OG_OK) {
        Py_DECREF(result);
        result = og_ledger_raise(&error);
    }
done:
    if (result == NULL && cancel) {
        (void)og_ledger_cancel(ledger_in(self), ticket, NULL);
    }
    return result;
}

LEDGER_METHOD(request)
{
    int64_t owner, tick = 0, flags = 0, ticket;
    og_error error;
    og_numbers units;
    og_extras extras;
    if (og_ledger_arguments("request", count, 2, 5) < 0 ||
        og_ledger_int(args[0], "owner", &owner) < 0 ||
        (count > 3 && og_ledger_int(args[3], "tick", &tick) < 0) ||
        (count > 4 && og_ledger_int(args[4], "flags", &flags) < 0)) {
        return NULL;
    }
    int64_t known = OG_POOL_TRY | OG_POOL_BLOCKS_THREAD | OG_POOL_ENDS;
    if ((flags & ~known) != 0) {
        PyErr_Format(PyExc_ValueError,
                     "expected flags among POOL_TRY, POOL_BLOCKS_THREAD and "
                     "POOL_ENDS, added, got %lld",
                     (long long)flags);
        return NULL;
    }
    PyObject *result = NULL;
    int failed = og_ledger_numbers(args[1], "units", &units);
    if (og_ledger_extras(count > 2 && failed == 0 ? args[2] : NULL, &extras) <
            0 ||
        failed < 0) {
        goto done;
    }
    if (og_ledger_request(ledger_in(self), owner, units.at, units.count,
                          extras.at, extras.count, tick, (int)flags, &ticket,
                          &error) != OG_OK) {
        result = og_ledger_raise(&error);
        goto done;
    }
    result = answer_of(self, ticket, true);
done:
    og_numbers_release(&units);
    og_extras_release(&extras);
    return result;
}

LEDGER_METHOD(pump)
{
    int64_t tick = 0;
    if (og_ledger_arguments("pump", count, 0, 1) < 0 ||
        (count > 0 && og_ledger_int(args[0], "tick", &tick) < 0)) {
        return NULL;
    }
    og_ledger *ledger = ledger_in(self);
    size_t news = og_ledger_pump(ledger, tick);
    int64_t *tickets = PyMem_Malloc((news + 1) * sizeof *tickets);
    if (tickets == NULL) {
        return PyErr_NoMemory(); /* the next pump tells of them */
    }
    og_ledger_news(ledger, tickets);
    PyObject *result = og_ledger_tuple(tickets, news);
    for (size_t i = 0; result != NULL && i < news; i++) {
        og_ledger_told(ledger, tickets[i]);
    }
    PyMem_Free(tickets);
    return result;
}

LEDGER_METHOD(take)
{
    int64_t ticket;
    if (og_ledger_arguments("take", count, 1, 1) < 0 ||
        og_ledger_int(args[0], "ticket", &ticket) < 0) {
        return NULL;
    }
    return answer_of(self, ticket, false);
}

LEDGER_METHOD(cancel)
{
    int64_t ticket;
    og_error error;
    if (og_ledger_arguments("cancel", count, 1, 1) < 0 ||
        og_ledger_int(args[0], "ticket", &ticket) < 0) {
        return NULL;
    }
    int pump = og_ledger_cancel(ledger_in(self), ticket, &error);
    return og_ledger_bool(pump, &error);
}

LEDGER_METHOD(set_waits)
{
    og_error error;
    og_numbers numbers;
    PyObject *result = NULL;
    og_pool_await *waits = NULL;
    int64_t asker = 0;
    if (og_ledger_arguments("set_waits", count, 1, 2) < 0 ||
        (count > 1 && og_ledger_int(args[1], "asker", &asker) < 0)) {
        return NULL;
    }
    if (og_ledger_numbers(args[0], "waits", &numbers) < 0) {
        goto done;
    }
    size_t each = numbers.count / 3;
    if (numbers.count % 3 != 0) {
        PyErr_Format(PyExc_ValueError,
                     "expected owner, holder and flags of each wait, got %zu "
                     "numbers",
                     numbers.count);
        goto done;
    }
    waits = PyMem_Malloc((each + 1) * sizeof *waits);
    if (waits == NULL) {
        PyErr_NoMemory();
        goto done;
    }
    for (size_t i = 0; i < each; i++) {
        const int64_t *at = numbers.at + 3 * i;
        waits[i] = (og_pool_await){at[0], at[1], (int)at[2]};
    }
    int ends =
        og_ledger_set_waits(ledger_in(self), waits, each, asker, &error);
    result = og_ledger_bool(ends, &error);
done:
    PyMem_Free(waits);
    og_numbers_release(&numbers);
    return result;
}

static PyObject *
describe_ticket(og_ledger *ledger, int64_t ticket)
{
    int64_t owner, need;
    size_t units;
    og_error error;
    if (og_ledger_queued(ledger, ticket, &owner, &units, NULL, 0, &need,
                         &error) != OG_OK) {
        return og_ledger_raise(&error);
    }
    int64_t *ids = PyMem_Malloc((units + 1) * sizeof *ids);
    if (ids == NULL) {
        return PyErr_NoMemory();
    }
    (void)og_ledger_queued(ledger, ticket, &owner, &units, ids, units, &need,
                           NULL);
    PyObject *list = og_ledger_tuple(ids, units);
    PyMem_Free(ids);
    return list == NULL
               ? NULL
               : Py_BuildValue("(LLNL)", (long long)ticket, (long long)owner,
                               list, (long long)need);
}

LEDGER_METHOD(waiting)
{
    (void)args;
    if (og_ledger_arguments("waiting", count, 0, 0) < 0) {
        return NULL;
    }
    og_ledger *ledger = ledger_in(self);
    size_t length = og_ledger_queue(ledger, NULL, 0);
    int64_t *tickets = PyMem_Malloc((length + 1) * sizeof *tickets);
    if (tickets == NULL) {
        return PyErr_NoMemory();
    }
    (void)og_ledger_queue(ledger, tickets, length);
    PyObject *result = PyList_New(0), *tuple = NULL;
    for (size_t i = 0; result != NULL && i < length; i++) {
        if (og_ledger_queued(ledger, tickets[i], &(int64_t){0}, &(size_t){0},
                             NULL, 0, &(int64_t){0}, NULL) != OG_OK) {
            continue; /* the collector ran and ended it */
        }
        PyObject *item = describe_ticket(ledger, tickets[i]);
        if (item == NULL || PyList_Append(result, item) < 0) {
            Py_CLEAR(result);
        }
        Py_XDECREF(item);
    }
    PyMem_Free(tickets);
    if (result != NULL) {
        tuple = PyList_AsTuple(result);
        Py_DECREF(result);
    }
    return tuple;
}

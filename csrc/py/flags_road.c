/* The short road's conditions and means: flags_road.h. */
#include "py/flags_road.h"

#include "py/detach_walk.h"

/* Severities of the codes, -1 where the configuration's counts: the table of
 * core/batch.c, which is not linked into opguard._C; tests hold them equal. */
static const int8_t severities[16] = {0,  3, 3, 2, -1, 2, 2, 2,
                                      -1, 1, 1, 1, -1, 1, 1, -1};

PyObject *
og_flags_long(PyObject *function, PyObject *const *args, Py_ssize_t count)
{
    PyObject *tuple = NULL, *result = NULL;
    if (function == NULL) {
        PyErr_SetString(PyExc_RuntimeError,
                        "expected the flag functions to be bound, they are "
                        "not; import opguard.flags, which does it");
        return NULL;
    }
    /* The function may bind another in its place. */
    Py_INCREF(function);
    tuple = PyTuple_New(count);
    for (Py_ssize_t i = 0; tuple != NULL && i < count; i++) {
        (void)PyTuple_SetItem(tuple, i, Py_NewRef(args[i]));
    }
    if (tuple != NULL) {
        result = PyObject_Call(function, tuple, NULL);
        Py_DECREF(tuple);
    }
    Py_DECREF(function);
    return result;
}

PyObject *
og_flags_end(int road, PyObject *result, PyObject *function,
             PyObject *const *args, Py_ssize_t count)
{
    if (OG_LIKELY(road == OG_ROAD_SHORT)) {
        return result;
    }
    Py_XDECREF(result);
    return road == OG_ROAD_LONG ? og_flags_long(function, args, count) : NULL;
}

PyObject *
og_flags_told(og_state *state, int road, PyObject *flags)
{
    PyObject *noted = state->flags.noted;
    if (OG_LIKELY(noted == NULL) || road != OG_ROAD_SHORT) {
        return flags;
    }
    Py_INCREF(noted);
    PyObject *same = PyObject_CallFunctionObjArgs(noted, flags, NULL);
    Py_DECREF(noted);
    Py_DECREF(flags);
    return same;
}

int
og_flags_done(og_status status, og_flags_out out, PyObject **result)
{
    if (status != OG_OK) {
        Py_DECREF(out.object);
        return OG_ROAD_LONG;
    }
    *result = out.object;
    return OG_ROAD_SHORT;
}

/* Whether one of torch's questions is answered by 0, False or None. */
static int
answers_no(PyObject *question)
{
    if (question == NULL) {
        return OG_ROAD_LONG;
    }
    PyObject *answer = PyObject_CallNoArgs(question);
    if (answer == NULL) {
        return OG_ROAD_FAILED;
    }
    bool no = answer == Py_None || answer == Py_False ||
              (PyLong_CheckExact(answer) && PyLong_AsLong(answer) == 0);
    Py_DECREF(answer);
    return no ? OG_ROAD_SHORT : OG_ROAD_LONG;
}

int
og_flags_clear_road(og_state *state)
{
    og_flags_state *flags = &state->flags;
    if (state->ops.table == NULL) {
        return OG_ROAD_LONG;
    }
    int road = answers_no(flags->dispatch_modes);
    road = road != OG_ROAD_SHORT ? road : answers_no(flags->functorch);
    road = road != OG_ROAD_SHORT ? road : answers_no(flags->function_modes);
    road = road != OG_ROAD_SHORT ? road : answers_no(flags->tracing);
    if (road == OG_ROAD_SHORT && og_leaf_bind(state) < 0) {
        return OG_ROAD_FAILED;
    }
    return road;
}

int
og_flags_impl(og_state *state, PyObject *object, void **impl)
{
    PyObject *type = (PyObject *)Py_TYPE(object);
    if (!state->detach.fast || type == NULL ||
        (type != state->ops.tensor_type &&
         type != state->ops.parameter_type)) {
        return OG_ROAD_LONG;
    }
    *impl = og_leaf_impl(&state->detach, object);
    return *impl == NULL ? OG_ROAD_FAILED : OG_ROAD_SHORT;
}

int
og_flags_look(og_state *state, PyObject *object, void **impl, og_look *look)
{
    int road = og_flags_impl(state, object, impl);
    if (road != OG_ROAD_SHORT) {
        return road;
    }
    if (state->ops.table->tensor_look(*impl, look) != OG_OK ||
        (look->data == NULL && look->numel > 0)) {
        return OG_ROAD_LONG;
    }
    return OG_ROAD_SHORT;
}

int
og_flags_int(PyObject *object, int64_t *value)
{
    int overflow = 0;
    if (!PyLong_CheckExact(object)) {
        return OG_ROAD_LONG;
    }
    *value = PyLong_AsLongLongAndOverflow(object, &overflow);
    return overflow == 0 ? OG_ROAD_SHORT : OG_ROAD_LONG;
}

/* The id that a module keeps, when it is of the present epoch. */
static int
location_of_object(og_state *state, PyObject *object, int64_t *place)
{
    int64_t epoch = 0;
    PyObject *dict = PyObject_GenericGetDict(object, NULL);
    if (dict == NULL) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError)) {
            return OG_ROAD_FAILED;
        }
        PyErr_Clear();
        return OG_ROAD_LONG;
    }
    PyObject *pair = PyDict_GetItemWithError(dict, state->flags.name_location);
    int road = pair != NULL && PyTuple_CheckExact(pair) &&
                       PyTuple_Size(pair) == 2 && state->flags.epoch != 0
                   ? OG_ROAD_SHORT
                   : OG_ROAD_LONG;
    if (road == OG_ROAD_SHORT) {
        road = og_flags_int(PyTuple_GetItem(pair, 0), &epoch);
    }
    if (road == OG_ROAD_SHORT) {
        road = epoch == state->flags.epoch
                   ? og_flags_int(PyTuple_GetItem(pair, 1), place)
                   : OG_ROAD_LONG;
    }
    Py_DECREF(dict);
    return pair == NULL && PyErr_Occurred() != NULL ? OG_ROAD_FAILED : road;
}

int
og_flags_location(og_state *state, PyObject *object, int64_t *place)
{
    PyObject *resolve = state->flags.resolve, *answer = NULL;
    int road = OG_ROAD_LONG;
    if (object == Py_None) {
        *place = 0;
        return OG_ROAD_SHORT;
    }
    if (PyLong_CheckExact(object)) {
        road = og_flags_int(object, place);
    }
    else if (!PyUnicode_Check(object)) {
        road = location_of_object(state, object, place);
    }
    if (road == OG_ROAD_LONG && !PyLong_Check(object) && resolve != NULL) {
        Py_INCREF(resolve);
        answer = PyObject_CallFunctionObjArgs(resolve, object, NULL);
        Py_DECREF(resolve);
        road = answer == NULL ? OG_ROAD_FAILED : og_flags_int(answer, place);
        Py_XDECREF(answer);
    }
    if (road == OG_ROAD_SHORT && (*place < 0 || *place > OG_LOCATION_MAX)) {
        road = OG_ROAD_LONG;
    }
    return road;
}

int
og_flags_slot(og_state *state, PyObject *location, PyObject *code,
              PyObject *severity, int64_t default_severity, int64_t *slot)
{
    int64_t number = 0, worst = -1, place = 0;
    int road = og_flags_int(code, &number);
    if (road != OG_ROAD_SHORT || number < 0 || number > 15) {
        return OG_ROAD_LONG;
    }
    if (severity == Py_None) {
        worst = severities[number] < 0 ? default_severity : severities[number];
    }
    else if (og_flags_int(severity, &worst) != OG_ROAD_SHORT) {
        return OG_ROAD_LONG;
    }
    if (worst < 0 || worst > OG_SEVERITY_MASK) {
        return OG_ROAD_LONG;
    }
    road = og_flags_location(state, location, &place);
    *slot = og_slot_make((int32_t)place, (int32_t)number, (int32_t)worst);
    return road;
}

int64_t
og_flags_slots(int32_t dtype)
{
    switch (dtype) {
        case OG_TORCH_INT64:
        case OG_TORCH_FLOAT64:
            return 4;
        case OG_TORCH_INT32:
        case OG_TORCH_FLOAT32:
            return 2;
        default:
            return 0;
    }
}

/* --- new tensors --- */

static PyObject *
make_on_host(const og_dlpack_api *api, int64_t rows, int64_t columns,
             int32_t dtype)
{
    bool real = dtype == OG_TORCH_FLOAT32 || dtype == OG_TORCH_FLOAT64;
    int code = dtype == OG_TORCH_BOOL ? OG_DLPACK_BOOL
               : real                 ? OG_DLPACK_FLOAT
                                      : OG_DLPACK_INT;
    int bits = dtype == OG_TORCH_BOOL ? 8 : (int)(16 * og_flags_slots(dtype));
    return og_dlpack_new(api, rows, columns, code, bits, false);
}

int
og_flags_make(og_state *state, int64_t rows, int64_t columns, int32_t dtype,
              const og_look *like, PyObject *like_object, og_flags_out *out)
{
    og_flags_state *flags = &state->flags;
    PyObject *made = NULL;
    if (flags->api != NULL &&
        like->device_type == state->ops.table->device_type_cpu) {
        made = make_on_host(flags->api, rows, columns, dtype);
    }
    else if (flags->empty != NULL) {
        PyObject *empty = Py_NewRef(flags->empty);
        made =
            PyObject_CallFunction(empty, "LLiO", (long long)rows,
                                  (long long)columns, (int)dtype, like_object);
        Py_DECREF(empty);
    }
    else {
        return OG_ROAD_LONG;
    }
    if (made == NULL) {
        return OG_ROAD_FAILED;
    }
    int road = og_flags_impl(state, made, &out->impl);
    if (road == OG_ROAD_SHORT) {
        out->object = made;
    }
    else {
        Py_DECREF(made);
    }
    return road;
}

int
og_flags_make_like(og_state *state, const og_look *look, PyObject *object,
                   og_flags_out *out)
{
    if (look->ndim != 2 || og_flags_slots(look->dtype) == 0 ||
        look->sizes[1] == 0) {
        return OG_ROAD_LONG;
    }
    return og_flags_make(state, look->sizes[0], look->sizes[1], look->dtype,
                         look, object, out);
}

int
og_flags_make_new(og_state *state, int64_t key, const og_look *like,
                  PyObject *like_object, og_flags_out *out)
{
    static const int32_t carriers[4] = {OG_TORCH_INT64, OG_TORCH_INT32,
                                        OG_TORCH_FLOAT64, OG_TORCH_FLOAT32};
    if (!og_policy_key_ok(key)) {
        return OG_ROAD_LONG;
    }
    og_policy policy = og_policy_of(key);
    int32_t dtype = carriers[policy.carrier];
    int64_t slots = og_flags_slots(dtype);
    int64_t words = (policy.num_slots + slots - 1) / slots;
    int64_t samples = like->ndim == 0 ? 1 : like->sizes[0];
    return og_flags_make(state, samples, words, dtype, like, like_object, out);
}

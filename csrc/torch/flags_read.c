/* Reads and checks the tensors of a flag op. A shim call costs about 5 ns, so
 * each thing is asked for once. */
#include "torch/flags_read.h"

typedef struct dtype_row {
    const char *name; /* NULL: none of ours */
    og_scan_kind kind;
    int32_t slots;   /* in one word, when it is a carrier */
    int32_t integer; /* bytes, when it is an integer and not bool */
    bool is_signed;
} dtype_row;

/* clang-format off */
static const dtype_row dtypes[] = {
    [OG_DTYPE_UINT8] = {"uint8", OG_SCAN_NONE, 0, 1, false},
    [OG_DTYPE_INT8] = {"int8", OG_SCAN_NONE, 0, 1, true},
    [OG_DTYPE_INT16] = {"int16", OG_SCAN_NONE, 0, 2, true},
    [OG_DTYPE_INT32] = {"int32", OG_SCAN_NONE, 2, 4, true},
    [OG_DTYPE_INT64] = {"int64", OG_SCAN_NONE, 4, 8, true},
    [OG_DTYPE_FLOAT16] = {"float16", OG_SCAN_F16, 0, 0, false},
    [OG_DTYPE_FLOAT32] = {"float32", OG_SCAN_F32, 2, 0, false},
    [OG_DTYPE_FLOAT64] = {"float64", OG_SCAN_F64, 4, 0, false},
    [OG_DTYPE_COMPLEX32] = {"complex32", OG_SCAN_C32, 0, 0, false},
    [OG_DTYPE_COMPLEX64] = {"complex64", OG_SCAN_C64, 0, 0, false},
    [OG_DTYPE_COMPLEX128] = {"complex128", OG_SCAN_C128, 0, 0, false},
    [OG_DTYPE_BOOL] = {"bool", OG_SCAN_NONE, 0, 0, false},
    [OG_DTYPE_BFLOAT16] = {"bfloat16", OG_SCAN_BF16, 0, 0, false},
    [OG_DTYPE_FLOAT8_E5M2] = {"float8_e5m2", OG_SCAN_F8_E5M2, 0, 0, false},
    [OG_DTYPE_FLOAT8_E4M3FN] =
        {"float8_e4m3fn", OG_SCAN_F8_E4M3FN, 0, 0, false},
    [OG_DTYPE_FLOAT8_E5M2FNUZ] =
        {"float8_e5m2fnuz", OG_SCAN_F8_FNUZ, 0, 0, false},
    [OG_DTYPE_FLOAT8_E4M3FNUZ] =
        {"float8_e4m3fnuz", OG_SCAN_F8_FNUZ, 0, 0, false},
    [OG_DTYPE_UINT16] = {"uint16", OG_SCAN_NONE, 0, 2, false},
    [OG_DTYPE_UINT32] = {"uint32", OG_SCAN_NONE, 0, 4, false},
    [OG_DTYPE_UINT64] = {"uint64", OG_SCAN_NONE, 0, 8, false},
    [OG_DTYPE_FLOAT8_E8M0FNU] =
        {"float8_e8m0fnu", OG_SCAN_F8_E8M0, 0, 0, false},
};
/* clang-format on */

static const dtype_row *
dtype_find(int32_t dtype)
{
    static const dtype_row none = {.name = "another dtype"};
    size_t index = (size_t)(uint32_t)dtype;
    bool ours =
        index < sizeof dtypes / sizeof *dtypes && dtypes[index].name != NULL;
    return ours ? &dtypes[index] : &none;
}

const char *
og_dtype_name(int32_t dtype)
{
    return dtype_find(dtype)->name;
}

int32_t
og_dtype_slots(int32_t dtype)
{
    return dtype_find(dtype)->slots;
}

og_scan_kind
og_dtype_kind(int32_t dtype)
{
    return dtype_find(dtype)->kind;
}

int32_t
og_dtype_integer(int32_t dtype, bool *is_signed)
{
    *is_signed = dtype_find(dtype)->is_signed;
    return dtype_find(dtype)->integer;
}

og_status
og_dtypes_agree(og_error *err)
{
    const struct {
        int32_t ours, torchs;
    } pairs[] = {
        {OG_DTYPE_UINT8, aoti_torch_dtype_uint8()},
        {OG_DTYPE_INT32, aoti_torch_dtype_int32()},
        {OG_DTYPE_INT64, aoti_torch_dtype_int64()},
        {OG_DTYPE_FLOAT32, aoti_torch_dtype_float32()},
        {OG_DTYPE_BOOL, aoti_torch_dtype_bool()},
        {OG_DTYPE_BFLOAT16, aoti_torch_dtype_bfloat16()},
        {OG_DTYPE_FLOAT8_E4M3FNUZ, aoti_torch_dtype_float8_e4m3fnuz()},
        {OG_DTYPE_UINT64, aoti_torch_dtype_uint64()},
    };
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) {
        if (pairs[i].ours != pairs[i].torchs) {
            return og_fail(err, OG_NOT_FOUND,
                           "expected a torch whose %s has number %d, here it "
                           "is %d; install a newer opguard",
                           og_dtype_name(pairs[i].ours), (int)pairs[i].ours,
                           (int)pairs[i].torchs);
        }
    }
    return OG_OK;
}

static og_status
read_data(AtenTensorHandle handle, bool writable, void **data, og_error *err)
{
    const void *only_read = NULL;
    OgShimCode code = writable ? torch_get_mutable_data_ptr(handle, data)
                               : torch_get_const_data_ptr(handle, &only_read);
    if (!writable) {
        *data = (void *)(uintptr_t)only_read;
    }
    return og_shim_check(code, "reading a tensor's address", err);
}

bool
og_tensor_has_elements(const og_tensor *t)
{
    for (int64_t d = 0; d < t->ndim; d++) {
        if (t->sizes[d] == 0) {
            return false;
        }
    }
    return true;
}

/* All that is asked of torch about one tensor. */
static bool
ask_torch(og_tensor *t, AtenTensorHandle handle, bool writable)
{
    int64_t *sizes = NULL, *strides = NULL;
    t->device_index = 0;
    if (aoti_torch_get_dim(handle, &t->ndim) != 0 ||
        aoti_torch_get_sizes(handle, &sizes) != 0 ||
        aoti_torch_get_strides(handle, &strides) != 0 ||
        aoti_torch_get_dtype(handle, &t->dtype) != 0 ||
        aoti_torch_get_device_type(handle, &t->device_type) != 0 ||
        read_data(handle, writable, &t->data, NULL) != OG_OK) {
        return false;
    }
    t->sizes = sizes;
    t->strides = strides;
    return t->device_type == OG_DEVICE_CPU ||
           aoti_torch_get_device_index(handle, &t->device_index) == 0;
}

og_status
og_tensor_read(og_tensor *t, AtenTensorHandle handle, bool writable,
               const char *name, og_error *err)
{
    static const int64_t one[1] = {1};
    if (!ask_torch(t, handle, writable)) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected %s to be a strided tensor that has memory; "
                       "make it dense first",
                       name);
    }
    if (t->device_type != OG_DEVICE_CPU && t->device_type != OG_DEVICE_CUDA) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected %s on the CPU or a CUDA device, it is on "
                       "another kind; copy it to the CPU first",
                       name);
    }
    if (t->ndim == 0) {
        t->ndim = 1;
        t->sizes = t->strides = one;
    }
    if (t->data == NULL && og_tensor_has_elements(t)) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected %s to have memory, it has none; a fake or "
                       "functorch tensor goes through torch.ops.opguard",
                       name);
    }
    return OG_OK;
}

og_status
og_tensor_new(int64_t ndim, const int64_t *sizes, int32_t dtype,
              int32_t device_type, int32_t device_index, AtenTensorHandle *out,
              og_error *err)
{
    int64_t strides[2] = {1, 1};
    if (ndim == 2) {
        strides[0] = sizes[1];
    }
    return og_shim_check(
        aoti_torch_empty_strided(ndim, sizes, strides, dtype, device_type,
                                 device_index, out),
        "allocating a result", err);
}

/* (N, W) with W > 0 of one of the four carriers. */
static og_status
check_layout(const og_tensor *t, const char *name, og_error *err)
{
    if (t->ndim != 2 || t->sizes[1] < 1) {
        return og_fail(err, OG_BAD_LAYOUT,
                       "expected %s of shape (N, W) with W > 0, got %s; make "
                       "flags with err.new",
                       name, t->ndim == 2 ? "W = 0" : "other dimensions");
    }
    int32_t slots = og_dtype_slots(t->dtype);
    if (slots == 0) {
        return og_fail(err, OG_BAD_LAYOUT,
                       "expected %s of int64, int32, float64 or float32, got "
                       "%s; make flags with err.new",
                       name, og_dtype_name(t->dtype));
    }
    if (t->sizes[1] > (INT32_MAX - 2) / slots) {
        return og_fail(err, OG_BAD_LAYOUT,
                       "expected %s of fewer than 2**31 slots a sample, got "
                       "%lld words of %d slots",
                       name, (long long)t->sizes[1], (int)slots);
    }
    return OG_OK;
}

/* Bytes of a word: two of a slot. */
static int64_t
word_bytes(int32_t dtype)
{
    return 2 * (int64_t)og_dtype_slots(dtype);
}

og_status
og_flags_set_aside(og_flags_view *view, og_error *err)
{
    const int64_t sizes[2] = {view->samples, view->words};
    void *data = NULL;
    og_status status = og_tensor_new(2, sizes, view->dtype, view->device_type,
                                     view->device_index, &view->copy, err);
    if (status == OG_OK) {
        status = og_shim_check(aoti_torch_copy_(view->copy, view->given, 0),
                               "copying flags", err);
    }
    if (status == OG_OK) {
        status = read_data(view->copy, true, &data, err);
    }
    view->rows.data = data;
    view->rows.stride = view->words * word_bytes(view->dtype);
    return status;
}

/* Whether two words of flags are one in memory. The first to meet are those
 * that lie lcm(strides) apart, by either way. */
static bool
words_share(const og_tensor *t)
{
    if (t->sizes[0] == 0) {
        return false;
    }
    int64_t row = t->sizes[0] > 1 ? t->strides[0] : 0;
    int64_t word = t->sizes[1] > 1 ? t->strides[1] : 0;
    if (OG_LIKELY(row >= t->sizes[1] && word <= 1)) {
        return word == 0 && t->sizes[1] > 1;
    }
    if (row == 0 || word == 0) {
        return (row == 0 && t->sizes[0] > 1) || (word == 0 && t->sizes[1] > 1);
    }
    int64_t common = row, rest = word;
    while (rest != 0) {
        int64_t next = common % rest;
        common = rest;
        rest = next;
    }
    return word / common < t->sizes[0] && row / common < t->sizes[1];
}

og_status
og_flags_open(og_flags_view *view, AtenTensorHandle flags, bool writable,
              const char *name, og_error *err)
{
    og_tensor t;
    og_status status = og_tensor_read(&t, flags, writable, name, err);
    if (status == OG_OK) {
        status = check_layout(&t, name, err);
    }
    if (status != OG_OK) {
        return status;
    }
    int64_t bytes = word_bytes(t.dtype);
    view->given = flags;
    view->samples = t.sizes[0];
    view->words = t.sizes[1];
    view->dtype = t.dtype;
    view->device_type = t.device_type;
    view->device_index = t.device_index;
    view->writable = writable;
    view->rows.data = t.data;
    view->rows.stride = og_tensor_step(&t, bytes);
    view->rows.capacity = (int32_t)(t.sizes[1] * bytes / 2);
    if (writable && words_share(&t)) {
        return og_fail(err, OG_BAD_LAYOUT,
                       "expected %s whose words have memory of their own to "
                       "write into, some share it; pass flags.clone()",
                       name);
    }
    if (t.sizes[1] > 1 && t.strides[1] != 1) {
        return og_flags_set_aside(view, err);
    }
    return OG_OK;
}

og_status
og_flags_close(og_flags_view *view, og_status status, og_error *err)
{
    if (view->copy == NULL) {
        return status;
    }
    if (status == OG_OK && view->writable) {
        status = og_shim_check(aoti_torch_copy_(view->given, view->copy, 0),
                               "writing flags back", err);
    }
    (void)aoti_torch_delete_tensor_object(view->copy);
    view->copy = NULL;
    return status;
}

/* opguard::add_low_rank: out = round(base + left @ right) in one pass over
 * the memory, for what a LoRA does to one weight on the host. */
#include "core/lowrank.h"
#include "torch/flags_read.h"
#include "torch/ops.h"

/* A matrix in host memory. */
typedef struct matrix {
    const void *data;
    int64_t rows;
    int64_t columns;
    int64_t stride; /* elements from a row to the next */
    int32_t dtype;
} matrix;

static og_status
matrix_of(AtenTensorHandle t, const char *name, matrix *m, og_error *err)
{
    int64_t ndim = 0, *sizes = NULL, *strides = NULL;
    int32_t device = 0;
    if (aoti_torch_get_dim(t, &ndim) != 0 ||
        aoti_torch_get_sizes(t, &sizes) != 0 ||
        aoti_torch_get_strides(t, &strides) != 0 ||
        aoti_torch_get_dtype(t, &m->dtype) != 0 ||
        aoti_torch_get_device_type(t, &device) != 0 ||
        torch_get_const_data_ptr(t, &m->data) != 0) {
        return og_fail(err, OG_TORCH_FAILED,
                       "expected %s to be a strided tensor; pass a dense one",
                       name);
    }
    if (ndim != 2 || device != aoti_torch_device_type_cpu()) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected %s to be a matrix in host memory, it has "
                       "%lld dimensions on device type %d; use torch.addmm",
                       name, (long long)ndim, (int)device);
    }
    m->rows = sizes[0];
    m->columns = sizes[1];
    m->stride = m->rows > 1 ? strides[0] : m->columns;
    if ((m->columns > 1 && strides[1] != 1) || m->stride < 0) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected the rows of %s to lie together, their "
                       "elements are %lld apart; pass %s.contiguous()",
                       name, (long long)strides[1], name);
    }
    return OG_OK;
}

static bool
kind_of(int32_t dtype, og_low_rank_kind *kind)
{
    if (dtype == OG_DTYPE_FLOAT32) {
        *kind = OG_LOW_RANK_F32;
    }
    else if (dtype == OG_DTYPE_BFLOAT16) {
        *kind = OG_LOW_RANK_BF16;
    }
    else if (dtype == OG_DTYPE_FLOAT16) {
        *kind = OG_LOW_RANK_F16;
    }
    else {
        return false;
    }
    return true;
}

static og_status
types_agree(const matrix *base, const matrix *left, const matrix *right,
            const matrix *out, og_low_rank_kind *kind, og_error *err)
{
    if (!kind_of(base->dtype, kind) || out->dtype != base->dtype) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected base and out of one dtype, float32, bfloat16 "
                       "or float16, came %s and %s; use torch.addmm for "
                       "others",
                       og_dtype_name(base->dtype), og_dtype_name(out->dtype));
    }
    if (left->dtype != OG_DTYPE_FLOAT32 || right->dtype != OG_DTYPE_FLOAT32) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected left and right in float32, came %s and %s; "
                       "pass left.float() and right.float()",
                       og_dtype_name(left->dtype),
                       og_dtype_name(right->dtype));
    }
    return OG_OK;
}

static og_status
shapes_agree(const matrix *base, const matrix *left, const matrix *right,
             const matrix *out, og_error *err)
{
    if (left->rows != base->rows || right->columns != base->columns ||
        right->rows != left->columns || out->rows != base->rows ||
        out->columns != base->columns || left->columns < 1 ||
        left->columns > OG_LOW_RANK_MOST) {
        return og_fail(
            err, OG_BAD_ARGUMENT,
            "expected base and out (n, m), left (n, r), right (r, m) with r "
            "of 1..%d, got base (%lld, %lld), left (%lld, %lld), right "
            "(%lld, %lld), out (%lld, %lld)",
            OG_LOW_RANK_MOST, (long long)base->rows, (long long)base->columns,
            (long long)left->rows, (long long)left->columns,
            (long long)right->rows, (long long)right->columns,
            (long long)out->rows, (long long)out->columns);
    }
    return OG_OK;
}

/* Whether the bytes between the first and the last of both have some in
 * common. */
static bool
meet(const matrix *a, const matrix *b, int64_t a_bytes, int64_t b_bytes)
{
    if (a->rows == 0 || a->columns == 0 || b->rows == 0 || b->columns == 0) {
        return false;
    }
    uintptr_t first = (uintptr_t)a->data, other = (uintptr_t)b->data;
    int64_t size = ((a->rows - 1) * a->stride + a->columns) * a_bytes;
    int64_t other_size = ((b->rows - 1) * b->stride + b->columns) * b_bytes;
    return first < other + (uintptr_t)other_size &&
           other < first + (uintptr_t)size;
}

static og_status
apart(const matrix *base, const matrix *left, const matrix *right,
      const matrix *out, og_error *err)
{
    int64_t bytes = (int64_t)aoti_torch_dtype_element_size(base->dtype);
    bool same = out->data == base->data && out->stride == base->stride;
    bool bad = (!same && meet(out, base, bytes, bytes)) ||
               meet(out, left, bytes, 4) || meet(out, right, bytes, 4) ||
               (out->rows > 1 && out->stride < out->columns);
    if (bad) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected out to be base or memory of its own, parts "
                       "of it are also in another argument or in itself; "
                       "pass a new tensor as out");
    }
    return OG_OK;
}

static void
range(int64_t begin, int64_t end, void *call)
{
    og_low_rank_rows(call, begin, end);
}

static og_status
add_low_rank(const StableIValue *stack, og_error *err)
{
    static const char *const names[] = {"base", "left", "right", "out"};
    matrix m[4];
    og_low_rank_kind kind = OG_LOW_RANK_F32;
    og_status status = OG_OK;
    for (int i = 0; i < 4 && status == OG_OK; i++) {
        status = matrix_of((AtenTensorHandle)(uintptr_t)stack[i], names[i],
                           &m[i], err);
    }
    if (status == OG_OK) {
        status = types_agree(&m[0], &m[1], &m[2], &m[3], &kind, err);
    }
    if (status == OG_OK) {
        status = shapes_agree(&m[0], &m[1], &m[2], &m[3], err);
    }
    if (status == OG_OK) {
        status = apart(&m[0], &m[1], &m[2], &m[3], err);
    }
    if (status != OG_OK || m[0].rows == 0 || m[0].columns == 0) {
        return status;
    }
    og_low_rank call = {
        m[0].data,   NULL,         m[1].data,    m[2].data,
        m[0].stride, m[3].stride,  m[1].stride,  m[2].stride,
        m[0].rows,   m[0].columns, m[1].columns, kind,
    };
    /* Only now, for it ends a copy-on-write of out. */
    status =
        og_shim_check(torch_get_mutable_data_ptr(
                          (AtenTensorHandle)(uintptr_t)stack[3], &call.out),
                      "out", err);
    int64_t grain = og_low_rank_grain(&call);
    if (status != OG_OK) {
        return status;
    }
    if (m[3].data == m[0].data) {
        call.base = call.out;
    }
    if (call.rows <= grain) {
        og_low_rank_rows(&call, 0, call.rows);
        return OG_OK;
    }
    return og_shim_check(torch_parallel_for(0, call.rows, grain, range, &call),
                         "running in parallel", err);
}

void
og_op_add_low_rank(StableIValue *stack, uint64_t inputs, uint64_t outputs)
{
    (void)inputs, (void)outputs;
    og_error err = {OG_OK, ""};
    og_status status = add_low_rank(stack, &err);
    for (int i = 0; i < 4; i++) {
        (void)aoti_torch_delete_tensor_object(
            (AtenTensorHandle)(uintptr_t)stack[i]);
    }
    if (status != OG_OK) {
        aoti_torch_check(false, "opguard::add_low_rank", __FILE__, __LINE__,
                         err.message);
    }
}

/* Every call of csrc/torch/flags_cuda.c, run by the emulated kernels, against
 * loops that do one element and one slot at a time.
 *
 * Tensors lie between pages that may not be touched, end to end with the one
 * behind or the one before, so a read or write beyond them ends the program.
 *     cuda_program SEED ROUNDS */
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "check.h"
#include "cuda/opguard_cuda.h"
#include "torch/flags.h"

/* --- chance ----------------------------------------------------------------
 */

static uint64_t state;

static uint64_t
bits(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545F4914F6CDD1Du;
}

static int64_t
below(int64_t end)
{
    return (int64_t)((bits() >> 16) % (uint64_t)end);
}

static bool
one_in(int64_t of)
{
    return below(of) == 0;
}

/* --- memory ----------------------------------------------------------------
 */

enum { PAGE = 4096, FILL = 0xAB };

typedef struct memory {
    char *pages;
    size_t length;
    char *data;
    int64_t bytes;
} memory;

static memory
memory_new(int64_t size)
{
    memory m;
    size_t inner = ((size_t)size + PAGE - 1) / PAGE * PAGE;
    inner = inner == 0 ? PAGE : inner;
    m.length = inner + (size_t)2 * PAGE;
    m.bytes = size;
    m.pages = mmap(NULL, m.length, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m.pages == MAP_FAILED || mprotect(m.pages, PAGE, PROT_NONE) != 0 ||
        mprotect(m.pages + PAGE + inner, PAGE, PROT_NONE) != 0) {
        abort();
    }
    m.data = m.pages + PAGE + (one_in(3) ? 0 : inner - (size_t)size);
    memset(m.data, FILL, (size_t)size);
    return m;
}

static void
memory_free(memory m)
{
    munmap(m.pages, m.length);
}

/* --- what flags_cuda.c asks of torch ---------------------------------------
 */

static memory scratch;

og_status
og_shim_check(OgShimCode code, const char *what, og_error *err)
{
    return code == 0 ? OG_OK : og_fail(err, OG_TORCH_FAILED, "%s", what);
}

og_status
og_shim_cuda_stream(int32_t device, void **stream, og_error *err)
{
    (void)device, (void)err;
    *stream = NULL;
    return OG_OK;
}

int32_t
aoti_torch_device_type_cuda(void)
{
    return 1;
}

int32_t
aoti_torch_dtype_uint8(void)
{
    return 0;
}

OgShimCode
aoti_torch_empty_strided(int64_t ndim, const int64_t *sizes,
                         const int64_t *strides, int32_t dtype, int32_t type,
                         int32_t index, AtenTensorHandle *ret)
{
    (void)ndim, (void)strides, (void)dtype, (void)type, (void)index;
    scratch = memory_new(sizes[0]);
    *ret = (AtenTensorHandle)&scratch;
    return 0;
}

OgShimCode
aoti_torch_get_data_ptr(AtenTensorHandle tensor, void **ret)
{
    *ret = ((memory *)tensor)->data;
    return 0;
}

OgShimCode
aoti_torch_delete_tensor_object(AtenTensorHandle tensor)
{
    memory_free(*(memory *)tensor);
    return 0;
}

/* --- tensors ---------------------------------------------------------------
 */

enum { MOST_DIMS = 6 };

typedef struct tensor {
    og_tensor t;
    memory m;
    int64_t sizes[MOST_DIMS + 1], strides[MOST_DIMS + 1];
    int64_t numel;
    int element; /* bytes, both numbers of a complex one */
} tensor;

static int64_t
place(const tensor *x, int64_t index)
{
    int64_t at = 0;
    for (int64_t d = x->t.ndim - 1; d >= 0; d--) {
        at += index % x->sizes[d] * x->strides[d];
        index /= x->sizes[d];
    }
    return at * x->element;
}

/* Sizes for one of the shapes of work. */
static void
pick_sizes(tensor *x)
{
    int64_t ndim = 1 + below(MOST_DIMS), most = 4;
    switch (below(6)) {
        case 0: /* many short rows */
            x->sizes[0] = 1 + below(3000);
            ndim = 1 + below(3);
            break;
        case 1: /* few long ones */
            x->sizes[0] = 1 + below(3);
            x->sizes[1] = 1 + below(60000);
            x->sizes[1] = one_in(2) ? (x->sizes[1] + 16383) / 16384 * 16384
                                    : x->sizes[1];
            x->t.ndim = 2;
            return;
        case 2: /* transposed or batched matrices */
            x->sizes[0] = 1 + below(90);
            ndim = 2 + below(2);
            most = 70;
            break;
        case 3: /* a warp or a block each */
            x->sizes[0] = 1 + below(200);
            x->sizes[1] = 16 * (1 + below(60)) + (one_in(2) ? below(16) : 0);
            x->t.ndim = 2;
            return;
        default:
            x->sizes[0] = below(30);
    }
    for (int64_t d = 1; d < ndim; d++) {
        x->sizes[d] = 1 + below(most) + (one_in(40) ? -1 : 0);
        x->sizes[d] *= one_in(4) ? 8 : 1;
    }
    x->t.ndim = ndim;
}

/* A random order of the dimensions in memory, with gaps and expanded ones. */
static void
pick_strides(tensor *x)
{
    int64_t order[MOST_DIMS + 1], extent = 1;
    bool mixed = one_in(2), gaps = one_in(3), vectors = one_in(2);
    for (int64_t d = 0; d < x->t.ndim; d++) {
        order[d] = x->t.ndim - 1 - d;
    }
    for (int64_t i = x->t.ndim - 1; mixed && i > 0; i--) {
        int64_t j = below(i + 1), held = order[i];
        order[i] = order[j];
        order[j] = held;
    }
    for (int64_t i = 0; i < x->t.ndim; i++) {
        int64_t d = order[i], gap = 0;
        x->strides[d] = one_in(12) ? 0 : extent;
        if (x->strides[d] != 0) {
            extent *= x->sizes[d] > 0 ? x->sizes[d] : 1;
            /* Whole vectors all the way, or nearly. */
            gap =
                vectors && !one_in(4) ? 16 * (extent % 16 == 0) : 1 + below(9);
            extent += gaps && one_in(2) ? gap : 0;
        }
    }
}

/* Rows of short runs of whole vectors, all but the vectors possibly out of
 * line. */
static void
pick_runs(tensor *x)
{
    x->t.ndim = 3;
    x->sizes[0] = 1 + below(40);
    x->sizes[1] = 1 + below(20);
    x->sizes[2] = 16 * (1 + below(5));
    x->strides[2] = 1;
    x->strides[1] = x->sizes[2] + 16 * below(3) + one_in(5);
    x->strides[0] = x->sizes[1] * x->strides[1] + (one_in(2) ? below(9) : 16);
}

static void
tensor_new(tensor *x, int element)
{
    memset(x, 0, sizeof *x);
    x->element = element;
    bool runs = one_in(7);
    do {
        if (runs) {
            pick_runs(x);
        }
        else {
            pick_sizes(x);
            pick_strides(x);
        }
        x->numel = 1;
        for (int64_t d = 0; d < x->t.ndim; d++) {
            x->numel *= x->sizes[d];
        }
    } while (x->numel > 140000);
    int64_t last = 0;
    for (int64_t d = 0; x->numel > 0 && d < x->t.ndim; d++) {
        last += (x->sizes[d] - 1) * x->strides[d];
    }
    x->m = memory_new(x->numel > 0 ? (last + 1) * element : 0);
    x->t.data = x->numel > 0 ? x->m.data : NULL;
    x->t.sizes = x->sizes;
    x->t.strides = x->strides;
}

/* --- flags -----------------------------------------------------------------
 */

typedef struct flags {
    og_flags_rows rows;
    memory from, to;
    char *wanted; /* what `to` is to hold */
} flags;

static og_policy
pick_policy(void)
{
    int64_t slots = one_in(2) ? 1 + below(8) : 1 + below(300);
    return og_policy_of(slots | below(3) << OG_KEY_PRIORITY_SHIFT |
                        below(2) << OG_KEY_ORDER_SHIFT |
                        below(4) << OG_KEY_DEDUPE_SHIFT);
}

static void
pick_rows(og_rows *rows, memory *m, int64_t samples, int32_t capacity)
{
    int64_t gap = one_in(3) ? 4 * below(5) : 0;
    rows->capacity = capacity;
    rows->stride = 2 * capacity + gap;
    *m = memory_new(samples > 0 ? samples * rows->stride - gap : 0);
    rows->data = m->data;
}

static uint16_t
pick_slot(void)
{
    return og_slot_make((int32_t)below(one_in(2) ? 3 : 1024),
                        (int32_t)below(16), (int32_t)below(4));
}

/* Few or many errors, sometimes with holes. */
static void
fill_rows(og_rows rows, int64_t samples)
{
    bool clean = one_in(3), holes = one_in(3);
    for (int64_t row = 0; row < samples; row++) {
        uint16_t *slots = (uint16_t *)(rows.data + row * rows.stride);
        int64_t used = clean || one_in(2) ? 0 : below(rows.capacity + 1);
        for (int32_t i = 0; i < rows.capacity; i++) {
            slots[i] = i < used && !(holes && one_in(3)) ? pick_slot() : 0;
        }
    }
}

static int32_t
pick_capacity(void)
{
    const int32_t all[] = {2, 4, 6, 8, 16, 16, 16, 34, 64, 256, 300};
    return all[below(sizeof all / sizeof *all)];
}

static void
flags_new(flags *f, int64_t samples, int32_t capacity)
{
    memset(f, 0, sizeof *f);
    f->rows.samples = samples;
    f->rows.policy = pick_policy();
    pick_rows(&f->rows.to, &f->to, samples, capacity);
    int how = (int)below(3);
    if (how == 0) { /* new flags */
        f->rows.from.capacity = capacity;
    }
    else if (how == 1) { /* in place */
        fill_rows(f->rows.to, samples);
        f->rows.from = f->rows.to;
    }
    else {
        pick_rows(&f->rows.from, &f->from, samples, capacity);
        fill_rows(f->rows.from, samples);
    }
    f->wanted = malloc((size_t)f->to.bytes + 1);
    memcpy(f->wanted, f->to.data, (size_t)f->to.bytes);
    for (int64_t row = 0; row < samples; row++) {
        char *at = f->wanted + row * f->rows.to.stride;
        memset(at, 0, 2 * (size_t)capacity);
        if (how != 0) {
            memcpy(at, f->rows.from.data + row * f->rows.from.stride,
                   2 * (size_t)capacity);
        }
    }
}

static uint16_t *
wanted_row(const flags *f, int64_t row)
{
    return (uint16_t *)(f->wanted + row * f->rows.to.stride);
}

static void
wanted_push(const flags *f, int64_t row, uint16_t slot)
{
    og_row_push(wanted_row(f, row), f->rows.to.capacity, f->rows.policy, slot);
}

static bool
flags_right(const flags *f)
{
    return memcmp(f->wanted, f->to.data, (size_t)f->to.bytes) == 0;
}

static void
flags_free(flags *f)
{
    free(f->wanted);
    memory_free(f->to);
    if (f->from.pages != NULL) {
        memory_free(f->from);
    }
}

/* --- check -----------------------------------------------------------------
 */

static const int NUMBER_BYTES[] = {1, 2, 2, 4, 8, 1, 1, 1, 1, 2, 4, 8};

/* What a number is, by the host's own arithmetic where it has some. */
static int
what_is(og_scan_kind kind, const char *at)
{
    double value = 0;
    uint8_t byte = (uint8_t)*at;
    uint16_t half;
    float single;
    uint32_t word;
    switch (kind) {
        case OG_SCAN_F16:
        case OG_SCAN_C32: {
            memcpy(&half, at, 2);
            bool special = (half & 0x7C00) == 0x7C00;
            value = special && (half & 0x3FF) ? NAN : special ? INFINITY : 0;
            value = half & 0x8000 ? -value : value;
            break;
        }
        case OG_SCAN_BF16:
            memcpy(&half, at, 2);
            word = (uint32_t)half << 16;
            memcpy(&single, &word, 4);
            value = single;
            break;
        case OG_SCAN_F32:
        case OG_SCAN_C64:
            memcpy(&single, at, 4);
            value = single;
            break;
        case OG_SCAN_F64:
        case OG_SCAN_C128:
            memcpy(&value, at, 8);
            break;
        case OG_SCAN_F8_E5M2:
            return byte == 0x7C            ? OG_FOUND_POS_INF
                   : byte == 0xFC          ? OG_FOUND_NEG_INF
                   : (byte & 0x7F) >= 0x7D ? OG_FOUND_NAN
                                           : 0;
        case OG_SCAN_F8_E4M3FN:
            return byte == 0x7F || byte == 0xFF ? OG_FOUND_NAN : 0;
        case OG_SCAN_F8_FNUZ:
            return byte == 0x80 ? OG_FOUND_NAN : 0;
        case OG_SCAN_F8_E8M0:
            return byte == 0xFF ? OG_FOUND_NAN : 0;
        default:
            return 0;
    }
    return isnan(value)   ? OG_FOUND_NAN
           : isinf(value) ? (value > 0 ? OG_FOUND_POS_INF : OG_FOUND_NEG_INF)
                          : 0;
}

/* Mostly numbers that are neither, some that nearly are, a few that are. */
static void
fill_numbers(tensor *x, og_scan_kind kind)
{
    int bytes = NUMBER_BYTES[kind], clean = one_in(2);
    int64_t rare = one_in(2) ? 2000 : 40;
    for (int64_t at = 0; at + bytes <= x->m.bytes; at += bytes) {
        uint64_t number;
        do {
            number = bits();
            if (one_in(3)) { /* the neighbours of what counts, and zeros */
                const uint64_t near[] = {0,
                                         ~(uint64_t)0,
                                         0x7F80,
                                         0xFC00,
                                         0x7F7F7F7F7F7F7F7F,
                                         0x7FEFFFFFFFFFFFFF,
                                         0x8080808080808080};
                number = near[below(7)];
            }
            memcpy(x->m.data + at, &number, (size_t)bytes);
        } while (what_is(kind, x->m.data + at) != 0 &&
                 (clean || !one_in(rare)));
    }
    /* One in the last places, where a tail is easily forgotten. */
    if (x->numel > 0 && kind != OG_SCAN_NONE && !one_in(3)) {
        const uint64_t nan = kind == OG_SCAN_F8_FNUZ ? 0x80 : ~(uint64_t)0;
        int64_t row = below(x->sizes[0]), per = x->numel / x->sizes[0];
        int64_t index = row * per + (one_in(3) ? below(per) : per - 1);
        memcpy(x->m.data + place(x, index), &nan, (size_t)bytes);
    }
}

static int
row_findings(const tensor *x, og_scan_kind kind, int64_t row)
{
    int found = 0, bytes = NUMBER_BYTES[kind];
    int64_t per = x->numel / x->sizes[0];
    for (int64_t i = 0; i < per; i++) {
        const char *at = x->m.data + place(x, row * per + i);
        for (int inside = 0; inside < x->element; inside += bytes) {
            found |= what_is(kind, at + inside);
        }
    }
    return found;
}

static void
round_of_check(void)
{
    og_scan_kind kind = (og_scan_kind)below(OG_SCAN_C128 + 1);
    tensor x;
    flags f;
    og_error err;
    tensor_new(&x, NUMBER_BYTES[kind] * (kind >= OG_SCAN_C32 ? 2 : 1));
    fill_numbers(&x, kind);
    int64_t samples = x.sizes[0];
    flags_new(&f, samples, pick_capacity());
    memory found = memory_new(samples);
    og_flags_check call = {.rows = f.rows, .x = x.t, .kind = kind};
    call.checks = (int32_t)(1 + below(7));
    call.location = (int32_t)below(1024);
    call.bits = one_in(5) ? (uint8_t *)found.data : NULL;
    CHECK(og_flags_cuda.check(&call, &err) == OG_OK);
    for (int64_t row = 0; row < samples; row++) {
        int wanted = row_findings(&x, kind, row) & call.checks;
        if (call.bits != NULL) {
            CHECK(call.bits[row] == wanted);
            continue;
        }
        if (wanted & OG_FOUND_NAN) {
            wanted_push(&f, row, og_slot_make(call.location, 1, 3));
        }
        if (wanted & (OG_FOUND_POS_INF | OG_FOUND_NEG_INF)) {
            wanted_push(&f, row, og_slot_make(call.location, 2, 3));
        }
    }
    CHECK(call.bits != NULL || flags_right(&f));
    memory_free(found);
    flags_free(&f);
    memory_free(x.m);
}

/* --- ids -------------------------------------------------------------------
 */

static int64_t
id_at(og_id_kind kind, const char *at)
{
    int8_t i8;
    int16_t i16;
    int32_t i32;
    int64_t i64;
    switch (kind) {
        case OG_ID_U8:
            return (uint8_t)*at;
        case OG_ID_I8:
            memcpy(&i8, at, 1);
            return i8;
        case OG_ID_I16:
            memcpy(&i16, at, 2);
            return i16;
        case OG_ID_I32:
            memcpy(&i32, at, 4);
            return i32;
        default:
            memcpy(&i64, at, 8);
            return i64;
    }
}

static void
round_of_index(void)
{
    const int widths[] = {1, 1, 2, 4, 8};
    og_id_kind kind = (og_id_kind)below(5);
    int bytes = widths[kind];
    tensor ids;
    flags f;
    og_error err;
    tensor_new(&ids, bytes);
    int64_t size = one_in(8) ? 0 : 1 + below(100), rare = 1 + below(400);
    for (int64_t at = 0; at + bytes <= ids.m.bytes; at += bytes) {
        int64_t id =
            one_in(rare) ? (int64_t)bits() : below(size + 1) - (size > 0);
        id = id < 0 && !one_in(rare) ? 0 : id;
        memcpy(ids.m.data + at, &id, (size_t)bytes);
    }
    flags_new(&f, ids.sizes[0], pick_capacity());
    memory clamped = memory_new(ids.numel * bytes);
    og_flags_index call = {.rows = f.rows, .ids = ids.t, .kind = kind};
    call.size = size;
    call.slot = og_slot_make((int32_t)below(1024), OG_CODE_OUT_OF_BOUNDS, 2);
    call.clamped = one_in(2) ? clamped.data : NULL;
    CHECK(og_flags_cuda.index(&call, &err) == OG_OK);
    int64_t wrong = 0;
    for (int64_t row = 0; row < ids.sizes[0]; row++) {
        int64_t per = ids.numel / ids.sizes[0];
        bool bad = false;
        for (int64_t i = row * per; i < (row + 1) * per; i++) {
            int64_t id = id_at(kind, ids.m.data + place(&ids, i));
            bool outside = id < 0 || id >= size;
            int64_t to = id < 0 || size == 0 ? 0 : outside ? size - 1 : id;
            bad |= outside;
            wrong += call.clamped != NULL &&
                     id_at(kind, clamped.data + i * bytes) != to;
        }
        if (bad) {
            wanted_push(&f, row, call.slot);
        }
    }
    CHECK(wrong == 0);
    CHECK(flags_right(&f));
    memory_free(clamped);
    flags_free(&f);
    memory_free(ids.m);
}

/* --- edits -----------------------------------------------------------------
 */

static int64_t
pick_samples(void)
{
    return one_in(10) ? 0 : one_in(3) ? 1 + below(2000) : 1 + below(40);
}

static void
round_of_push(void)
{
    flags f;
    og_error err;
    int64_t samples = pick_samples();
    flags_new(&f, samples, pick_capacity());
    og_flags_push call = {.rows = f.rows, .slot = pick_slot()};
    call.where_stride = 1 + below(3);
    memory where = memory_new(samples * call.where_stride);
    for (int64_t i = 0; i < where.bytes; i++) {
        where.data[i] = (char)(one_in(2) ? 0 : below(256));
    }
    call.where = one_in(4) ? NULL : (const uint8_t *)where.data;
    for (int64_t row = 0; row < samples; row++) {
        if (call.where == NULL || call.where[row * call.where_stride] != 0) {
            wanted_push(&f, row, call.slot);
        }
    }
    CHECK(og_flags_cuda.push(&call, &err) == OG_OK);
    CHECK(flags_right(&f));
    memory_free(where);
    flags_free(&f);
}

static void
round_of_codes(void)
{
    flags f;
    og_error err;
    int64_t samples = pick_samples();
    int32_t bytes = 1 << below(4);
    flags_new(&f, samples, pick_capacity());
    og_flags_codes call = {.rows = f.rows};
    call.location = (int32_t)below(1024);
    call.severity = (int32_t)below(5) - 1;
    call.default_severity = (int32_t)below(4);
    call.codes.bytes = bytes;
    call.codes.is_signed = one_in(2);
    call.codes.stride = one_in(6) ? 0 : bytes * (1 + below(3));
    memory codes = memory_new(
        call.codes.stride == 0 ? bytes : samples * call.codes.stride);
    call.codes.data = codes.data;
    for (int64_t at = 0; at + bytes <= codes.bytes; at += bytes) {
        int64_t code = one_in(9) ? (int64_t)bits() : below(17);
        memcpy(codes.data + at, &code, (size_t)bytes);
    }
    for (int64_t row = 0; row < samples; row++) {
        int64_t code = 0;
        memcpy(&code, codes.data + row * call.codes.stride, (size_t)bytes);
        if (code > 0 && code < 16) {
            int32_t severity = call.severity;
            if (severity < 0) {
                severity =
                    og_code_severity((int32_t)code, call.default_severity);
            }
            wanted_push(&f, row,
                        og_slot_make(call.location, (int32_t)code, severity));
        }
    }
    CHECK(og_flags_cuda.push_codes(&call, &err) == OG_OK);
    CHECK(flags_right(&f));
    memory_free(codes);
    flags_free(&f);
}

static void
round_of_merge(void)
{
    enum { MOST = 150 };
    static og_rows others[MOST];
    static memory memories[MOST];
    flags f;
    og_error err;
    int64_t samples = pick_samples(), count = 1 + below(one_in(6) ? MOST : 4);
    samples = count > 4 ? samples % 20 : samples;
    flags_new(&f, samples, pick_capacity());
    for (int64_t i = 0; i < count; i++) {
        pick_rows(&others[i], &memories[i], samples, f.rows.to.capacity);
        fill_rows(others[i], samples);
        for (int64_t row = 0; row < samples; row++) {
            char *other = others[i].data + row * others[i].stride;
            og_row_merge(wanted_row(&f, row), (uint16_t *)other,
                         f.rows.to.capacity, f.rows.policy);
        }
    }
    og_flags_merge call = {f.rows, others, (size_t)count};
    CHECK(og_flags_cuda.merge(&call, &err) == OG_OK);
    CHECK(flags_right(&f));
    for (int64_t i = 0; i < count; i++) {
        memory_free(memories[i]);
    }
    flags_free(&f);
}

/* Rows of picks in memory of their own: any width, order and gap. */
static og_picks
pick_picks(memory *m, int64_t samples, int64_t count, int64_t rows)
{
    int64_t bytes = one_in(2) ? 8 : 4, total = samples * count;
    og_picks picks = {.count = count, .wide = bytes == 8};
    int64_t apart = bytes * (1 + below(2));
    bool ascending = one_in(2), turned = one_in(3);
    picks.stride = turned ? apart * samples : apart;
    picks.row_stride = turned ? apart : apart * count;
    *m = memory_new(total > 0 ? (total - 1) * apart + bytes : 0);
    picks.data = m->data;
    for (int64_t i = 0; i < total; i++) {
        int64_t row = i / count, k = i % count;
        int64_t pick = rows > 0 && !one_in(9) ? below(rows) : -1;
        pick = ascending && k < rows ? k : one_in(99) ? rows + below(3) : pick;
        memcpy(m->data + row * picks.row_stride + k * picks.stride, &pick,
               (size_t)bytes);
    }
    return picks;
}

static int64_t
pick_of(og_picks picks, int64_t row, int64_t k)
{
    int64_t wide = 0;
    int32_t narrow = 0;
    const char *at =
        (const char *)picks.data + row * picks.row_stride + k * picks.stride;
    memcpy(picks.wide ? (void *)&wide : &narrow, at, picks.wide ? 8 : 4);
    return picks.wide ? wide : narrow;
}

static void
wanted_fold(const og_flags_gather *call, int64_t row, uint16_t *slots)
{
    size_t bytes = 2 * (size_t)call->to.capacity;
    const uint16_t *taken[1000];
    og_policy p = call->policy;
    int count = 0;
    p.num_slots = call->to.capacity;
    memset(slots, 0, bytes);
    for (int64_t k = 0; k < call->picks.count; k++) {
        int64_t pick = pick_of(call->picks, row, k);
        bool again = pick < 0 || pick >= call->rows, any = false;
        const char *at = call->from.data + pick * call->from.stride;
        for (size_t b = 0; !again && b < bytes; b++) {
            any = any || at[b] != 0;
        }
        for (int i = 0; any && i < count; i++) {
            again = again || (const char *)taken[i] == at;
        }
        if (any && !again) {
            taken[count++] = (const uint16_t *)at;
            if (count == 1) {
                memcpy(slots, at, bytes);
            }
            else {
                og_row_merge(slots, (const uint16_t *)at, call->to.capacity,
                             p);
            }
        }
    }
}

static void
round_of_gather(void)
{
    int32_t capacity = pick_capacity();
    int64_t count = one_in(2)   ? below(4)
                    : one_in(2) ? 1 + below(40)
                                : 1 + below(700);
    og_flags_gather call = {.samples = pick_samples(),
                            .rows = pick_samples(),
                            .policy = pick_policy()};
    og_error err;
    memory from, to, picks;
    call.samples = count > 3 ? call.samples % 30 : call.samples;
    call.rows = one_in(2) && count > 128 ? count + below(99) : call.rows;
    pick_rows(&call.from, &from, call.rows, capacity);
    pick_rows(&call.to, &to, call.samples, capacity);
    fill_rows(call.from, call.rows);
    call.picks = pick_picks(&picks, call.samples, count, call.rows);
    char *wanted = malloc((size_t)to.bytes + 1);
    memcpy(wanted, to.data, (size_t)to.bytes);
    for (int64_t row = 0; row < call.samples; row++) {
        wanted_fold(&call, row, (uint16_t *)(wanted + row * call.to.stride));
    }
    CHECK(og_flags_cuda.gather(&call, &err) == OG_OK);
    CHECK(memcmp(wanted, to.data, (size_t)to.bytes) == 0);
    free(wanted);
    memory_free(from);
    memory_free(to);
    memory_free(picks);
}

static void
round_of_clear(void)
{
    flags f;
    og_error err;
    flags_new(&f, pick_samples(), pick_capacity());
    og_flags_clear call = {f.rows, (int32_t)below(16)};
    for (int64_t row = 0; row < f.rows.samples; row++) {
        og_row_clear(wanted_row(&f, row), f.rows.to.capacity, call.code);
    }
    CHECK(og_flags_cuda.clear(&call, &err) == OG_OK);
    CHECK(flags_right(&f));
    flags_free(&f);
}

/* --- queries ---------------------------------------------------------------
 */

static int64_t
answer(const og_flags_query *q, const uint16_t *slots)
{
    int64_t found = 0, used = 0, severity = 0;
    for (int32_t i = 0; i < q->rows.capacity; i++) {
        found |= slots[i] != 0 && (slots[i] & q->mask) == q->value;
        used += slots[i] != 0;
        if (og_slot_severity(slots[i]) > severity) {
            severity = og_slot_severity(slots[i]);
        }
    }
    switch (q->what) {
        case OG_FLAGS_FIND:
            return found;
        case OG_FLAGS_OK:
            return used == 0;
        case OG_FLAGS_ERR:
            return used != 0;
        case OG_FLAGS_COUNT:
            return used;
        default:
            return severity;
    }
}

static void
round_of_query(void)
{
    const og_flags_what all[] = {OG_FLAGS_FIND, OG_FLAGS_OK, OG_FLAGS_ERR,
                                 OG_FLAGS_COUNT, OG_FLAGS_MAX_SEVERITY};
    const uint16_t masks[] = {OG_CODE_MASK, OG_SEVERITY_MASK, OG_SLOT_MASK,
                              0x30};
    og_flags_query q = {.samples = pick_samples(), .what = all[below(5)]};
    og_error err;
    memory m;
    pick_rows(&q.rows, &m, q.samples, pick_capacity());
    fill_rows(q.rows, q.samples);
    q.mask = masks[below(4)];
    q.value = (uint16_t)(pick_slot() & q.mask);
    q.out_bytes = one_in(2) ? 4 : 8;
    int32_t bytes = q.what == OG_FLAGS_COUNT          ? 4
                    : q.what == OG_FLAGS_MAX_SEVERITY ? q.out_bytes
                                                      : 1;
    memory out = memory_new(q.samples * bytes);
    q.out = out.data;
    CHECK(og_flags_cuda.query(&q, &err) == OG_OK);
    for (int64_t row = 0; row < q.samples; row++) {
        int64_t got = 0;
        memcpy(&got, out.data + row * bytes, (size_t)bytes);
        CHECK(got ==
              answer(&q, (uint16_t *)(q.rows.data + row * q.rows.stride)));
    }
    memory_free(out);
    memory_free(m);
}

/* --- pack ------------------------------------------------------------------
 */

static void
round_of_pack(void)
{
    enum { MOST = 200 };
    static og_cuda_span spans[MOST];
    static memory sources[MOST];
    const og_cuda_place where = {NULL, 0};
    const og_cuda_table *cuda;
    int64_t count = 1 + below(MOST), total = 0;
    for (int64_t i = 0; i < count; i++) {
        sources[i] = memory_new(below(one_in(20) ? 9000 : 300));
        memset(sources[i].data, (int)(i + 1), (size_t)sources[i].bytes);
        spans[i] = (og_cuda_span){sources[i].data, total, sources[i].bytes};
        total += (sources[i].bytes + 63) / 64 * 64;
    }
    memory packed = memory_new(total);
    packed.data = packed.pages + PAGE; /* vectors are written to it */
    CHECK(og_cuda_functions(&cuda, NULL) == OG_OK);
    CHECK(cuda->launch_pack(packed.data, spans, (size_t)count, &where) == 0);
    for (int64_t i = 0; i < count; i++) {
        const char *at = packed.data + spans[i].offset;
        bool same = memcmp(at, sources[i].data, (size_t)spans[i].bytes) == 0;
        for (int64_t b = spans[i].bytes; b % 64 != 0; b++) {
            same = same && at[b] == 0;
        }
        CHECK(same);
        memory_free(sources[i]);
    }
    memory_free(packed);
}

int
main(int argc, char **argv)
{
    void (*const all[])(void) = {
        round_of_check, round_of_index, round_of_push,
        round_of_codes, round_of_merge, round_of_clear,
        round_of_query, round_of_pack,  round_of_gather};
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
    int rounds = argc > 2 ? atoi(argv[2]) : 10;
    for (int round = 0; round < rounds && failures == 0; round++) {
        for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
            for (int more = i == 0 ? 4 : 1; more > 0; more--) {
                state = (seed * 1000003u + (uint64_t)round) * 64 + i * 8 +
                        (uint64_t)more + 0x9E3779B97F4A7C15u;
                (void)bits();
                all[i]();
                if (failures != 0) {
                    fprintf(stderr, "kind %zu, seed %llu, round %d, %d\n", i,
                            (unsigned long long)seed, round, more);
                    return 1;
                }
            }
        }
    }
    return failures != 0;
}

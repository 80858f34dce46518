/* The low-rank kernels against the sum in double, on each instruction set:
 * odd sizes and strides in buffers of exact size whose gaps must stay as they
 * are, every kind, ranges, out that is base, and what cannot be a number. */
#define _DEFAULT_SOURCE /* setenv */
#include "core/lowrank.h"

#include <math.h>

#include "tiers.h"

static double
half_value(uint16_t half)
{
    int exponent = half >> 10 & 31, fraction = half & 1023;
    double value = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                   : exponent == 0 ? ldexp(fraction, -24)
                                   : ldexp(fraction + 1024, exponent - 25);
    return half >> 15 != 0 ? -value : value;
}

static double
value_at(const void *p, int64_t i, og_low_rank_kind kind)
{
    if (kind == OG_LOW_RANK_F32) {
        return ((const float *)p)[i];
    }
    uint16_t narrow = ((const uint16_t *)p)[i];
    if (kind == OG_LOW_RANK_F16) {
        return half_value(narrow);
    }
    uint32_t wide = (uint32_t)narrow << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* How far apart numbers of a kind are near a value. */
static double
spacing(double value, og_low_rank_kind kind)
{
    static const int digits[] = {24, 8, 11}, least[] = {-149, -133, -24};
    int exponent = 0;
    (void)frexp(value, &exponent);
    int at = exponent - digits[kind];
    return ldexp(1, at < least[kind] ? least[kind] : at);
}

/* The next greater one; value is positive. */
static float
above(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    bits++;
    memcpy(&value, &bits, sizeof bits);
    return value;
}

static float
random_float(void)
{
    return (float)(below(20001) - 10000) / 4096;
}

static size_t
bytes_of(og_low_rank_kind kind)
{
    return kind == OG_LOW_RANK_F32 ? 4 : 2;
}

static void
fill(void *p, int64_t n, og_low_rank_kind kind)
{
    for (int64_t i = 0; i < n; i++) {
        if (kind == OG_LOW_RANK_F32) {
            ((float *)p)[i] = random_float();
        }
        else if (kind == OG_LOW_RANK_BF16) {
            float value = random_float();
            memcpy((uint16_t *)p + i, (char *)&value + 2, 2);
        }
        else {
            ((uint16_t *)p)[i] = (uint16_t)(below(0x4400) | below(2) << 15);
        }
    }
}

static void *
must(size_t bytes)
{
    void *p = malloc(bytes);
    if (p == NULL) {
        abort();
    }
    return p;
}

/* Whether out is what base, left and right make, to half a unit and what the
 * sum in float may have lost. */
static void
check_values(const og_low_rank *call, const void *base, const void *out)
{
    for (int64_t i = 0; i < call->rows; i++) {
        for (int64_t j = 0; j < call->columns; j++) {
            double sum = value_at(base, i * call->base_stride + j, call->kind);
            double size = fabs(sum);
            for (int64_t k = 0; k < call->rank; k++) {
                double term = (double)call->left[i * call->left_stride + k] *
                              (double)call->right[k * call->right_stride + j];
                sum += term;
                size += fabs(term);
            }
            double ours = value_at(out, i * call->out_stride + j, call->kind);
            double may = spacing(sum, call->kind) * 0.5000001 +
                         size * (double)(call->rank + 1) * 0x1p-23;
            CHECK(fabs(ours - sum) <= may);
        }
    }
}

static void
one(int64_t rows, int64_t columns, int64_t rank, og_low_rank_kind kind,
    int64_t gap)
{
    const size_t bytes = bytes_of(kind);
    og_low_rank call = {.base_stride = columns + gap,
                        .out_stride = columns + 2 * gap,
                        .left_stride = rank + gap,
                        .right_stride = columns + 3 * gap,
                        .rows = rows,
                        .columns = columns,
                        .rank = rank,
                        .kind = kind};
    int64_t base_n = (rows - 1) * call.base_stride + columns;
    int64_t out_n = (rows - 1) * call.out_stride + columns;
    int64_t left_n = (rows - 1) * call.left_stride + rank;
    int64_t right_n = (rank - 1) * call.right_stride + columns;
    char *base = must((size_t)base_n * bytes);
    char *out = must((size_t)out_n * bytes);
    char *again = must((size_t)out_n * bytes);
    float *left = must((size_t)left_n * 4), *right = must((size_t)right_n * 4);
    fill(base, base_n, kind);
    fill(left, left_n, OG_LOW_RANK_F32);
    fill(right, right_n, OG_LOW_RANK_F32);
    memset(out, 0x5A, (size_t)out_n * bytes);
    memset(again, 0x5A, (size_t)out_n * bytes);
    call.base = base;
    call.left = left;
    call.right = right;
    call.out = out;
    og_low_rank_rows(&call, 0, rows);
    check_values(&call, base, out);
    for (int64_t i = 0; i + 1 < rows; i++) {
        char *behind = out + (size_t)(i * call.out_stride + columns) * bytes;
        for (size_t b = 0; b < (size_t)(2 * gap) * bytes; b++) {
            CHECK(behind[b] == 0x5A);
        }
    }
    call.out = again; /* in ranges, the last first */
    for (int64_t end = rows, begin; end > 0; end = begin) {
        begin = end - 1 - below(end);
        og_low_rank_rows(&call, begin, end);
    }
    CHECK(memcmp(out, again, (size_t)out_n * bytes) == 0);
    call.out = base; /* in place */
    call.out_stride = call.base_stride;
    og_low_rank_rows(&call, 0, rows);
    for (int64_t i = 0; i < rows; i++) {
        CHECK(memcmp(base + (size_t)(i * call.base_stride) * bytes,
                     out + (size_t)(i * (columns + 2 * gap)) * bytes,
                     (size_t)columns * bytes) == 0);
    }
    free(base);
    free(out);
    free(again);
    free(left);
    free(right);
}

static void
sizes(void)
{
    for (og_low_rank_kind kind = 0; kind < OG_LOW_RANK_KINDS; kind++) {
        for (int64_t columns = 1; columns <= 70; columns += 3) {
            one(1 + below(20), columns, 1 + below(20), kind, below(3));
        }
        one(3, 40, OG_LOW_RANK_MOST, kind, 1);
        one(17, 600, 70, kind, 0);
        one(9, 1100, 16, kind, 0);
    }
}

/* Large, aligned and apart: what streams. */
static void
streams(void)
{
    enum { ROWS = 515, COLUMNS = 544 };
    for (og_low_rank_kind kind = 0; kind < OG_LOW_RANK_KINDS; kind++) {
        size_t size = (size_t)ROWS * COLUMNS * bytes_of(kind);
        float *factors = must((size_t)(ROWS + COLUMNS) * 4);
        char *base = aligned_alloc(64, size), *out = aligned_alloc(64, size);
        if (base == NULL || out == NULL) {
            abort();
        }
        fill(base, (int64_t)ROWS * COLUMNS, kind);
        fill(factors, ROWS + COLUMNS, OG_LOW_RANK_F32);
        og_low_rank call = {base,    out,     factors, factors + ROWS,
                            COLUMNS, COLUMNS, 1,       COLUMNS,
                            ROWS,    COLUMNS, 1,       kind};
        og_low_rank_rows(&call, 0, ROWS);
        check_values(&call, base, out);
        call.out = base;
        og_low_rank_rows(&call, 0, ROWS);
        CHECK(memcmp(base, out, size) == 0);
        CHECK(og_low_rank_grain(&call) >= 1);
        free(base);
        free(out);
        free(factors);
    }
}

static uint32_t
rounded(float value, og_low_rank_kind kind, int64_t column)
{
    uint16_t base[40] = {0}, out[40] = {0};
    float left = 1, right[40] = {0};
    right[column] = value;
    og_low_rank call = {base, out, &left, right, 40, 40,
                        1,    40,  1,     40,    1,  kind};
    og_low_rank_rows(&call, 0, 1);
    return out[column];
}

/* Every 16-bit number comes back, what is halfway goes to the even one, and
 * what is beyond is Inf. */
static void
rounding(void)
{
    for (int64_t column = 0; column < 40; column += 33) {
        for (uint32_t raw = 0; raw < 0x7C00; raw += 7) {
            float value = (float)half_value((uint16_t)raw);
            double next = raw == 0x7BFF ? 65536 : half_value(raw + 1);
            float halfway = (float)((value + next) / 2);
            uint32_t even = raw + (raw & 1);
            CHECK(rounded(value, OG_LOW_RANK_F16, column) == raw);
            CHECK(rounded(halfway, OG_LOW_RANK_F16, column) == even);
            CHECK(rounded(above(halfway), OG_LOW_RANK_F16, column) == raw + 1);
            CHECK((rounded(-halfway, OG_LOW_RANK_F16, column) & 0x7FFF) ==
                  even);
        }
        CHECK(rounded(65519.99F, OG_LOW_RANK_F16, column) == 0x7BFF);
        CHECK(rounded(65520, OG_LOW_RANK_F16, column) == 0x7C00);
        CHECK(rounded(-1e30F, OG_LOW_RANK_F16, column) == 0xFC00);
        CHECK(rounded(-INFINITY, OG_LOW_RANK_BF16, column) == 0xFF80);
        CHECK(rounded(1.00390625F, OG_LOW_RANK_BF16, column) == 0x3F80);
        CHECK(rounded(1.01171875F, OG_LOW_RANK_BF16, column) == 0x3F82);
        CHECK(rounded(3.4e38F, OG_LOW_RANK_BF16, column) == 0x7F80);
        CHECK((rounded(NAN, OG_LOW_RANK_BF16, column) & 0x7FFF) > 0x7F80);
        CHECK((rounded(NAN, OG_LOW_RANK_F16, column) & 0x7FFF) > 0x7C00);
    }
}

/* Two products one after the other are both at once. */
static void
composition(void)
{
    enum { ROWS = 11, COLUMNS = 45, RANK = 10, FIRST = 3 };
    float base[ROWS * COLUMNS], once[ROWS * COLUMNS], twice[ROWS * COLUMNS];
    float left[ROWS * RANK], right[RANK * COLUMNS];
    fill(base, ROWS * COLUMNS, OG_LOW_RANK_F32);
    fill(left, ROWS * RANK, OG_LOW_RANK_F32);
    fill(right, RANK * COLUMNS, OG_LOW_RANK_F32);
    og_low_rank call = {base,    once,    left, right,
                        COLUMNS, COLUMNS, RANK, COLUMNS,
                        ROWS,    COLUMNS, RANK, OG_LOW_RANK_F32};
    og_low_rank_rows(&call, 0, ROWS);
    call.out = twice;
    call.rank = FIRST;
    og_low_rank_rows(&call, 0, ROWS);
    call.base = twice;
    call.left += FIRST;
    call.right += (ptrdiff_t)FIRST * COLUMNS;
    call.rank = RANK - FIRST;
    og_low_rank_rows(&call, 0, ROWS);
    CHECK(memcmp(once, twice, sizeof once) == 0);
}

static void
all(void)
{
    CHECK(og_low_rank_isa()[0] != 0);
    sizes();
    streams();
    rounding();
    composition();
}

int
main(void)
{
    return for_each_tier(all);
}

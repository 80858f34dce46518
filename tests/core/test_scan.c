/* The row scan against reading every element one by one, on each instruction
 * set: random layouts in buffers of exact size whose gaps are full of NaN
 * (an element read that is not the tensor's is found, or is a heap overflow),
 * every bit pattern of the short formats, every length and alignment. */
#define _DEFAULT_SOURCE /* setenv, MAP_NORESERVE */
#include "core/scan.h"

#include <math.h>
#include <sys/mman.h>

#include "tiers.h"

enum { KINDS = OG_SCAN_C128 + 1, MOST_DIMS = 5 };

static const int width_of[KINDS] = {0, 1, 1, 2, 3, 0, 0, 0, 0, 1, 2, 3};

/* What the bits of one real element are, from the formats' descriptions. */
static uint8_t
element_found(og_scan_kind kind, uint64_t raw)
{
    double value = 1;
    switch (kind) {
        case OG_SCAN_F16:
        case OG_SCAN_C32:
            value = (raw >> 10 & 31) != 31 ? 1
                    : (raw & 1023) != 0    ? NAN
                    : raw >> 15            ? -INFINITY
                                           : INFINITY;
            break;
        case OG_SCAN_BF16: {
            uint32_t wide = (uint32_t)raw << 16;
            float f;
            memcpy(&f, &wide, sizeof f);
            value = f;
            break;
        }
        case OG_SCAN_F32:
        case OG_SCAN_C64: {
            float f;
            memcpy(&f, &raw, sizeof f);
            value = f;
            break;
        }
        case OG_SCAN_F64:
        case OG_SCAN_C128:
            memcpy(&value, &raw, sizeof value);
            break;
        case OG_SCAN_F8_E5M2:
            value = (raw >> 2 & 31) != 31 ? 1
                    : (raw & 3) != 0      ? NAN
                    : raw >> 7            ? -INFINITY
                                          : INFINITY;
            break;
        case OG_SCAN_F8_E4M3FN:
            value = (raw & 127) == 127 ? NAN : 1;
            break;
        case OG_SCAN_F8_FNUZ:
            value = raw == 128 ? NAN : 1;
            break;
        case OG_SCAN_F8_E8M0:
            value = raw == 255 ? NAN : 1;
            break;
        default:
            break;
    }
    return isnan(value)    ? OG_FOUND_NAN
           : !isinf(value) ? 0
           : value > 0     ? OG_FOUND_POS_INF
                           : OG_FOUND_NEG_INF;
}

static uint64_t
load(const char *p, int width)
{
    uint64_t raw = 0;
    memcpy(&raw, p, (size_t)1 << width);
    return raw;
}

/* A random value, with `odds` in 256 something near the limits of a kind. */
static uint64_t
random_raw(og_scan_kind kind, int64_t odds)
{
    static const uint64_t near[KINDS] = {
        [OG_SCAN_F16] = 0x7C00,
        [OG_SCAN_BF16] = 0x7F80,
        [OG_SCAN_F32] = 0x7F800000,
        [OG_SCAN_F64] = 0x7FF0000000000000,
        [OG_SCAN_F8_E5M2] = 0x7C,
        [OG_SCAN_F8_E4M3FN] = 0x7E,
        [OG_SCAN_F8_FNUZ] = 0x7F,
        [OG_SCAN_F8_E8M0] = 0xFE,
        [OG_SCAN_C32] = 0x7C00,
        [OG_SCAN_C64] = 0x7F800000,
        [OG_SCAN_C128] = 0x7FF0000000000000,
    };
    int bits = 8 << width_of[kind];
    uint64_t all = UINT64_MAX >> (64 - bits);
    uint64_t raw;
    do {
        raw = (next_random() ^ next_random() << 24) & all;
    } while (element_found(kind, raw) != 0);
    if (below(256) < odds) {
        raw = (near[kind] + (uint64_t)below(3) - 1) & all;
        raw ^= below(2) ? (uint64_t)1 << (bits - 1) : 0;
        raw |= below(8) == 0 ? next_random() & all : 0;
    }
    return raw;
}

/* --- Random layouts ------------------------------------------------------ */

typedef struct layout {
    int64_t ndim, sizes[MOST_DIMS], strides[MOST_DIMS];
    int64_t places; /* elements from the first to the last */
    int64_t numel;
} layout;

static layout
random_layout(int64_t largest)
{
    layout l = {.ndim = below(MOST_DIMS + 1), .places = 1, .numel = 1};
    int order[MOST_DIMS] = {0, 1, 2, 3, 4};
    for (int i = MOST_DIMS - 1; i > 0 && below(2); i--) {
        int j = (int)below(i + 1), held = order[i];
        order[i] = order[j];
        order[j] = held;
    }
    int64_t step = 1 + (below(6) == 0);
    for (int i = MOST_DIMS - 1; i >= 0; i--) {
        int d = order[i];
        if (d >= l.ndim) {
            continue;
        }
        l.sizes[d] = below(40) == 0 ? 0 : 1 + below(below(4) ? 5 : largest);
        l.strides[d] = below(12) == 0 ? 0 : step;
        l.numel *= l.sizes[d];
        if (l.sizes[d] > 0 && l.strides[d] > 0) {
            l.places += (l.sizes[d] - 1) * l.strides[d];
            step = l.places + (below(4) == 0 ? below(3) : 0);
        }
        if (step > 60000) {
            largest = 3;
        }
    }
    return l;
}

/* Place of the i-th element; *row is its row. */
static int64_t
place_of(const layout *l, int64_t i, int64_t *row)
{
    int64_t place = 0;
    *row = 0;
    for (int64_t d = l->ndim - 1; d >= 0; d--) {
        int64_t index = i % l->sizes[d];
        i /= l->sizes[d];
        place += index * l->strides[d];
        *row = index;
    }
    return place;
}

static void
check_bits(const og_scan *scan, const uint8_t *expected)
{
    int64_t rows = scan->rows;
    uint8_t *bits = calloc((size_t)rows + 1, 1);
    og_scan_rows(scan, 0, rows, bits);
    CHECK(memcmp(bits, expected, (size_t)rows) == 0);
    memset(bits, 0, (size_t)rows);
    for (int64_t r = 0, next; r < rows; r = next) {
        next = r + 1 + below(rows - r);
        og_scan_rows(scan, r, next, bits);
    }
    CHECK(memcmp(bits, expected, (size_t)rows) == 0);
    memset(bits, 0, (size_t)rows);
    for (int64_t u = 0, next; u < scan->units; u = next) {
        next = u + 1 + below(scan->units - u);
        og_scan_units(scan, u, next, bits);
    }
    CHECK(memcmp(bits, expected, (size_t)rows) == 0);
    CHECK(bits[rows] == 0);
    CHECK(scan->grain >= 1 && scan->units >= 0);
    free(bits);
}

static void
check_layout(og_scan_kind kind, const layout *l, int64_t odds)
{
    int pairs = kind >= OG_SCAN_C32 ? 2 : 1, width = width_of[kind];
    int64_t bytes = l->numel == 0 ? 0 : (l->places * pairs) << width;
    int64_t offset = below(65);
    int64_t rows = l->ndim > 0 ? l->sizes[0] : 1;
    char *block = malloc((size_t)(bytes + offset) + (bytes + offset == 0));
    uint8_t *expected = calloc((size_t)rows + 1, 1);
    char *data = block + offset;
    memset(block, kind == OG_SCAN_F8_FNUZ ? 0x80 : 0xFF,
           (size_t)(bytes + offset));
    for (int64_t i = 0; i < l->numel * pairs; i++) {
        int64_t row;
        char *at = data + ((place_of(l, i / pairs, &row) * pairs + i % pairs)
                           << width);
        uint64_t raw = random_raw(kind, odds);
        memcpy(at, &raw, (size_t)1 << width);
    }
    for (int64_t i = 0; i < l->numel * pairs; i++) { /* strides of 0 */
        int64_t row;
        const char *at =
            data +
            ((place_of(l, i / pairs, &row) * pairs + i % pairs) << width);
        expected[row] |= element_found(kind, load(at, width));
    }
    og_scan scan;
    og_error err;
    CHECK(og_scan_prepare(&scan, l->numel > 0 ? data : NULL, l->ndim, l->sizes,
                          l->strides, kind, &err) == OG_OK);
    CHECK(scan.rows == rows);
    check_bits(&scan, expected);
    free(expected);
    free(block);
}

static void
layouts(void)
{
    const int64_t odds[] = {0, 1, 40, 256};
    for (int round = 0; round < 6000; round++) {
        layout l = random_layout(round % 8 == 0 ? 400 : 24);
        if (l.numel < 40000) {
            check_layout((og_scan_kind)below(KINDS), &l, odds[below(4)]);
        }
    }
}

/* Large enough to be cut into units, in every way there is to cut. */
static void
large_layouts(void)
{
    const layout all[] = {
        {2, {3, 150000}, {150000, 1}, 450000, 450000},
        {2, {3, 150000}, {150001, 1}, 450002, 450000},
        {2, {150000, 3}, {1, 150000}, 450000, 450000},
        {2, {3, 150000}, {1, 3}, 450000, 450000},
        {2, {300, 1500}, {1, 300}, 450000, 450000},
        {2, {17000, 20}, {1, 17001}, 340019, 340000},
        {2, {3, 70000}, {1, 4}, 280000, 210000},
        {2, {3, 150000}, {0, 1}, 150000, 450000},
        {2, {1, 300000}, {0, 2}, 599999, 300000},
        {3, {2, 90000, 2}, {2, 4, 1}, 360000, 360000},
        {3, {2, 3, 90000}, {300000, 95000, 1}, 580000, 540000},
        {3, {4, 5000, 9}, {9, 36, 1}, 180000, 180000},
        {1, {400000}, {1}, 400000, 400000},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        check_layout(OG_SCAN_F32, &all[i], 0);
        check_layout(below(2) ? OG_SCAN_F64 : OG_SCAN_C64, &all[i], 1);
    }
}

/* --- Patterns, lengths, alignments --------------------------------------- */

/* Each pattern alone in a row, in every place of a run of 40 rows. */
static void
patterns(void)
{
    static uint16_t wide[1 << 16];
    static uint8_t narrow[1 << 16], bits[1 << 16];
    for (int64_t i = 0; i < 1 << 16; i++) {
        wide[i] = (uint16_t)i;
        narrow[i] = (uint8_t)i;
    }
    for (int kind = 0; kind <= OG_SCAN_F8_E8M0; kind++) {
        int width = width_of[kind];
        if (kind == OG_SCAN_NONE || width > 1) {
            continue;
        }
        const int64_t sizes[2] = {1 << 16, 1}, strides[2] = {1, 1};
        const void *data = width == 1 ? (void *)wide : (void *)narrow;
        og_scan scan;
        CHECK(og_scan_prepare(&scan, data, 2, sizes, strides,
                              (og_scan_kind)kind, NULL) == OG_OK);
        memset(bits, 0, sizeof bits);
        og_scan_rows(&scan, 0, 1 << 16, bits);
        for (int64_t i = 0; i < 1 << 16; i++) {
            uint64_t raw = width == 1 ? wide[i] : narrow[i];
            uint8_t expected = element_found((og_scan_kind)kind, raw);
            CHECK(bits[i] == expected);
            uint64_t run[10] = {0};
            int64_t one[2] = {1, 40};
            memcpy((char *)run + (i % 40 << width), &raw, (size_t)1 << width);
            og_scan alone;
            uint8_t found = 0;
            CHECK(og_scan_prepare(&alone, run, 2, one, strides,
                                  (og_scan_kind)kind, NULL) == OG_OK);
            og_scan_rows(&alone, 0, 1, &found);
            CHECK(found == expected);
        }
    }
}

/* The end of a page behind which nothing may be read: masked loads are not
 * seen by the sanitizer, but a lane too many is a fault here. */
static char *
page_end(void)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *two = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(two != MAP_FAILED && mprotect(two + page, page, PROT_NONE) == 0);
    return two + page;
}

/* Runs of every length at every alignment that a kernel can tell apart, in a
 * block of exact size or at the end of a page; in every other round a few
 * elements are special. */
static void
lengths(void)
{
    char *const end = page_end();
    for (int kind = 1; kind <= OG_SCAN_F8_E8M0; kind++) {
        int width = width_of[kind];
        for (int64_t n = 0; n <= 300; n++) {
            for (int64_t k = 0; k < (n < 70 ? 64 : 4); k++) {
                int64_t offset = n < 70 ? k : below(64);
                size_t bytes = (size_t)((n << width) + offset);
                char *block = malloc(bytes + (bytes == 0));
                char *run = k % 4 < 2 ? block + offset : end - (n << width);
                memset(block, 0xFF, bytes);
                uint8_t expected = 0;
                uint8_t *each = calloc((size_t)n + 1, 1);
                for (int64_t i = 0; i < n; i++) {
                    bool special = k % 2 == 1 && below(n) < 2;
                    uint64_t raw =
                        random_raw((og_scan_kind)kind, special ? 256 : 0);
                    memcpy(run + (i << width), &raw, (size_t)1 << width);
                    each[i] = element_found((og_scan_kind)kind, raw);
                    expected |= each[i];
                }
                const int64_t row[2] = {1, n}, rows[2] = {n, 1};
                const int64_t strides[2] = {1, 1};
                og_scan scan;
                uint8_t found = 0, *bits = calloc((size_t)n + 1, 1);
                (void)og_scan_prepare(&scan, run, 2, row, strides,
                                      (og_scan_kind)kind, NULL);
                og_scan_rows(&scan, 0, 1, &found);
                CHECK(found == expected);
                (void)og_scan_prepare(&scan, run, 2, rows, strides,
                                      (og_scan_kind)kind, NULL);
                og_scan_rows(&scan, 0, n, bits);
                CHECK(memcmp(bits, each, (size_t)n) == 0);
                free(each);
                free(bits);
                free(block);
            }
        }
    }
}

/* --- More than 2**31 elements -------------------------------------------- */

static void
huge(void)
{
    const int64_t size = ((int64_t)1 << 31) + 77;
    og_scan scan;
    uint8_t bits[2] = {0, 0};
    float one[2] = {1, -INFINITY};
    const int64_t expanded[3] = {2, size, size}, zero[3] = {1, 0, 0};
    CHECK(og_scan_prepare(&scan, one, 3, expanded, zero, OG_SCAN_F32, NULL) ==
          OG_OK);
    og_scan_rows(&scan, 0, 2, bits);
    CHECK(bits[0] == 0 && bits[1] == OG_FOUND_NEG_INF);
    /* Pages that are never written take no memory, and are read as zeros. */
    char *data = mmap(NULL, (size_t)size * 2, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(data != MAP_FAILED);
    const int64_t sizes[2] = {2, size}, wide[2] = {size, 1};
    const int64_t sparse[2] = {2, 3}, apart[2] = {1, size / 2};
    data[size / 2 * 2 + 1] = (char)0x7C;
    CHECK(og_scan_prepare(&scan, data, 2, sparse, apart, OG_SCAN_F8_E5M2,
                          NULL) == OG_OK);
    bits[0] = bits[1] = 0;
    og_scan_units(&scan, 0, scan.units, bits);
    CHECK(bits[0] == 0 && bits[1] == OG_FOUND_POS_INF);
    data[size / 2 * 2 + 1] = 0;
    data[size * 2 - 1] = (char)0xFF;
    CHECK(og_scan_prepare(&scan, data, 2, sizes, wide, OG_SCAN_F8_E5M2,
                          NULL) == OG_OK);
    CHECK(scan.units > 2 && scan.grain == 1);
    bits[0] = bits[1] = 0;
    og_scan_units(&scan, scan.units / 2 + 3, scan.units / 2 + 5, bits);
    og_scan_units(&scan, scan.units - 2, scan.units, bits);
    CHECK(bits[0] == 0 && bits[1] == OG_FOUND_NAN);
    munmap(data, (size_t)size * 2);
}

/* --- Ids, and what is refused -------------------------------------------- */

static bool
id_outside(og_id_kind kind, uint64_t raw, int64_t size)
{
    switch (kind) {
        case OG_ID_I8:
            return (int8_t)raw < 0 || (int8_t)raw >= size;
        case OG_ID_I16:
            return (int16_t)raw < 0 || (int16_t)raw >= size;
        case OG_ID_I32:
            return (int32_t)raw < 0 || (int32_t)raw >= size;
        case OG_ID_I64:
            return (int64_t)raw < 0 || (int64_t)raw >= size;
        default:
            return size <= 0 || raw >= (uint64_t)size;
    }
}

static void
ids(void)
{
    const int widths[] = {0, 0, 1, 2, 3, 1, 2, 3};
    const int64_t bounds[] = {-1,
                              0,
                              1,
                              2,
                              100,
                              127,
                              128,
                              129,
                              255,
                              256,
                              32767,
                              32768,
                              65536,
                              INT32_MAX,
                              (int64_t)INT32_MAX + 1,
                              (int64_t)UINT32_MAX + 1,
                              INT64_MAX};
    for (int round = 0; round < 8000; round++) {
        og_id_kind kind = (og_id_kind)(round % 8);
        int width = widths[kind];
        int64_t rows = 1 + below(12), run = below(40), bad = 0;
        int64_t size = bounds[below(sizeof bounds / sizeof *bounds)];
        size_t bytes = (size_t)((rows * run) << width);
        char *data = malloc(bytes + (bytes == 0));
        uint8_t expected[16] = {0}, bits[16] = {0};
        for (int64_t i = 0; i < rows * run; i++) {
            uint64_t raw = (uint64_t)below(size > 1 ? size : 1);
            raw =
                below(64) == 0 ? (uint64_t)size + (uint64_t)below(3) - 1 : raw;
            raw = below(64) == 0 ? next_random() << 8 | raw : raw;
            raw &= UINT64_MAX >> (64 - (8 << width));
            memcpy(data + (i << width), &raw, (size_t)1 << width);
            if (id_outside(kind, raw, size)) {
                expected[i / run] = OG_FOUND_OUTSIDE;
                bad++;
            }
        }
        const int64_t sizes[2] = {rows, run}, strides[2] = {run, 1};
        og_scan scan;
        CHECK(og_scan_prepare_ids(&scan, data, 2, sizes, strides, kind, size,
                                  NULL) == OG_OK);
        og_scan_units(&scan, 0, scan.units, bits);
        CHECK(memcmp(bits, expected, sizeof bits) == 0);
        free(data);
    }
}

static void
refusals(void)
{
    float x = NAN;
    og_scan scan;
    og_error err;
    int64_t sizes[OG_SCAN_DIMS + 1], strides[OG_SCAN_DIMS + 1];
    for (int i = 0; i <= OG_SCAN_DIMS; i++) {
        sizes[i] = 1;
        strides[i] = i;
    }
    uint8_t bits = 0;
    CHECK(og_scan_prepare(&scan, &x, OG_SCAN_DIMS, sizes, strides, OG_SCAN_F32,
                          &err) == OG_OK);
    og_scan_rows(&scan, 0, 1, &bits);
    CHECK(bits == OG_FOUND_NAN);
    CHECK(og_scan_prepare(&scan, &x, OG_SCAN_DIMS + 1, sizes, strides,
                          OG_SCAN_F32, &err) == OG_BAD_ARGUMENT);
    sizes[1] = 3;
    strides[1] = INT64_MAX / 4;
    CHECK(og_scan_prepare(&scan, &x, 2, sizes, strides, OG_SCAN_F32, &err) ==
          OG_BAD_ARGUMENT);
    strides[1] = -1;
    CHECK(og_scan_prepare(&scan, &x, 2, sizes, strides, OG_SCAN_F32, &err) ==
          OG_BAD_ARGUMENT);
    sizes[1] = -1;
    strides[1] = 1;
    CHECK(og_scan_prepare(&scan, &x, 2, sizes, strides, OG_SCAN_F32, &err) ==
          OG_BAD_ARGUMENT);
    CHECK(strstr(err.message, "pass x.contiguous()") != NULL);
    CHECK(og_scan_prepare(&scan, &x, 0, NULL, NULL, (og_scan_kind)99, &err) ==
          OG_BAD_ARGUMENT);
    CHECK(og_scan_prepare(&scan, &x, 0, NULL, NULL, OG_SCAN_NONE, &err) ==
          OG_OK);
    CHECK(scan.units == 0 && scan.rows == 1);
    CHECK(og_found_negated(OG_FOUND_NAN | OG_FOUND_POS_INF) ==
          (OG_FOUND_NAN | OG_FOUND_NEG_INF));
    CHECK(og_found_negated(OG_FOUND_NEG_INF) == OG_FOUND_POS_INF);
}

static void
all(void)
{
    refusals();
    ids();
    lengths();
    patterns();
    layouts();
    large_layouts();
    huge();
}

int
main(void)
{
    return for_each_tier(all);
}

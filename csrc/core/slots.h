/* The bit-packed error word, and what may be done with one sample's slots.
 *
 * The one definition of the layout, for C, CUDA, the runner and (tested
 * equal) opguard.flags.constants. A slot is 16 bits: severity in bits 0-1,
 * code in 2-5, location in 6-15; a slot that holds nothing is 0. A sample's
 * row is its flag words side by side, and because words are little-endian,
 * slot i of a row is its i-th uint16_t whatever the word's dtype: int64 and
 * float64 hold four slots, int32 and float32 two. Nothing here reads a word
 * as a float.
 *
 * Invariant: rows written here have no holes (an empty slot is followed by
 * empty slots only). Rows with holes are accepted and closed when an error
 * is recorded in them. Used by device code too: no allocation, no libc. */
#ifndef OPGUARD_CORE_SLOTS_H
#define OPGUARD_CORE_SLOTS_H

#include <stdbool.h>
#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "opguard's flag words are read as little-endian slots"
#endif

#if defined(__CUDACC__)
#define OG_SLOTS_FN static __host__ __device__ __forceinline__
#else
#define OG_SLOTS_FN static inline
#endif

#define OG_SLOT_BITS 16
#define OG_SLOT_MASK 0xFFFF
#define OG_SEVERITY_SHIFT 0
#define OG_SEVERITY_BITS 2
#define OG_SEVERITY_MASK 0x3
#define OG_CODE_SHIFT 2
#define OG_CODE_BITS 4
#define OG_CODE_MASK 0x3C
#define OG_LOCATION_SHIFT 6
#define OG_LOCATION_BITS 10
#define OG_LOCATION_MASK 0xFFC0
#define OG_LOCATION_MAX 1023
#define OG_SLOTS_MAX 32768

/* Codes and severities that the kernels themselves record. */
#define OG_CODE_NAN 1
#define OG_CODE_INF 2
#define OG_CODE_OUT_OF_BOUNDS 5
#define OG_SEVERITY_ERROR 2
#define OG_SEVERITY_CRITICAL 3

enum { OG_CHRONO = 0, OG_BY_SEVERITY = 1, OG_BY_LOCATION = 2 };
enum { OG_FIRST = 0, OG_LAST = 1 };
enum {
    OG_DEDUPE_NONE = 0,
    OG_DEDUPE_CODE = 1,
    OG_DEDUPE_LOCATION = 2,
    OG_DEDUPE_UNIQUE = 3
};
enum { OG_INT64 = 0, OG_INT32 = 1, OG_FLOAT64 = 2, OG_FLOAT32 = 3 };

/* A configuration travels as one integer (`key`), so that an op takes it as
 * an int and a compiled graph holds it as a constant:
 * bits 0-15 num_slots, 16-17 priority, 18 order, 19-20 dedupe, 21-22 carrier
 * (dtype of new flags). Everything above is 0. */
#define OG_KEY_PRIORITY_SHIFT 16
#define OG_KEY_ORDER_SHIFT 18
#define OG_KEY_DEDUPE_SHIFT 19
#define OG_KEY_CARRIER_SHIFT 21
#define OG_KEY_END_SHIFT 23

typedef struct og_policy {
    int32_t num_slots; /* 1..OG_SLOTS_MAX */
    int32_t priority;
    int32_t order;
    int32_t dedupe;
    int32_t carrier;
} og_policy;

OG_SLOTS_FN og_policy
og_policy_of(int64_t key)
{
    og_policy p;
    p.num_slots = (int32_t)(key & 0xFFFF);
    p.priority = (int32_t)(key >> OG_KEY_PRIORITY_SHIFT) & 3;
    p.order = (int32_t)(key >> OG_KEY_ORDER_SHIFT) & 1;
    p.dedupe = (int32_t)(key >> OG_KEY_DEDUPE_SHIFT) & 3;
    p.carrier = (int32_t)(key >> OG_KEY_CARRIER_SHIFT) & 3;
    return p;
}

OG_SLOTS_FN bool
og_policy_key_ok(int64_t key)
{
    og_policy p = og_policy_of(key);
    return key >> OG_KEY_END_SHIFT == 0 && p.num_slots >= 1 &&
           p.num_slots <= OG_SLOTS_MAX && p.priority <= OG_BY_LOCATION;
}

OG_SLOTS_FN uint16_t
og_slot_make(int32_t location, int32_t code, int32_t severity)
{
    return (uint16_t)(severity << OG_SEVERITY_SHIFT | code << OG_CODE_SHIFT |
                      location << OG_LOCATION_SHIFT);
}

OG_SLOTS_FN int32_t
og_slot_severity(uint16_t slot)
{
    return (slot & OG_SEVERITY_MASK) >> OG_SEVERITY_SHIFT;
}

OG_SLOTS_FN int32_t
og_slot_code(uint16_t slot)
{
    return (slot & OG_CODE_MASK) >> OG_CODE_SHIFT;
}

OG_SLOTS_FN int32_t
og_slot_location(uint16_t slot)
{
    return (slot & OG_LOCATION_MASK) >> OG_LOCATION_SHIFT;
}

/* A slot that may be recorded: code and severity are both set. */
OG_SLOTS_FN bool
og_slot_counts(uint16_t slot)
{
    return (slot & OG_CODE_MASK) != 0 && (slot & OG_SEVERITY_MASK) != 0;
}

/* Closes holes, keeping the order; returns how many slots are in use. */
OG_SLOTS_FN int32_t
og_row_compact(uint16_t *row, int32_t capacity)
{
    int32_t used = 0;
    for (int32_t i = 0; i < capacity; i++) {
        uint16_t slot = row[i];
        if (slot != 0) {
            if (i != used) {
                row[used] = slot;
                row[i] = 0;
            }
            used++;
        }
    }
    return used;
}

/* The bits in which a slot equals another under a dedupe policy. */
OG_SLOTS_FN uint16_t
og_dedupe_mask(int32_t dedupe)
{
    switch (dedupe) {
        case OG_DEDUPE_CODE:
            return OG_CODE_MASK;
        case OG_DEDUPE_LOCATION:
            return OG_LOCATION_MASK;
        case OG_DEDUPE_UNIQUE:
            return OG_CODE_MASK | OG_LOCATION_MASK;
        default:
            return 0;
    }
}

/* How much a slot wants to stay in a full row; the least is the first to go.
 * Not for OG_CHRONO, where only the order of arrival counts. */
OG_SLOTS_FN int32_t
og_slot_rank(uint16_t slot, og_policy p)
{
    int32_t value = p.priority == OG_BY_SEVERITY ? og_slot_severity(slot)
                                                 : og_slot_location(slot);
    return p.order == OG_LAST ? value : -value;
}

/* The slot of a full row to overwrite with slot, -1 for none: the first of
 * the least rank, when slot's is higher. */
OG_SLOTS_FN int32_t
og_row_victim(const uint16_t *row, int32_t used, og_policy p, uint16_t slot)
{
    int32_t victim = 0;
    for (int32_t i = 1; i < used; i++) {
        if (og_slot_rank(row[i], p) < og_slot_rank(row[victim], p)) {
            victim = i;
        }
    }
    return og_slot_rank(slot, p) > og_slot_rank(row[victim], p) ? victim : -1;
}

/* Records one error in a compacted row that has `used` slots in use and room
 * for `limit` (at most its capacity); returns how many are in use then.
 *
 * An error whose code and/or location (dedupe) is already there replaces that
 * slot when it is more severe and is otherwise not recorded again. CHRONO +
 * LAST puts the newest first and drops the oldest; everything else appends
 * while there is room, and when full CHRONO + FIRST keeps what is there,
 * SEVERITY and LOCATION keep the highest (LAST) or lowest (FIRST). */
OG_SLOTS_FN int32_t
og_row_record(uint16_t *row, int32_t used, int32_t limit, og_policy p,
              uint16_t slot)
{
    uint16_t same = og_dedupe_mask(p.dedupe);
    for (int32_t i = 0; same != 0 && i < used; i++) {
        if (((row[i] ^ slot) & same) == 0) {
            if (og_slot_severity(slot) > og_slot_severity(row[i])) {
                row[i] = slot;
            }
            return used;
        }
    }
    if (p.priority == OG_CHRONO && p.order == OG_LAST) {
        int32_t kept = used < limit ? used : limit - 1;
        for (int32_t i = used - 1; i > kept; i--) {
            row[i] = 0;
        }
        for (int32_t i = kept; i > 0; i--) {
            row[i] = row[i - 1];
        }
        row[0] = slot;
        return kept + 1;
    }
    if (used < limit) {
        row[used] = slot;
        return used + 1;
    }
    if (p.priority != OG_CHRONO) {
        int32_t victim = og_row_victim(row, used, p, slot);
        if (victim >= 0) {
            row[victim] = slot;
        }
    }
    return used;
}

/* Records slot in a row; the row is untouched when slot does not count. */
OG_SLOTS_FN void
og_row_push(uint16_t *row, int32_t capacity, og_policy p, uint16_t slot)
{
    if (og_slot_counts(slot)) {
        int32_t limit = p.num_slots < capacity ? p.num_slots : capacity;
        int32_t used = og_row_compact(row, capacity);
        (void)og_row_record(row, used, limit, p, slot);
    }
}

/* Records every error of other in row, as pushing them one after another
 * would; other is the younger. Both have the same capacity and do not
 * overlap. Under CHRONO + LAST, where the newest comes first, other is read
 * from its end. Slots of other that do not count are left out. */
OG_SLOTS_FN void
og_row_merge(uint16_t *row, const uint16_t *other, int32_t capacity,
             og_policy p)
{
    int32_t limit = p.num_slots < capacity ? p.num_slots : capacity;
    int32_t used = -1;
    bool backwards = p.priority == OG_CHRONO && p.order == OG_LAST;
    for (int32_t i = 0; i < capacity; i++) {
        uint16_t slot = other[backwards ? capacity - 1 - i : i];
        if (og_slot_counts(slot)) {
            used = used < 0 ? og_row_compact(row, capacity) : used;
            used = og_row_record(row, used, limit, p, slot);
        }
    }
}

/* Takes out every slot with this code and closes the holes. */
OG_SLOTS_FN void
og_row_clear(uint16_t *row, int32_t capacity, int32_t code)
{
    for (int32_t i = 0; i < capacity; i++) {
        if (row[i] != 0 && og_slot_code(row[i]) == code) {
            row[i] = 0;
        }
    }
    (void)og_row_compact(row, capacity);
}

#endif

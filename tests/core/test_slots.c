/* One sample's slots against a model that keeps them as a list of severity,
 * code and location, and against examples worked out by hand. */
#include "core/slots.h"

#include <stdlib.h>
#include <string.h>

#include "check.h"

enum { MOST = 24 };

static uint32_t seed = 7;

static int32_t
below(int32_t n)
{
    seed = seed * 1664525u + 1013904223u;
    return (int32_t)((seed >> 8) % (uint32_t)n);
}

/* --- The model ----------------------------------------------------------- */

typedef struct error {
    int32_t severity, code, location;
} error;

typedef struct errors {
    int32_t count;
    error all[2 * MOST];
} errors;

static error
error_of(uint16_t slot)
{
    error e = {slot % 4, slot / 4 % 16, slot / 64};
    return e;
}

static uint16_t
slot_of(error e)
{
    return (uint16_t)(e.severity + 4 * e.code + 64 * e.location);
}

static errors
errors_of(const uint16_t *row, int32_t capacity)
{
    errors list = {0, {{0, 0, 0}}};
    for (int32_t i = 0; i < capacity; i++) {
        if (row[i] != 0) {
            list.all[list.count++] = error_of(row[i]);
        }
    }
    return list;
}

static bool
is_row(const errors *list, const uint16_t *row, int32_t capacity)
{
    for (int32_t i = 0; i < capacity; i++) {
        uint16_t expected = i < list->count ? slot_of(list->all[i]) : 0;
        if (row[i] != expected) {
            return false;
        }
    }
    return true;
}

static bool
is_same(error a, error b, int32_t dedupe)
{
    switch (dedupe) {
        case OG_DEDUPE_CODE:
            return a.code == b.code;
        case OG_DEDUPE_LOCATION:
            return a.location == b.location;
        case OG_DEDUPE_UNIQUE:
            return a.code == b.code && a.location == b.location;
        default:
            return false;
    }
}

/* Whether a is to go before b when one must. */
static bool
goes_before(error a, error b, og_policy p)
{
    int32_t x = p.priority == OG_BY_SEVERITY ? a.severity : a.location;
    int32_t y = p.priority == OG_BY_SEVERITY ? b.severity : b.location;
    return p.order == OG_LAST ? x < y : x > y;
}

static void
model_record(errors *list, int32_t limit, og_policy p, error e)
{
    for (int32_t i = 0; i < list->count; i++) {
        if (is_same(list->all[i], e, p.dedupe)) {
            if (e.severity > list->all[i].severity) {
                list->all[i] = e;
            }
            return;
        }
    }
    if (p.priority == OG_CHRONO && p.order == OG_LAST) {
        memmove(list->all + 1, list->all,
                (size_t)list->count * sizeof *list->all);
        list->all[0] = e;
        list->count = list->count + 1 < limit ? list->count + 1 : limit;
    }
    else if (list->count < limit) {
        list->all[list->count++] = e;
    }
    else if (p.priority != OG_CHRONO) {
        int32_t out = 0;
        for (int32_t i = 1; i < list->count; i++) {
            out = goes_before(list->all[i], list->all[out], p) ? i : out;
        }
        if (goes_before(list->all[out], e, p)) {
            list->all[out] = e;
        }
    }
}

/* --- Random rows --------------------------------------------------------- */

static uint16_t
random_slot(void)
{
    error e = {below(8) ? 1 + below(3) : 0, below(8) ? 1 + below(3) : 0,
               below(5)};
    return slot_of(e);
}

static bool
records(uint16_t slot)
{
    error e = error_of(slot);
    return e.severity != 0 && e.code != 0;
}

static void
random_row(uint16_t *row, int32_t capacity)
{
    int32_t used = below(capacity + 1);
    bool holes = below(4) == 0;
    for (int32_t i = 0; i < capacity; i++) {
        row[i] = i < used && !(holes && below(2)) ? random_slot() : 0;
    }
}

static og_policy
random_policy(int32_t capacity)
{
    og_policy p = {.num_slots = 1 + below(capacity + 3),
                   .priority = below(3),
                   .order = below(2),
                   .dedupe = below(4)};
    return p;
}

static void
against_the_model(void)
{
    for (int round = 0; round < 200000; round++) {
        int32_t capacity = 2 * (1 + below(below(4) ? 4 : MOST / 2));
        og_policy p = random_policy(capacity);
        int32_t limit = p.num_slots < capacity ? p.num_slots : capacity;
        uint16_t row[MOST], other[MOST], before[MOST], slot = random_slot();
        random_row(row, capacity);
        random_row(other, capacity);
        memcpy(before, row, sizeof row);
        errors list = errors_of(row, capacity);
        int32_t code = below(5);
        bool changes = true;
        if (round % 3 == 0) {
            changes = records(slot);
            if (changes) {
                model_record(&list, limit, p, error_of(slot));
            }
            og_row_push(row, capacity, p, slot);
        }
        else if (round % 3 == 1) {
            bool newest_first = p.priority == OG_CHRONO && p.order == OG_LAST;
            changes = false;
            for (int32_t i = 0; i < capacity; i++) {
                slot = other[newest_first ? capacity - 1 - i : i];
                if (records(slot)) {
                    model_record(&list, limit, p, error_of(slot));
                    changes = true;
                }
            }
            og_row_merge(row, other, capacity, p);
        }
        else {
            int32_t kept = 0;
            for (int32_t i = 0; i < list.count; i++) {
                if (list.all[i].code != code) {
                    list.all[kept++] = list.all[i];
                }
            }
            list.count = kept;
            og_row_clear(row, capacity, code);
        }
        CHECK(changes ? is_row(&list, row, capacity)
                      : memcmp(row, before, 2 * (size_t)capacity) == 0);
    }
}

/* --- By hand --------------------------------------------------------------
 */

static void
layout(void)
{
    CHECK(og_slot_make(1023, 15, 3) == 0xFFFF);
    CHECK(og_slot_make(5, OG_CODE_NAN, OG_SEVERITY_CRITICAL) == 0x147);
    for (int32_t slot = 0; slot < 1 << 16; slot++) {
        uint16_t s = (uint16_t)slot;
        CHECK(og_slot_severity(s) == slot % 4);
        CHECK(og_slot_code(s) == slot / 4 % 16);
        CHECK(og_slot_location(s) == slot / 64);
        CHECK(og_slot_make(slot / 64, slot / 4 % 16, slot % 4) == s);
        CHECK(og_slot_counts(s) == (slot % 4 != 0 && slot / 4 % 16 != 0));
    }
    uint64_t word = 0;
    uint16_t row[4] = {0};
    const og_policy p = {.num_slots = 4};
    og_row_push(row, 4, p, og_slot_make(1, 1, 3));
    og_row_push(row, 4, p, og_slot_make(2, 2, 1));
    memcpy(&word, row, sizeof word);
    CHECK(word == (0x47u | (uint64_t)0x89 << 16));
}

static void
keys(void)
{
    const int64_t key = 16 | (int64_t)OG_BY_LOCATION << 16 | 1 << 18 |
                        (int64_t)OG_DEDUPE_UNIQUE << 19 |
                        (int64_t)OG_FLOAT32 << 21;
    og_policy p = og_policy_of(key);
    CHECK(og_policy_key_ok(key));
    CHECK(p.num_slots == 16 && p.priority == OG_BY_LOCATION);
    CHECK(p.order == OG_LAST && p.dedupe == OG_DEDUPE_UNIQUE);
    CHECK(p.carrier == OG_FLOAT32);
    CHECK(!og_policy_key_ok(0));
    CHECK(!og_policy_key_ok(-1));
    CHECK(!og_policy_key_ok(OG_SLOTS_MAX + 1));
    CHECK(og_policy_key_ok(OG_SLOTS_MAX));
    CHECK(!og_policy_key_ok(16 | (int64_t)3 << 16));
    CHECK(!og_policy_key_ok(16 | (int64_t)1 << 23));
}

/* Locations 1, 2, 3 with severities 1, 3, 2 and one code into room for two,
 * then what each policy keeps, in order. */
static void
what_is_kept(void)
{
    const struct {
        int32_t priority, order;
        int32_t locations[2];
    } all[] = {
        {OG_CHRONO, OG_FIRST, {1, 2}},      {OG_CHRONO, OG_LAST, {3, 2}},
        {OG_BY_SEVERITY, OG_LAST, {3, 2}},  {OG_BY_SEVERITY, OG_FIRST, {1, 3}},
        {OG_BY_LOCATION, OG_FIRST, {1, 2}}, {OG_BY_LOCATION, OG_LAST, {3, 2}},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        og_policy p = {.num_slots = 2,
                       .priority = all[i].priority,
                       .order = all[i].order};
        uint16_t row[4] = {0};
        og_row_push(row, 4, p, og_slot_make(1, 1, 1));
        og_row_push(row, 4, p, og_slot_make(2, 1, 3));
        og_row_push(row, 4, p, og_slot_make(3, 1, 2));
        CHECK(og_slot_location(row[0]) == all[i].locations[0]);
        CHECK(og_slot_location(row[1]) == all[i].locations[1]);
        CHECK(row[2] == 0 && row[3] == 0);
    }
}

static void
same_errors(void)
{
    uint16_t row[4] = {0};
    og_policy p = {.num_slots = 4, .dedupe = OG_DEDUPE_UNIQUE};
    og_row_push(row, 4, p, og_slot_make(1, 1, 1));
    og_row_push(row, 4, p, og_slot_make(1, 2, 1));
    og_row_push(row, 4, p, og_slot_make(1, 1, 3));
    og_row_push(row, 4, p, og_slot_make(1, 2, 1));
    CHECK(row[0] == og_slot_make(1, 1, 3) && row[1] == og_slot_make(1, 2, 1));
    CHECK(row[2] == 0);
    p.dedupe = OG_DEDUPE_LOCATION;
    og_row_push(row, 4, p, og_slot_make(1, 9, 2));
    CHECK(row[0] == og_slot_make(1, 1, 3) && row[2] == 0);
    p.dedupe = OG_DEDUPE_NONE;
    og_row_push(row, 4, p, og_slot_make(1, 1, 3));
    CHECK(row[2] == og_slot_make(1, 1, 3));
}

static bool
holds(const uint16_t *row, uint16_t first, uint16_t second, uint16_t third)
{
    return row[0] == first && row[1] == second && row[2] == third;
}

/* What an error word must not get wrong: an error lost behind a hole, the
 * older lost in a merge, the same twice, the worse one lost, room that is
 * more than was asked for. */
static void
nothing_lost(void)
{
    const uint16_t nan1 = og_slot_make(1, 1, 3), nan2 = og_slot_make(2, 1, 3);
    const uint16_t nan3 = og_slot_make(3, 1, 3), inf2 = og_slot_make(2, 2, 3);
    const uint16_t over3 = og_slot_make(3, 3, 2);
    const uint16_t out4 = og_slot_make(4, 5, 2), warn9 = og_slot_make(9, 9, 1);
    og_policy p = {.num_slots = 4, .dedupe = OG_DEDUPE_UNIQUE};

    uint16_t cleared[4] = {nan1, inf2, over3, 0};
    og_row_clear(cleared, 4, OG_CODE_NAN);
    og_row_push(cleared, 4, p, out4);
    CHECK(holds(cleared, inf2, over3, out4));
    uint16_t holes[4] = {0, inf2, 0, over3};
    og_row_push(holes, 4, p, out4);
    CHECK(holds(holes, inf2, over3, out4));

    uint16_t full[4] = {nan1, nan2, 0, 0}, younger[4] = {nan3, 0, 0, 0};
    p.num_slots = 2;
    og_row_merge(full, younger, 4, p);
    CHECK(holds(full, nan1, nan2, 0));
    uint16_t same[4] = {nan1, 0, 0, 0}, again[4] = {nan1, 0, 0, 0};
    og_row_merge(same, again, 4, p);
    CHECK(holds(same, nan1, 0, 0));

    og_policy worst = {
        .num_slots = 1, .priority = OG_BY_SEVERITY, .order = OG_LAST};
    uint16_t one[4] = {nan1, 0, 0, 0}, warned[4] = {warn9, 0, 0, 0};
    og_row_merge(one, warned, 4, worst);
    CHECK(holds(one, nan1, 0, 0));
    worst.num_slots = 3;
    uint16_t three[4] = {nan1, nan2, nan3, 0};
    og_row_push(three, 4, worst, warn9);
    CHECK(holds(three, nan1, nan2, nan3));

    og_policy newest = {.num_slots = 2, .order = OG_LAST};
    uint16_t few[4] = {0};
    og_row_push(few, 4, newest, nan1);
    og_row_push(few, 4, newest, nan2);
    og_row_push(few, 4, newest, nan3);
    CHECK(holds(few, nan3, nan2, 0));
}

int
main(void)
{
    layout();
    keys();
    what_is_kept();
    same_errors();
    nothing_lost();
    against_the_model();
    return failures != 0;
}

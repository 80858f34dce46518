/* Units: what they are, and how they come and go. The bytes of a unit count
 * as used from the grant that loads it until it is evicted. */
#include "core/pool_ledger_parts.h"

#include <math.h>
#include <stdlib.h>

static og_status
check_size(const og_pool *pool, int64_t bytes, int64_t before, og_error *err)
{
    if (bytes < 0 || bytes > OG_POOL_BYTES_MAX) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected a unit of 0 to 2**60 bytes, got %lld",
                       (long long)bytes);
    }
    if (pool->total - before > OG_POOL_BYTES_MAX - bytes) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected all units of a pool to have at most 2**60 "
                       "bytes together, %lld more are too many",
                       (long long)bytes);
    }
    return OG_OK;
}

static og_status
check_score(double value, bool negative, og_error *err)
{
    if (!isfinite(value) || (value < 0 && !negative)) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected a finite number%s, got %g",
                       negative ? "" : " that is not negative", value);
    }
    return OG_OK;
}

/* Room in the scratch for as many units as the table holds. */
static bool
grow_units(og_ledger *ledger, uint32_t *slot)
{
    void *records = ledger->units;
    uint32_t before = ledger->unit_table.capacity;
    *slot = og_table_take(&ledger->unit_table, &records, sizeof(og_unit));
    ledger->units = records;
    uint32_t capacity = ledger->unit_table.capacity;
    if (*slot == 0 || capacity == before) {
        return *slot != 0;
    }
    uint32_t *scratch =
        realloc(ledger->scratch, capacity * sizeof *ledger->scratch);
    if (scratch == NULL) {
        /* The larger table is used as far as the scratch reaches. */
        ledger->unit_table.capacity = before;
        return false;
    }
    ledger->scratch = scratch;
    return true;
}

og_status
og_ledger_add_unit(og_ledger *ledger, int64_t pool, int64_t bytes,
                   int64_t priority, bool pinned, double cost, int64_t *unit,
                   og_error *err)
{
    og_pool_info info;
    og_status status = og_ledger_pool(ledger, pool, &info, err);
    if (status == OG_OK) {
        status = check_size(&ledger->pools[pool], bytes, 0, err);
    }
    if (status == OG_OK) {
        status = check_score(cost, false, err);
    }
    if (status != OG_OK) {
        return status;
    }
    uint32_t slot;
    if (!grow_units(ledger, &slot)) {
        return og_fail(err, OG_NO_MEMORY, "no memory for one more unit");
    }
    og_unit *made = &ledger->units[slot];
    int64_t id = og_next_id(made->id, slot);
    if (ledger->unit_table.free != 0) {
        ledger->unit_table.free = made->next;
    }
    else {
        ledger->unit_table.used++;
    }
    *made = (og_unit){.id = id,
                      .bytes = bytes,
                      .priority = priority,
                      .pinned = pinned,
                      .cost = cost,
                      .age = ledger->clock,
                      .pool = (uint8_t)pool};
    ledger->pools[pool].total += bytes;
    *unit = id;
    return OG_OK;
}

static int
resize(og_ledger *ledger, og_unit *unit, int64_t bytes, og_error *err)
{
    og_pool *pool = &ledger->pools[unit->pool];
    og_status status = check_size(pool, bytes, unit->bytes, err);
    if (status != OG_OK) {
        return status;
    }
    og_unit_hide(ledger, unit);
    pool->total += bytes - unit->bytes;
    if (unit->state != OG_UNIT_ABSENT) {
        int64_t credit = unit->credit < bytes ? unit->credit : bytes;
        pool->used += (bytes - credit) - (unit->bytes - unit->credit);
        unit->credit = credit;
    }
    unit->bytes = bytes;
    og_unit_show(ledger, unit);
    ledger->upset = true;
    return og_should_pump(ledger, true);
}

static int
pin(og_ledger *ledger, og_unit *unit, bool pinned)
{
    og_unit_hide(ledger, unit);
    unit->pinned = pinned;
    og_unit_show(ledger, unit);
    ledger->upset = true;
    return og_should_pump(ledger, true);
}

int
og_ledger_set_unit(og_ledger *ledger, int64_t id, og_unit_field field,
                   int64_t value, og_error *err)
{
    og_unit *unit = og_find_unit(ledger, id);
    if (unit == NULL) {
        return og_unknown(err, "a unit", id);
    }
    switch (field) {
        case OG_FIELD_BYTES:
            return resize(ledger, unit, value, err);
        case OG_FIELD_PRIORITY:
            unit->priority = value;
            return 0;
        case OG_FIELD_PINNED:
            return pin(ledger, unit, value != 0);
        default:
            return og_fail(err, OG_BAD_ARGUMENT,
                           "expected a field of a unit that is an integer");
    }
}

og_status
og_ledger_set_score(og_ledger *ledger, int64_t id, og_unit_field field,
                    double value, og_error *err)
{
    og_unit *unit = og_find_unit(ledger, id);
    if (unit == NULL) {
        return og_unknown(err, "a unit", id);
    }
    bool is_rank = field == OG_FIELD_RANK;
    og_status status = check_score(value, is_rank, err);
    if (status == OG_OK) {
        *(is_rank ? &unit->rank : &unit->cost) = value;
    }
    return status;
}

og_status
og_ledger_unit(const og_ledger *ledger, int64_t id, og_unit_info *info,
               og_error *err)
{
    const og_unit *unit = og_find_unit(ledger, id);
    if (unit == NULL) {
        return og_unknown(err, "a unit", id);
    }
    *info = (og_unit_info){.pool = unit->pool,
                           .bytes = unit->bytes,
                           .leases = unit->leases,
                           .priority = unit->priority,
                           .tick = unit->tick,
                           .uses = unit->uses,
                           .cost = unit->cost,
                           .rank = unit->rank,
                           .state = (og_pool_state)unit->state,
                           .condemned = unit->condemned,
                           .pinned = unit->pinned};
    return OG_OK;
}

size_t
og_ledger_units(const og_ledger *ledger, int64_t pool, int64_t *ids,
                size_t room)
{
    size_t count = 0;
    for (uint32_t i = 1; i < ledger->unit_table.used; i++) {
        const og_unit *unit = &ledger->units[i];
        if (unit->id > 0 && unit->pool == pool && !unit->doomed) {
            if (count < room) {
                ids[count] = unit->id;
            }
            count++;
        }
    }
    return count;
}

/* --- states --- */

static void
link_resident(og_ledger *ledger, og_unit *unit, uint32_t slot)
{
    og_pool *pool = &ledger->pools[unit->pool];
    unit->previous = 0;
    unit->next = pool->resident;
    if (pool->resident != 0) {
        ledger->units[pool->resident].previous = slot;
    }
    pool->resident = slot;
}

static void
unlink_resident(og_ledger *ledger, og_unit *unit)
{
    og_pool *pool = &ledger->pools[unit->pool];
    if (unit->next != 0) {
        ledger->units[unit->next].previous = unit->previous;
    }
    *(unit->previous == 0 ? &pool->resident
                          : &ledger->units[unit->previous].next) = unit->next;
    unit->next = unit->previous = 0;
}

void
og_unit_become(og_ledger *ledger, og_unit *unit, og_pool_state state)
{
    og_pool *pool = &ledger->pools[unit->pool];
    og_unit_hide(ledger, unit);
    if (unit->state == OG_UNIT_ABSENT && state != OG_UNIT_ABSENT) {
        link_resident(ledger, unit, og_slot_of(unit->id));
        pool->used += unit->bytes;
    }
    if (unit->state != OG_UNIT_ABSENT && state == OG_UNIT_ABSENT) {
        unlink_resident(ledger, unit);
        pool->used -= unit->bytes;
        unit->condemned = unit->kept = false;
    }
    if (unit->state == OG_UNIT_EVICTING) {
        pool->used += unit->credit;
        unit->credit = 0;
    }
    unit->state = (uint8_t)state;
    og_unit_show(ledger, unit);
}

void
og_unit_settle(og_ledger *ledger, og_unit *unit)
{
    if (!unit->doomed || unit->leases > 0 || unit->id <= 0) {
        return;
    }
    if (unit->state == OG_UNIT_READY) {
        og_unit_become(ledger, unit, OG_UNIT_ABSENT);
    }
    if (unit->state != OG_UNIT_ABSENT || unit->wanted > 0) {
        return;
    }
    uint32_t slot = og_slot_of(unit->id);
    ledger->pools[unit->pool].total -= unit->bytes;
    bool last = unit->id > ID_LAST;
    unit->id = -unit->id;
    if (!last) { /* else the slot has had all its ids */
        unit->next = ledger->unit_table.free;
        ledger->unit_table.free = slot;
    }
}

int
og_ledger_remove_unit(og_ledger *ledger, int64_t id, og_error *err)
{
    og_unit *unit = og_find_unit(ledger, id);
    if (unit == NULL || unit->doomed) {
        return og_unknown(err, "a unit", id);
    }
    unit->doomed = true;
    ledger->upset = ledger->upset || unit->wanted > 0;
    bool freed = unit->leases == 0 && unit->state == OG_UNIT_READY;
    og_unit_settle(ledger, unit);
    return og_should_pump(ledger, freed);
}

int
og_ledger_condemn(og_ledger *ledger, int64_t id, og_error *err)
{
    og_unit *unit = og_find_unit(ledger, id);
    if (unit == NULL) {
        return og_unknown(err, "a unit", id);
    }
    if (unit->state == OG_UNIT_READY || unit->state == OG_UNIT_LOADING) {
        og_unit_hide(ledger, unit);
        unit->condemned = true;
        unit->kept = false;
        og_unit_show(ledger, unit);
    }
    return og_unit_idle(unit);
}

/* From one state to another, and nothing if it is in neither. */
static int
move(og_ledger *ledger, int64_t id, og_pool_state from, og_pool_state to,
     og_error *err)
{
    static const char *const names[] = {"ABSENT", "LOADING", "READY",
                                        "EVICTING"};
    og_unit *unit = og_find_unit(ledger, id);
    if (unit == NULL) {
        return og_unknown(err, "a unit", id);
    }
    if (unit->state != from) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected unit %lld to be %s, it is %s", (long long)id,
                       names[from], names[unit->state]);
    }
    if (unit->claimed) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected unit %lld to be evicted by who takes its "
                       "ticket, nobody has yet",
                       (long long)id);
    }
    og_unit_become(ledger, unit, to);
    og_unit_settle(ledger, unit);
    return og_should_pump(ledger, true);
}

int
og_ledger_loaded(og_ledger *ledger, int64_t unit, og_error *err)
{
    return move(ledger, unit, OG_UNIT_LOADING, OG_UNIT_READY, err);
}

int
og_ledger_failed(og_ledger *ledger, int64_t unit, og_error *err)
{
    return move(ledger, unit, OG_UNIT_LOADING, OG_UNIT_ABSENT, err);
}

int
og_ledger_evicted(og_ledger *ledger, int64_t unit, og_error *err)
{
    return move(ledger, unit, OG_UNIT_EVICTING, OG_UNIT_ABSENT, err);
}

int
og_ledger_kept(og_ledger *ledger, int64_t unit, og_error *err)
{
    int pump = og_ledger_spared(ledger, unit, err);
    og_unit *found = pump < 0 ? NULL : og_find_unit(ledger, unit);
    if (found == NULL) { /* an error, or it was removed meanwhile */
        return pump;
    }
    og_unit_hide(ledger, found);
    found->kept = true;
    ledger->upset = true;
    return og_should_pump(ledger, true);
}

int
og_ledger_spared(og_ledger *ledger, int64_t unit, og_error *err)
{
    return move(ledger, unit, OG_UNIT_EVICTING, OG_UNIT_READY, err);
}

/* What each owner holds of each unit: a record in a hash of both, in the
 * owner's list and in the unit's. */
#include "core/pool_ledger_parts.h"

#include <stdlib.h>

/* Every record into the buckets again, and what is unused into the list of
 * the free. Slot 0 is nobody. */
static void
spread(og_ledger *ledger, uint32_t before)
{
    for (uint32_t i = 1; i < before; i++) {
        og_hold *hold = &ledger->holds[i];
        if (hold->count > 0) {
            uint32_t *bucket = og_hold_bucket(ledger, hold->owner, hold->unit);
            hold->bucket = *bucket;
            *bucket = i;
        }
    }
    for (uint32_t i = ledger->hold_capacity - 1;
         i >= (before == 0 ? 1 : before); i--) {
        ledger->holds[i] = (og_hold){.bucket = ledger->hold_free};
        ledger->hold_free = i;
    }
}

bool
og_holds_grow(og_ledger *ledger, size_t count)
{
    size_t wanted = 1 + (size_t)ledger->hold_used + ledger->hold_reserved;
    uint32_t before = ledger->hold_capacity;
    size_t capacity = before == 0 ? 64 : before;
    while (capacity < wanted + count) {
        capacity *= 2;
        if (capacity >= HOLD_EXTRA / 2) {
            return false;
        }
    }
    uint32_t *buckets = calloc(capacity, sizeof *buckets);
    if (buckets == NULL) {
        return false;
    }
    og_hold *holds = realloc(ledger->holds, capacity * sizeof *holds);
    if (holds == NULL) {
        free(buckets);
        return false;
    }
    free(ledger->buckets);
    ledger->buckets = buckets;
    ledger->holds = holds;
    ledger->hold_capacity = (uint32_t)capacity;
    spread(ledger, before);
    return true;
}

static void
link_owner(og_ledger *ledger, og_hold *hold, uint32_t slot)
{
    og_owner *owner = &ledger->owners[hold->owner];
    hold->owner_previous = 0;
    hold->owner_next = owner->holds;
    if (owner->holds != 0) {
        ledger->holds[owner->holds].owner_previous = slot;
    }
    else {
        og_owner_list(ledger, hold->owner);
    }
    owner->holds = slot;
}

static void
unlink_owner(og_ledger *ledger, og_hold *hold)
{
    og_owner *owner = &ledger->owners[hold->owner];
    if (hold->owner_next != 0) {
        ledger->holds[hold->owner_next].owner_previous = hold->owner_previous;
    }
    *(hold->owner_previous == 0
          ? &owner->holds
          : &ledger->holds[hold->owner_previous].owner_next) =
        hold->owner_next;
    og_owner_unlist(ledger, hold->owner);
}

static void
link_unit(og_ledger *ledger, og_hold *hold, uint32_t slot)
{
    og_unit *unit = &ledger->units[hold->unit];
    hold->unit_previous = 0;
    hold->unit_next = unit->holds;
    if (unit->holds != 0) {
        ledger->holds[unit->holds].unit_previous = slot;
    }
    unit->holds = slot;
}

static void
unlink_unit(og_ledger *ledger, const og_hold *hold)
{
    og_unit *unit = &ledger->units[hold->unit];
    if (hold->unit_next != 0) {
        ledger->holds[hold->unit_next].unit_previous = hold->unit_previous;
    }
    *(hold->unit_previous == 0
          ? &unit->holds
          : &ledger->holds[hold->unit_previous].unit_next) = hold->unit_next;
}

static og_hold *
make(og_ledger *ledger, uint32_t owner, uint32_t unit)
{
    uint32_t slot = ledger->hold_free;
    og_hold *hold = &ledger->holds[slot];
    ledger->hold_free = hold->bucket;
    ledger->hold_used++;
    uint32_t *bucket = og_hold_bucket(ledger, owner, unit);
    *hold = (og_hold){.owner = owner, .unit = unit, .bucket = *bucket};
    *bucket = slot;
    link_owner(ledger, hold, slot);
    if ((unit & HOLD_EXTRA) == 0) {
        link_unit(ledger, hold, slot);
    }
    return hold;
}

static void
unmake(og_ledger *ledger, og_hold *hold)
{
    uint32_t slot = (uint32_t)(hold - ledger->holds);
    uint32_t *link = og_hold_bucket(ledger, hold->owner, hold->unit);
    while (*link != slot) {
        link = &ledger->holds[*link].bucket;
    }
    *link = hold->bucket;
    unlink_owner(ledger, hold);
    if ((hold->unit & HOLD_EXTRA) == 0) {
        unlink_unit(ledger, hold);
    }
    hold->bucket = ledger->hold_free;
    ledger->hold_free = slot;
    ledger->hold_used--;
}

OG_HOT void
og_hold_add(og_ledger *ledger, uint32_t owner, uint32_t slot, int64_t count)
{
    og_hold *hold = og_hold_find(ledger, owner, slot);
    if (hold == NULL) {
        hold = make(ledger, owner, slot);
    }
    hold->count += count;
    if ((slot & HOLD_EXTRA) != 0) {
        og_pool *pool = &ledger->pools[slot & ~HOLD_EXTRA];
        pool->extra += count;
        pool->used += count;
        return;
    }
    og_unit *unit = &ledger->units[slot];
    if (unit->leases == 0) {
        og_unit_hide(ledger, unit);
        unit->kept = false;
    }
    unit->leases += count;
}

OG_HOT void
og_hold_lessen(og_ledger *ledger, og_hold *hold, int64_t count)
{
    uint32_t slot = hold->unit;
    hold->count -= count;
    if (hold->count == 0) {
        unmake(ledger, hold);
    }
    if ((slot & HOLD_EXTRA) != 0) {
        og_pool *pool = &ledger->pools[slot & ~HOLD_EXTRA];
        pool->extra -= count;
        pool->used -= count;
        return;
    }
    og_unit *unit = &ledger->units[slot];
    unit->leases -= count;
    if (unit->leases == 0) {
        og_unit_show(ledger, unit);
        og_unit_settle(ledger, unit);
    }
}

/* Owners, and the two calls that a managed forward makes: enter and leave. */
#include "core/pool_ledger_parts.h"

og_status
og_ledger_add_owner(og_ledger *ledger, int64_t parent, int64_t thread,
                    int64_t *owner, og_error *err)
{
    og_owner *above = og_find_owner(ledger, parent);
    if (parent != 0 && above == NULL) {
        return og_unknown(err, "an owner", parent);
    }
    void *records = ledger->owners;
    uint32_t slot =
        og_table_take(&ledger->owner_table, &records, sizeof(og_owner));
    ledger->owners = records;
    if (slot == 0) {
        return og_fail(err, OG_NO_MEMORY, "no memory for one more owner");
    }
    og_owner *made = &ledger->owners[slot];
    int64_t id = og_next_id(made->id, slot);
    if (ledger->owner_table.free != 0) {
        ledger->owner_table.free = made->next;
    }
    else {
        ledger->owner_table.used++;
    }
    uint32_t parent_slot = parent == 0 ? 0 : og_slot_of(parent);
    ledger->owners[parent_slot].children++; /* of slot 0: nobody looks */
    *made = (og_owner){.id = id, .thread = thread, .parent = parent_slot};
    *owner = id;
    return OG_OK;
}

static bool
is_spent(const og_owner *owner)
{
    return owner->dropped && owner->holds == 0 && owner->tickets == 0;
}

/* A chain of tasks of which each starts the next and ends must not grow: who
 * is left below a spent owner becomes the child of the one above it. */
static void
skip_spent(og_ledger *ledger, og_owner *owner)
{
    while (owner->parent != 0 && is_spent(&ledger->owners[owner->parent])) {
        uint32_t spent = owner->parent;
        owner->parent = ledger->owners[spent].parent;
        ledger->owners[owner->parent].children++;
        ledger->owners[spent].children--;
        og_owner_settle(ledger, spent);
    }
}

void
og_owner_settle(og_ledger *ledger, uint32_t slot)
{
    while (slot != 0 && is_spent(&ledger->owners[slot]) &&
           ledger->owners[slot].children == 0) {
        og_owner *owner = &ledger->owners[slot];
        uint32_t parent = owner->parent;
        bool last = owner->id > ID_LAST;
        owner->id = -owner->id;
        if (!last) {
            owner->next = ledger->owner_table.free;
            ledger->owner_table.free = slot;
        }
        owner->dropped = false;
        ledger->owners[parent].children--;
        slot = parent;
    }
}

og_status
og_ledger_drop_owner(og_ledger *ledger, int64_t id, og_error *err)
{
    og_owner *owner = og_find_owner(ledger, id);
    if (owner == NULL || owner->dropped) {
        return og_unknown(err, "an owner", id);
    }
    owner->dropped = true;
    skip_spent(ledger, owner);
    og_owner_settle(ledger, og_slot_of(id));
    return OG_OK;
}

int
og_ledger_forfeit(og_ledger *ledger, int64_t id, og_error *err)
{
    og_owner *owner = og_find_owner(ledger, id);
    if (owner == NULL || owner->dropped) {
        return og_unknown(err, "an owner", id);
    }
    owner->forfeited = true;
    for (uint32_t i = 1; i < ledger->ticket_table.used; i++) {
        const og_ticket *ticket = &ledger->tickets[i];
        if (ticket->id > 0 && ticket->owner == og_slot_of(id)) {
            (void)og_ledger_cancel(ledger, ticket->id, NULL);
        }
    }
    bool freed = owner->holds != 0;
    while (owner->holds != 0) {
        const og_hold *hold = &ledger->holds[owner->holds];
        og_hold_remove(ledger, og_slot_of(id), hold->unit, hold->count);
    }
    return og_should_pump(ledger, freed);
}

bool
og_owner_holds(const og_ledger *ledger, const og_owner *owner)
{
    while (!og_owner_listed(owner) && owner->parent != 0) {
        owner = &ledger->owners[owner->parent];
    }
    return og_owner_listed(owner);
}

int
og_ledger_owner_holds(const og_ledger *ledger, int64_t id, og_error *err)
{
    const og_owner *owner = og_find_owner(ledger, id);
    return owner == NULL ? og_unknown(err, "an owner", id)
                         : og_owner_holds(ledger, owner);
}

/* --- enter and leave --- */

static bool
holds_all(const og_ledger *ledger, uint32_t owner, const int64_t *units,
          size_t count)
{
    bool all = true;
    for (size_t i = 0; i < count && all; i++) {
        uint32_t at = owner;
        while (at != 0 &&
               og_hold_find(ledger, at, og_slot_of(units[i])) == NULL) {
            at = ledger->owners[at].parent;
        }
        all = at != 0;
    }
    return all;
}

/* Whether the request that waits for one of these pools comes before the
 * owner, who holds nothing, or may not be met after it: more than it has, or
 * somebody it descends from, would stay with an owner that cannot finish. */
static bool
is_behind(const og_ledger *ledger, uint32_t owner, uint64_t pools,
          const int64_t *units, size_t count)
{
    if ((pools & og_waited_for(ledger)) == 0) {
        return false;
    }
    return !og_owner_holds(ledger, &ledger->owners[owner]) ||
           (og_owner_blocked(ledger, owner, NULL) &&
            !holds_all(ledger, owner, units, count));
}

OG_HOT int
og_ledger_enter(og_ledger *ledger, int64_t owner_id, const int64_t *units,
                size_t count, int64_t tick, og_error *err)
{
    const og_owner *owner = og_find_owner(ledger, owner_id);
    if (owner == NULL || owner->dropped) {
        return og_unknown(err, "an owner", owner_id);
    }
    uint64_t pools = 0;
    bool ready = true;
    for (size_t i = 0; i < count; i++) {
        const og_unit *unit = og_find_unit(ledger, units[i]);
        if (unit == NULL || unit->doomed) {
            return og_unknown(err, "a unit", units[i]);
        }
        ready = ready && unit->state == OG_UNIT_READY;
        pools |= (uint64_t)1 << unit->pool;
    }
    if (!ready ||
        (ledger->queue.count > 0 &&
         is_behind(ledger, og_slot_of(owner_id), pools, units, count))) {
        return 0;
    }
    if (!og_holds_reserve(ledger, count)) {
        return og_fail(err, OG_NO_MEMORY, "no memory for one more lease");
    }
    tick = og_ledger_next_tick(ledger, tick);
    for (size_t i = 0; i < count; i++) {
        uint32_t slot = og_slot_of(units[i]);
        og_hold_add(ledger, og_slot_of(owner_id), slot, 1);
        og_policy_touch(ledger, &ledger->units[slot], tick);
    }
    return 1;
}

/* Adds to what the call is about to take off a hold; false: it is too much. */
static bool
claim(const og_ledger *ledger, uint32_t owner, uint32_t unit, int64_t count)
{
    og_hold *hold = og_hold_find(ledger, owner, unit);
    if (hold == NULL || hold->count - hold->leaving < count) {
        return false;
    }
    hold->leaving += count;
    return true;
}

/* Ends what claim began, for the first of the units and of the extra. */
static void
unclaim(const og_ledger *ledger, uint32_t owner, const int64_t *units,
        size_t count, const og_pool_extra *extra, size_t extra_count)
{
    for (size_t i = 0; i < count; i++) {
        og_hold_find(ledger, owner, og_slot_of(units[i]))->leaving = 0;
    }
    for (size_t i = 0; i < extra_count; i++) {
        if (extra[i].bytes > 0) {
            uint32_t key = HOLD_EXTRA | (uint32_t)extra[i].pool;
            og_hold_find(ledger, owner, key)->leaving = 0;
        }
    }
}

static OG_COLD og_status
holds_none(og_error *err, int64_t owner, int64_t unit)
{
    return og_fail(err, OG_BAD_ARGUMENT,
                   "expected owner %lld to hold a lease of unit %lld, it "
                   "holds none more",
                   (long long)owner, (long long)unit);
}

/* A call's own road: nothing can be named twice. */
static inline int
leave_one(og_ledger *ledger, int64_t owner_id, int64_t unit_id, og_error *err)
{
    uint32_t owner = og_slot_of(owner_id), slot = og_slot_of(unit_id);
    og_hold *hold = og_find_unit(ledger, unit_id) == NULL
                        ? NULL
                        : og_hold_find(ledger, owner, slot);
    if (hold == NULL) {
        return holds_none(err, owner_id, unit_id);
    }
    og_hold_lessen(ledger, hold, 1);
    bool freed = ledger->units[slot].leases == 0;
    og_owner_settle(ledger, owner);
    return og_should_pump(ledger, freed);
}

static og_status
check_leave(const og_ledger *ledger, int64_t owner, const int64_t *units,
            size_t count, const og_pool_extra *extra, size_t extra_count,
            og_error *err)
{
    uint32_t slot = og_slot_of(owner);
    for (size_t i = 0; i < count; i++) {
        if (og_find_unit(ledger, units[i]) == NULL ||
            !claim(ledger, slot, og_slot_of(units[i]), 1)) {
            unclaim(ledger, slot, units, i, NULL, 0);
            return holds_none(err, owner, units[i]);
        }
    }
    for (size_t i = 0; i < extra_count; i++) {
        int64_t pool = extra[i].pool, bytes = extra[i].bytes;
        bool known = pool >= 0 && pool < (int64_t)ledger->pool_count;
        if (!known || bytes < 0 ||
            (bytes > 0 &&
             !claim(ledger, slot, HOLD_EXTRA | (uint32_t)pool, bytes))) {
            unclaim(ledger, slot, units, count, extra, i);
            return og_fail(err, OG_BAD_ARGUMENT,
                           "expected owner %lld to hold %lld bytes of extra "
                           "in pool %lld, it holds fewer",
                           (long long)owner, (long long)bytes,
                           (long long)pool);
        }
    }
    unclaim(ledger, slot, units, count, extra, extra_count);
    return OG_OK;
}

OG_HOT int
og_ledger_leave(og_ledger *ledger, int64_t owner_id, const int64_t *units,
                size_t count, const og_pool_extra *extra, size_t extra_count,
                og_error *err)
{
    const og_owner *of = og_find_owner(ledger, owner_id);
    if (of == NULL) {
        return og_unknown(err, "an owner", owner_id);
    }
    bool forfeited = of->forfeited;
    if (OG_LIKELY(count == 1 && extra_count == 0)) {
        int left = leave_one(ledger, owner_id, units[0], err);
        return left < 0 && forfeited ? 0 : left;
    }
    og_status status =
        check_leave(ledger, owner_id, units, count, extra, extra_count, err);
    if (status != OG_OK) {
        return forfeited ? 0 : (int)status;
    }
    uint32_t owner = og_slot_of(owner_id);
    bool freed = false;
    for (size_t i = 0; i < count; i++) {
        uint32_t slot = og_slot_of(units[i]);
        og_hold_remove(ledger, owner, slot, 1);
        freed = freed || ledger->units[slot].leases == 0;
    }
    for (size_t i = 0; i < extra_count; i++) {
        if (extra[i].bytes > 0) {
            freed = true;
            og_hold_remove(ledger, owner, HOLD_EXTRA | (uint32_t)extra[i].pool,
                           extra[i].bytes);
        }
    }
    og_owner_settle(ledger, owner);
    return og_should_pump(ledger, freed);
}

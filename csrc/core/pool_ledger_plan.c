/* Planning: what a request needs, and which idle units make room for it.
 * Nothing here allocates; the heap lies in the ledger's scratch, which has
 * room for every unit. */
#include "core/pool_ledger_parts.h"

#include <string.h>

void
og_plan_demand(og_ledger *ledger, const og_ticket *ticket, og_demand *demand)
{
    memset(demand, 0, sizeof *demand);
    uint64_t stamp = ++ledger->stamp;
    for (uint32_t i = 0; i < ticket->unit_count; i++) {
        og_unit *unit = &ledger->units[ticket->units[i]];
        if (unit->stamp == stamp) {
            continue;
        }
        unit->stamp = stamp;
        demand->gone = demand->gone || unit->doomed;
        demand->evicting = demand->evicting || unit->state == OG_UNIT_EVICTING;
        demand->all[unit->pool] += unit->bytes;
        if (unit->state == OG_UNIT_ABSENT || unit->state == OG_UNIT_EVICTING) {
            demand->need[unit->pool] += unit->bytes;
        }
        else if (og_unit_idle(unit)) {
            demand->keep[unit->pool] += unit->bytes;
        }
    }
    for (uint32_t i = 0; i < ticket->extra_count; i++) {
        demand->need[ticket->extra[i].pool] += ticket->extra[i].bytes;
        demand->all[ticket->extra[i].pool] += ticket->extra[i].bytes;
    }
}

int
og_plan_short(const og_ledger *ledger, const og_ticket *ticket,
              const og_demand *demand)
{
    for (uint32_t i = 0; i < ledger->pool_count; i++) {
        const og_pool *pool = &ledger->pools[i];
        if ((ticket->pools >> i & 1) != 0 && demand->need[i] > 0 &&
            pool->used - (pool->idle - demand->keep[i]) + demand->need[i] >
                pool->budget) {
            return (int)i;
        }
    }
    return -1;
}

/* --- choosing victims --- */

typedef struct heap {
    const og_ledger *ledger;
    uint32_t *slots;
    uint32_t count;
} heap;

static bool
goes_before(const heap *of, uint32_t a, uint32_t b)
{
    const og_unit *units = of->ledger->units;
    return og_policy_before(of->ledger, units + of->slots[a],
                            units + of->slots[b]);
}

static void
sift_down(heap *of, uint32_t at)
{
    for (;;) {
        uint32_t first = at, left = 2 * at + 1;
        for (uint32_t i = left; i < left + 2 && i < of->count; i++) {
            if (goes_before(of, i, first)) {
                first = i;
            }
        }
        if (first == at) {
            return;
        }
        uint32_t slot = of->slots[at];
        of->slots[at] = of->slots[first];
        of->slots[first] = slot;
        at = first;
    }
}

/* The idle units of a pool but those of the demand that was stamped last. */
static heap
gather(og_ledger *ledger, uint32_t pool, bool all)
{
    heap made = {ledger, ledger->scratch, 0};
    uint32_t slot = ledger->pools[pool].resident;
    while (slot != 0) {
        const og_unit *unit = &ledger->units[slot];
        if (og_unit_idle(unit) && (all || unit->stamp != ledger->stamp)) {
            made.slots[made.count++] = slot;
        }
        slot = unit->next;
    }
    for (uint32_t i = made.count / 2; i-- > 0;) {
        sift_down(&made, i);
    }
    return made;
}

/* The first victim, which moves behind what is left of the heap. */
static const og_unit *
pop(heap *from)
{
    uint32_t slot = from->slots[0];
    from->count--;
    from->slots[0] = from->slots[from->count];
    from->slots[from->count] = slot;
    sift_down(from, 0);
    return &from->ledger->units[slot];
}

/* Takes victims until they are worth bytes, then leaves out those that turn
 * out not to be needed, the most valuable first. Those chosen become EVICTING
 * and are pushed on *chosen; returns how many. */
static uint32_t
choose(og_ledger *ledger, uint32_t pool, int64_t bytes, bool all,
       uint32_t *chosen)
{
    heap idle = gather(ledger, pool, all);
    uint32_t total = idle.count, made = 0;
    int64_t sum = 0;
    while (sum < bytes && idle.count > 0) {
        sum += pop(&idle)->bytes;
    }
    for (uint32_t i = idle.count; i < total; i++) {
        og_unit *unit = &ledger->units[idle.slots[i]];
        if (sum - unit->bytes >= bytes) {
            sum -= unit->bytes;
            continue;
        }
        og_unit_become(ledger, unit, OG_UNIT_EVICTING);
        unit->victim = *chosen;
        *chosen = idle.slots[i];
        made++;
    }
    return made;
}

/* --- granting --- */

/* The victims' bytes count as the grant's own from now on, as far as it needs
 * them: so `used` stays within the budget while they are on their way. */
static void
make_room(og_ledger *ledger, og_ticket *ticket, uint32_t index, int64_t need)
{
    og_pool *pool = &ledger->pools[index];
    int64_t deficit = pool->used + need - pool->budget;
    if (need == 0 || deficit <= 0) {
        return;
    }
    uint32_t last = ticket->victims;
    (void)choose(ledger, index, deficit, false, &ticket->victims);
    for (uint32_t slot = ticket->victims; slot != last;) {
        og_unit *unit = &ledger->units[slot];
        unit->claimed = true;
        unit->credit = unit->bytes < deficit ? unit->bytes : deficit;
        deficit -= unit->credit;
        pool->used -= unit->credit;
        slot = unit->victim;
    }
}

static void
take_leases(og_ledger *ledger, og_ticket *ticket)
{
    for (uint32_t i = 0; i < ticket->unit_count; i++) {
        uint32_t slot = ticket->units[i];
        og_unit *unit = &ledger->units[slot];
        ticket->how[i] = HOW_READY;
        if (unit->state == OG_UNIT_ABSENT) {
            og_unit_become(ledger, unit, OG_UNIT_LOADING);
            ledger->upset = ledger->upset || unit->pinned; /* it stays */
            ticket->how[i] = HOW_LOAD;
        }
        else if (unit->state == OG_UNIT_LOADING) {
            ticket->how[i] = HOW_PENDING;
        }
        og_hold_add(ledger, ticket->owner, slot, 1);
    }
    for (uint32_t i = 0; i < ticket->extra_count; i++) {
        const og_pool_extra *extra = &ticket->extra[i];
        if (extra->bytes > 0) {
            og_hold_add(ledger, ticket->owner,
                        HOLD_EXTRA | (uint32_t)extra->pool, extra->bytes);
        }
    }
}

bool
og_plan_fits(og_ledger *ledger, const og_ticket *ticket)
{
    og_demand demand;
    og_plan_demand(ledger, ticket, &demand);
    return !demand.evicting && !demand.gone &&
           og_plan_short(ledger, ticket, &demand) < 0;
}

void
og_plan_grant(og_ledger *ledger, og_ticket *ticket)
{
    og_demand demand;
    og_plan_demand(ledger, ticket, &demand);
    for (uint32_t i = 0; i < ledger->pool_count; i++) {
        if ((ticket->pools >> i & 1) != 0) {
            make_room(ledger, ticket, i, demand.need[i]);
        }
    }
    take_leases(ledger, ticket);
}

void
og_plan_undo(og_ledger *ledger, og_ticket *ticket)
{
    for (uint32_t i = 0; i < ticket->unit_count; i++) {
        og_unit *unit = &ledger->units[ticket->units[i]];
        if (ticket->how[i] == HOW_LOAD && unit->state == OG_UNIT_LOADING) {
            og_unit_become(ledger, unit, OG_UNIT_ABSENT);
        }
        og_hold_remove(ledger, ticket->owner, ticket->units[i], 1);
    }
    for (uint32_t i = 0; i < ticket->extra_count; i++) {
        const og_pool_extra *extra = &ticket->extra[i];
        if (extra->bytes > 0) {
            og_hold_remove(ledger, ticket->owner,
                           HOLD_EXTRA | (uint32_t)extra->pool, extra->bytes);
        }
    }
    for (uint32_t slot = ticket->victims; slot != 0;) {
        og_unit *unit = &ledger->units[slot];
        slot = unit->victim;
        unit->claimed = false;
        og_unit_become(ledger, unit, OG_UNIT_READY);
        og_unit_settle(ledger, unit);
    }
    ticket->victims = 0;
}

int
og_plan_never(og_ledger *ledger, const og_ticket *ticket, int64_t *need,
              int64_t *have)
{
    og_demand demand;
    og_plan_demand(ledger, ticket, &demand);
    for (uint32_t i = 0; i < ledger->pool_count; i++) {
        if ((ticket->pools >> i & 1) == 0 || demand.need[i] == 0) {
            continue;
        }
        int64_t room = ledger->pools[i].budget;
        uint32_t slot = ledger->pools[i].resident;
        while (slot != 0) {
            const og_unit *unit = &ledger->units[slot];
            if (unit->pinned && unit->stamp != ledger->stamp) {
                room -= unit->bytes;
            }
            slot = unit->next;
        }
        if (demand.all[i] > room) {
            *need = demand.all[i];
            *have = room;
            return (int)i;
        }
    }
    return -1;
}

/* --- reclaiming --- */

int64_t
og_ledger_reclaim(og_ledger *ledger, int64_t pool, int64_t bytes,
                  og_error *err)
{
    og_pool_info info;
    og_status status = og_ledger_pool(ledger, pool, &info, err);
    if (status != OG_OK) {
        return status;
    }
    if (bytes < 0) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected bytes that are not negative, got %lld",
                       (long long)bytes);
    }
    ledger->chosen = 0;
    ledger->chosen_count =
        choose(ledger, (uint32_t)pool, bytes, true, &ledger->chosen);
    return ledger->chosen_count;
}

int64_t
og_ledger_reclaim_condemned(og_ledger *ledger, int64_t pool, og_error *err)
{
    og_pool_info info;
    og_status status = og_ledger_pool(ledger, pool, &info, err);
    if (status != OG_OK) {
        return status;
    }
    ledger->chosen = ledger->chosen_count = 0;
    for (uint32_t slot = ledger->pools[pool].resident; slot != 0;) {
        og_unit *unit = &ledger->units[slot];
        if (unit->condemned && og_unit_idle(unit)) {
            og_unit_become(ledger, unit, OG_UNIT_EVICTING);
            unit->victim = ledger->chosen;
            ledger->chosen = slot;
            ledger->chosen_count++;
        }
        slot = unit->next;
    }
    return ledger->chosen_count;
}

void
og_ledger_chosen(const og_ledger *ledger, int64_t *ids)
{
    uint32_t slot = ledger->chosen;
    for (uint32_t i = 0; i < ledger->chosen_count; i++) {
        ids[i] = ledger->units[slot].id;
        slot = ledger->units[slot].victim;
    }
}

void
og_ledger_unchoose(og_ledger *ledger, int64_t id)
{
    og_unit *unit = og_find_unit(ledger, id);
    if (unit != NULL && unit->state == OG_UNIT_EVICTING) {
        og_unit_become(ledger, unit, OG_UNIT_READY);
        og_unit_settle(ledger, unit);
    }
}

/* What is read out of a ledger about requests and who is in their way. */
#include "core/pool_ledger_parts.h"

#include <stdlib.h>
#include <string.h>

typedef struct holders {
    og_pool_holder *at; /* NULL: only count */
    size_t count;
} holders;

static void
add_holder(holders *into, int64_t owner, int64_t unit, int64_t count)
{
    if (into->at != NULL) {
        into->at[into->count] = (og_pool_holder){owner, unit, count};
    }
    into->count++;
}

/* Whoever keeps bytes of the pool that the ticket does not ask for itself;
 * after a deadlock, only those who cannot let go. The demand was stamped. */
static void
find_holders(const og_ledger *ledger, uint32_t pool, bool pinned_only,
             holders *into)
{
    for (uint32_t slot = ledger->pools[pool].resident; slot != 0;) {
        const og_unit *unit = &ledger->units[slot];
        slot = unit->next;
        if (unit->stamp == ledger->stamp) {
            continue;
        }
        if (unit->pinned || unit->kept) {
            add_holder(into, 0, unit->id, 0);
        }
        uint32_t at = pinned_only ? 0 : unit->holds;
        while (at != 0) {
            const og_hold *hold = &ledger->holds[at];
            add_holder(into, ledger->owners[hold->owner].id, unit->id,
                       hold->count);
            at = hold->unit_next;
        }
    }
    uint32_t at = pinned_only ? 0 : ledger->holding;
    while (at != 0) {
        const og_owner *owner = &ledger->owners[at];
        const og_hold *extra = og_hold_find(ledger, at, HOLD_EXTRA | pool);
        if (extra != NULL) {
            add_holder(into, owner->id, 0, extra->count);
        }
        at = owner->next;
    }
}

/* The pool that is short, and by how much. */
static int
find_short(og_ledger *ledger, const og_ticket *ticket, og_pool_answer *answer)
{
    int pool = -1;
    if (ticket->verdict == OG_POOL_TOO_LARGE) {
        pool = og_plan_never(ledger, ticket, &answer->need, &answer->have);
    }
    og_demand demand;
    og_plan_demand(ledger, ticket, &demand); /* stamps, for find_holders */
    if (pool < 0 && ticket->verdict != OG_POOL_GRANTED) {
        pool = og_plan_short(ledger, ticket, &demand);
        for (int i = 0; pool < 0 && i < (int)ledger->pool_count; i++) {
            pool = (ticket->pools >> i & 1) != 0 ? i : -1;
        }
        if (pool >= 0) {
            const og_pool *of = &ledger->pools[pool];
            int64_t have =
                of->budget - of->used + (of->idle - demand.keep[pool]);
            answer->need = demand.need[pool];
            answer->have = have > 0 ? have : 0;
        }
    }
    return pool;
}

/* Each unit once, in the order of the request. */
static void
list_units(og_ledger *ledger, const og_ticket *ticket, og_pool_answer *answer)
{
    uint64_t stamp = ++ledger->stamp;
    for (uint32_t i = 0; i < ticket->unit_count; i++) {
        og_unit *unit = &ledger->units[ticket->units[i]];
        if (unit->stamp == stamp) {
            continue;
        }
        unit->stamp = stamp;
        if (ticket->how[i] == HOW_LOAD) {
            answer->load[answer->load_count++] = unit->id;
        }
        else if (unit->state != OG_UNIT_READY) {
            answer->pending[answer->pending_count++] = unit->id;
        }
    }
    for (uint32_t slot = ticket->victims; slot != 0;) {
        answer->evict[answer->evict_count++] = ledger->units[slot].id;
        slot = ledger->units[slot].victim;
    }
}

og_status
og_ledger_answer(og_ledger *ledger, int64_t id, og_pool_answer *answer,
                 og_error *err)
{
    const og_ticket *ticket = og_find_ticket(ledger, id);
    if (ticket == NULL) {
        return og_unknown(err, "a ticket", id);
    }
    og_pool_answer made = {.verdict = (og_pool_verdict)ticket->verdict,
                           .ticket = id};
    bool granted = made.verdict == OG_POOL_GRANTED;
    bool pinned_only = made.verdict == OG_POOL_TOO_LARGE;
    made.pool = find_short(ledger, ticket, &made);
    holders found = {NULL, 0};
    size_t victims = 0;
    if (made.pool >= 0) {
        find_holders(ledger, (uint32_t)made.pool, pinned_only, &found);
    }
    for (uint32_t slot = ticket->victims; slot != 0;) {
        victims++;
        slot = ledger->units[slot].victim;
    }
    size_t units = granted ? ticket->unit_count : 0;
    int64_t *block = malloc((2 * units + victims + 1) * sizeof *block +
                            found.count * sizeof *found.at);
    if (block == NULL) {
        return og_fail(err, OG_NO_MEMORY, "no memory for an answer");
    }
    made.block = block;
    made.load = block;
    made.pending = block + units;
    made.evict = block + 2 * units;
    made.holders = (og_pool_holder *)(block + 2 * units + victims);
    made.holder_count = found.count;
    if (made.pool >= 0) {
        found = (holders){made.holders, 0};
        find_holders(ledger, (uint32_t)made.pool, pinned_only, &found);
    }
    if (granted) {
        list_units(ledger, ticket, &made);
    }
    *answer = made;
    return OG_OK;
}

void
og_pool_answer_clear(og_pool_answer *answer)
{
    free(answer->block);
    *answer = (og_pool_answer){.pool = -1};
}

og_status
og_ledger_holders(const og_ledger *ledger, int64_t id, og_pool_holder *into,
                  size_t room, size_t *count, og_error *err)
{
    const og_unit *unit = og_find_unit(ledger, id);
    if (unit == NULL) {
        return og_unknown(err, "a unit", id);
    }
    size_t found = 0;
    for (uint32_t at = unit->holds; at != 0;) {
        const og_hold *hold = &ledger->holds[at];
        if (found < room) {
            int64_t owner = ledger->owners[hold->owner].id;
            into[found] = (og_pool_holder){owner, id, hold->count};
        }
        found++;
        at = hold->unit_next;
    }
    *count = found;
    return OG_OK;
}

void
og_ledger_news(const og_ledger *ledger, int64_t *tickets)
{
    uint32_t at = ledger->news.first;
    for (size_t i = 0; at != 0; i++) {
        tickets[i] = ledger->tickets[at].id;
        at = ledger->tickets[at].next;
    }
}

size_t
og_ledger_queue(const og_ledger *ledger, int64_t *tickets, size_t room)
{
    uint32_t at = ledger->queue.first;
    for (size_t i = 0; at != 0 && i < room; i++) {
        tickets[i] = ledger->tickets[at].id;
        at = ledger->tickets[at].next;
    }
    return ledger->queue.count;
}

og_status
og_ledger_queued(og_ledger *ledger, int64_t id, int64_t *owner, size_t *count,
                 int64_t *units, size_t room, int64_t *need, og_error *err)
{
    const og_ticket *ticket = og_find_ticket(ledger, id);
    if (ticket == NULL) {
        return og_unknown(err, "a ticket", id);
    }
    og_demand demand;
    og_plan_demand(ledger, ticket, &demand);
    int64_t sum = 0;
    for (uint32_t i = 0; i < ledger->pool_count; i++) {
        bool over = demand.need[i] > INT64_MAX - sum;
        sum = over ? INT64_MAX : sum + demand.need[i];
    }
    for (uint32_t i = 0; i < ticket->unit_count && i < room; i++) {
        units[i] = ledger->units[ticket->units[i]].id;
    }
    *owner = ledger->owners[ticket->owner].id;
    *count = ticket->unit_count;
    *need = sum;
    return OG_OK;
}

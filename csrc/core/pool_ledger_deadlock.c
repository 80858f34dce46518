/* The deadlock test (Habermann's): let every owner that waits for nothing
 * finish and give back what it holds, then whoever that makes room for, and
 * so on. Who is left could wait for ever.
 *
 * An owner cannot finish before its own tickets, before those of owners that
 * descend from it, and, if a ticket blocks its thread, before that one. Nor
 * can what a task waits for end before what blocks the task's thread.
 * Finishing only ever frees, so the order does not matter. An owner that
 * waits for another outside the ledger is not seen. */
#include "core/pool_ledger_parts.h"

/* What cannot be had while nobody has finished. */
static void
begin_pools(og_ledger *ledger)
{
    for (uint32_t i = 0; i < ledger->pool_count; i++) {
        og_pool *pool = &ledger->pools[i];
        pool->stuck = pool->extra;
        for (uint32_t slot = pool->resident; slot != 0;) {
            og_unit *unit = &ledger->units[slot];
            unit->stuck = unit->pinned || unit->kept || unit->leases > 0;
            unit->left = 0;
            if (unit->stuck) {
                pool->stuck += unit->bytes;
            }
            slot = unit->next;
        }
    }
    for (uint32_t at = ledger->holding; at != 0;) {
        og_owner *owner = &ledger->owners[at];
        owner->blocked = 0;
        owner->finished = false;
        for (uint32_t slot = owner->holds; slot != 0;) {
            const og_hold *hold = &ledger->holds[slot];
            if ((hold->unit & HOLD_EXTRA) == 0) {
                ledger->units[hold->unit].left++;
            }
            slot = hold->owner_next;
        }
        at = owner->next;
    }
}

/* Adds change to the count of what blocks, for each owner the ticket does. */
static void
block(og_ledger *ledger, const og_ticket *ticket, uint32_t change)
{
    uint32_t above = ticket->owner;
    int64_t thread = ledger->owners[above].thread;
    bool whole = (ticket->flags & OG_POOL_BLOCKS_THREAD) != 0 && thread != 0;
    while (above != 0) {
        ledger->owners[above].blocked += change;
        above = ledger->owners[above].parent;
    }
    for (uint32_t at = whole ? ledger->holding : 0; at != 0;) {
        og_owner *owner = &ledger->owners[at];
        if (owner->thread == thread) {
            owner->blocked += change;
        }
        at = owner->next;
    }
}

static void
finish(og_ledger *ledger, og_owner *owner)
{
    owner->finished = true;
    for (uint32_t slot = owner->holds; slot != 0;) {
        const og_hold *hold = &ledger->holds[slot];
        slot = hold->owner_next;
        if ((hold->unit & HOLD_EXTRA) != 0) {
            ledger->pools[hold->unit & ~HOLD_EXTRA].stuck -= hold->count;
            continue;
        }
        og_unit *unit = &ledger->units[hold->unit];
        bool resident = unit->state != OG_UNIT_ABSENT;
        if (--unit->left == 0 && resident && !unit->pinned && !unit->kept) {
            unit->stuck = false;
            ledger->pools[unit->pool].stuck -= unit->bytes;
        }
    }
}

static bool
finish_owners(og_ledger *ledger)
{
    bool any = false;
    for (uint32_t at = ledger->holding; at != 0;) {
        og_owner *owner = &ledger->owners[at];
        if (!owner->finished && owner->blocked == 0) {
            finish(ledger, owner);
            any = true;
        }
        at = owner->next;
    }
    return any;
}

/* Whether the ticket fits beside what is still stuck. */
static bool
fits(og_ledger *ledger, const og_ticket *ticket)
{
    int64_t need[OG_POOLS_MAX] = {0};
    uint64_t stamp = ++ledger->stamp;
    for (uint32_t i = 0; i < ticket->unit_count; i++) {
        og_unit *unit = &ledger->units[ticket->units[i]];
        if (unit->doomed) {
            return true; /* it will be told so */
        }
        bool there = unit->state != OG_UNIT_ABSENT && unit->stuck;
        if (unit->stamp != stamp && !there) {
            need[unit->pool] += unit->bytes;
        }
        unit->stamp = stamp;
    }
    for (uint32_t i = 0; i < ticket->extra_count; i++) {
        need[ticket->extra[i].pool] += ticket->extra[i].bytes;
    }
    for (uint32_t i = 0; i < ledger->pool_count; i++) {
        const og_pool *pool = &ledger->pools[i];
        if (need[i] > 0 && need[i] > pool->budget - pool->stuck) {
            return false;
        }
    }
    return true;
}

static bool
stops(const og_ledger *ledger, const og_ticket *ticket, int64_t thread)
{
    return (ticket->flags & OG_POOL_BLOCKS_THREAD) != 0 &&
           ledger->owners[ticket->owner].thread == thread;
}

bool
og_ticket_stopped(const og_ledger *ledger, const og_ticket *ticket, bool test)
{
    int64_t thread = ledger->owners[ticket->owner].thread;
    if (thread == 0 || (ticket->flags & OG_POOL_BLOCKS_THREAD) != 0) {
        return false;
    }
    bool stopped = false;
    for (uint32_t at = ledger->queue.first; at != 0 && !stopped;) {
        const og_ticket *other = &ledger->tickets[at];
        stopped = !(test && other->done) && stops(ledger, other, thread);
        at = other->next;
    }
    return stopped;
}

static bool
try_ticket(og_ledger *ledger, og_ticket *ticket, const og_ticket *also)
{
    if (ticket->done || !fits(ledger, ticket) ||
        og_ticket_stopped(ledger, ticket, true)) {
        return false;
    }
    int64_t thread = ledger->owners[ticket->owner].thread;
    bool task = thread != 0 && (ticket->flags & OG_POOL_BLOCKS_THREAD) == 0;
    if (task && also != NULL && !also->done && stops(ledger, also, thread)) {
        return false;
    }
    ticket->done = true;
    block(ledger, ticket, (uint32_t)-1);
    return true;
}

/* Counts from zero also for owners that hold nothing. */
static void
begin_ticket(og_ledger *ledger, og_ticket *ticket)
{
    ticket->done = false;
    for (uint32_t at = ticket->owner; at != 0;) {
        ledger->owners[at].blocked = 0;
        at = ledger->owners[at].parent;
    }
}

bool
og_deadlock_free(og_ledger *ledger, og_ticket *also)
{
    og_ticket *tickets = ledger->tickets;
    uint32_t left = ledger->queue.count + (also != NULL);
    begin_pools(ledger);
    for (uint32_t at = ledger->queue.first; at != 0; at = tickets[at].next) {
        begin_ticket(ledger, &tickets[at]);
    }
    if (also != NULL) {
        begin_ticket(ledger, also);
        block(ledger, also, 1);
    }
    for (uint32_t at = ledger->queue.first; at != 0; at = tickets[at].next) {
        block(ledger, &tickets[at], 1);
    }
    bool any = true;
    while (any && left > 0) {
        any = finish_owners(ledger);
        if (also != NULL && try_ticket(ledger, also, also)) {
            left--;
            any = true;
        }
        uint32_t at = ledger->queue.first;
        for (; at != 0; at = tickets[at].next) {
            if (try_ticket(ledger, &tickets[at], also)) {
                left--;
                any = true;
            }
        }
    }
    return left == 0;
}

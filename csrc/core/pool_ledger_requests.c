/* Requests: decided at once or queued, in the order in which they came.
 *
 * What waits for a pool holds up those who come later and touch that pool, so
 * that nobody starves; but not those on whom others depend: who holds leases,
 * descends from who does, or blocks its thread, and then who descends from or
 * blocks the thread of one of these. */
#include "core/pool_ledger_parts.h"

#include <stdlib.h>
#include <string.h>

/* --- the two lists --- */

static void
push(og_ledger *ledger, og_list *list, uint32_t slot)
{
    og_ticket *ticket = &ledger->tickets[slot];
    ticket->next = 0;
    ticket->previous = list->last;
    *(list->last == 0 ? &list->first : &ledger->tickets[list->last].next) =
        slot;
    list->last = slot;
    list->count++;
}

static void
unlink_from(og_ledger *ledger, og_list *list, const og_ticket *ticket)
{
    *(ticket->previous == 0 ? &list->first
                            : &ledger->tickets[ticket->previous].next) =
        ticket->next;
    *(ticket->next == 0 ? &list->last
                        : &ledger->tickets[ticket->next].previous) =
        ticket->previous;
    list->count--;
}

static uint32_t
lease_count(const og_ticket *ticket)
{
    return ticket->unit_count + ticket->extra_count;
}

static void
count_waiting(og_ledger *ledger, const og_ticket *ticket, uint32_t change)
{
    for (uint32_t i = 0; i < ledger->pool_count; i++) {
        if ((ticket->pools >> i & 1) != 0) {
            ledger->pools[i].waiting += change;
        }
    }
}

static void
enqueue(og_ledger *ledger, og_ticket *ticket)
{
    ticket->state = TICKET_QUEUED;
    ticket->verdict = OG_POOL_WAIT;
    count_waiting(ledger, ticket, 1);
    push(ledger, &ledger->queue, og_slot_of(ticket->id));
}

static void
dequeue(og_ledger *ledger, og_ticket *ticket)
{
    count_waiting(ledger, ticket, (uint32_t)-1);
    unlink_from(ledger, &ledger->queue, ticket);
}

/* A queued ticket gets its verdict, and its caller must be told. */
static void
decide(og_ledger *ledger, og_ticket *ticket, og_pool_verdict verdict)
{
    dequeue(ledger, ticket);
    ticket->state = TICKET_DECIDED;
    ticket->verdict = (uint8_t)verdict;
    ticket->is_news = true;
    push(ledger, &ledger->news, og_slot_of(ticket->id));
}

/* --- tickets --- */

static og_status
check_request(const og_ledger *ledger, int64_t owner_id, const int64_t *units,
              size_t count, const og_pool_extra *extra, size_t extra_count,
              og_error *err)
{
    const og_owner *owner = og_find_owner(ledger, owner_id);
    int64_t left = OG_POOL_BYTES_MAX;
    if (owner == NULL || owner->dropped) {
        return og_unknown(err, "an owner", owner_id);
    }
    for (size_t i = 0; i < count; i++) {
        const og_unit *unit = og_find_unit(ledger, units[i]);
        if (unit == NULL || unit->doomed) {
            return og_unknown(err, "a unit", units[i]);
        }
    }
    for (size_t i = 0; i < extra_count; i++) {
        og_pool_info info;
        og_status status = og_ledger_pool(ledger, extra[i].pool, &info, err);
        if (status != OG_OK) {
            return status;
        }
        if (extra[i].bytes < 0 || extra[i].bytes > left) {
            return og_fail(err, OG_BAD_ARGUMENT,
                           "expected extra of 0 to 2**60 bytes in all, got "
                           "%lld more",
                           (long long)extra[i].bytes);
        }
        left -= extra[i].bytes;
    }
    if (count + extra_count > SLOT_MASK) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected a set of at most %lld units",
                       (long long)SLOT_MASK);
    }
    return OG_OK;
}

/* The new ticket's slot, 0 without memory. Its holds are reserved. */
static uint32_t
make_ticket(og_ledger *ledger, size_t count, size_t extra_count)
{
    og_ticket made = {.unit_count = (uint32_t)count,
                      .extra_count = (uint32_t)extra_count};
    size_t size = extra_count * sizeof *made.extra +
                  count * (sizeof *made.units + sizeof *made.how);
    if (!og_holds_reserve(ledger, count + extra_count)) {
        return 0;
    }
    void *records = ledger->tickets;
    uint32_t slot =
        og_table_take(&ledger->ticket_table, &records, sizeof(og_ticket));
    ledger->tickets = records;
    if (slot == 0 || (made.block = malloc(size + 1)) == NULL) {
        return 0;
    }
    made.extra = made.block;
    made.units = (uint32_t *)(made.extra + extra_count);
    made.how = (uint8_t *)(made.units + count);
    og_ticket *ticket = &ledger->tickets[slot];
    made.id = og_next_id(ticket->id, slot);
    if (ledger->ticket_table.free != 0) {
        ledger->ticket_table.free = ticket->next;
    }
    else {
        ledger->ticket_table.used++;
    }
    *ticket = made;
    ledger->hold_reserved += lease_count(ticket);
    return slot;
}

static void
fill_ticket(og_ledger *ledger, og_ticket *ticket, const int64_t *units,
            const og_pool_extra *extra)
{
    for (uint32_t i = 0; i < ticket->unit_count; i++) {
        og_unit *unit = og_find_unit(ledger, units[i]);
        unit->wanted++;
        ticket->units[i] = og_slot_of(units[i]);
        ticket->pools |= (uint64_t)1 << unit->pool;
    }
    for (uint32_t i = 0; i < ticket->extra_count; i++) {
        ticket->extra[i] = extra[i];
        ticket->pools |= (uint64_t)1 << extra[i].pool;
    }
    ledger->owners[ticket->owner].tickets++;
}

static void
free_ticket(og_ledger *ledger, og_ticket *ticket)
{
    uint32_t slot = og_slot_of(ticket->id), owner = ticket->owner;
    if (ticket->is_news) {
        unlink_from(ledger, &ledger->news, ticket);
    }
    ledger->hold_reserved -=
        ticket->verdict == OG_POOL_GRANTED ? 0 : lease_count(ticket);
    for (uint32_t i = 0; i < ticket->unit_count; i++) {
        og_unit *unit = &ledger->units[ticket->units[i]];
        unit->wanted--;
        og_unit_settle(ledger, unit);
    }
    free(ticket->block);
    bool last = ticket->id > ID_LAST;
    *ticket = (og_ticket){.id = -ticket->id};
    if (!last) {
        ticket->next = ledger->ticket_table.free;
        ledger->ticket_table.free = slot;
    }
    ledger->owners[owner].tickets--;
    og_owner_settle(ledger, owner);
}

/* --- deciding --- */

/* Whether the owner can do nothing before the ticket is met. */
static bool
comes_before(const og_ledger *ledger, const og_ticket *ticket, uint32_t owner)
{
    int64_t thread = ledger->owners[owner].thread;
    uint32_t at = ticket->owner;
    if ((ticket->flags & OG_POOL_BLOCKS_THREAD) != 0 && thread != 0 &&
        ledger->owners[at].thread == thread) {
        return true;
    }
    while (at != 0 && at != owner) {
        at = ledger->owners[at].parent;
    }
    return at != 0;
}

/* Whether somebody who holds leases depends on it, also by way of others that
 * wait, of which those are marked who are needed so. */
static bool
is_needed(const og_ledger *ledger, const og_ticket *ticket)
{
    bool needed = og_owner_holds(ledger, &ledger->owners[ticket->owner]);
    for (uint32_t at = ledger->holding; at != 0 && !needed;) {
        needed = comes_before(ledger, ticket, at);
        at = ledger->owners[at].next;
    }
    for (uint32_t at = ledger->queue.first; at != 0 && !needed;) {
        const og_ticket *other = &ledger->tickets[at];
        needed = other->needed && comes_before(ledger, ticket, other->owner);
        at = other->next;
    }
    return needed;
}

static void
mark_needed(og_ledger *ledger)
{
    og_ticket *tickets = ledger->tickets;
    for (uint32_t at = ledger->queue.first; at != 0; at = tickets[at].next) {
        tickets[at].needed = false;
    }
    bool any = true;
    while (any) {
        any = false;
        uint32_t at = ledger->queue.first;
        for (; at != 0; at = tickets[at].next) {
            if (!tickets[at].needed && is_needed(ledger, &tickets[at])) {
                tickets[at].needed = any = true;
            }
        }
    }
}

static bool
is_held_up(og_ledger *ledger, const og_ticket *ticket)
{
    if ((ticket->pools & og_waited_for(ledger)) == 0) {
        return false;
    }
    mark_needed(ledger);
    return !is_needed(ledger, ticket);
}

/* Whether everybody who waits can still be met after the grant. Who can finish
 * gives back what it gets. */
static bool
is_safe(og_ledger *ledger, og_ticket *ticket)
{
    return !og_owner_blocked(ledger, ticket->owner, ticket) ||
           og_deadlock_free(ledger, ticket, true);
}

static void
grant(og_ledger *ledger, og_ticket *ticket)
{
    ledger->hold_reserved -= lease_count(ticket);
    og_plan_grant(ledger, ticket);
}

/* Budgets, pins or sizes have changed under the queue: what can never be met
 * any more is told so, the latest first where some wait for each other. */
static void
refuse_hopeless(og_ledger *ledger)
{
    int64_t need, have;
    ledger->upset = false;
    for (uint32_t at = ledger->queue.first; at != 0;) {
        og_ticket *ticket = &ledger->tickets[at];
        at = ticket->next;
        og_demand demand;
        og_plan_demand(ledger, ticket, &demand);
        if (demand.gone) {
            decide(ledger, ticket, OG_POOL_GONE);
        }
        else if (og_plan_never(ledger, ticket, &need, &have) >= 0) {
            decide(ledger, ticket, OG_POOL_TOO_LARGE);
        }
    }
    while (ledger->queue.count > 0 && !og_deadlock_free(ledger, NULL, false)) {
        uint32_t at = ledger->queue.last;
        while (ledger->tickets[at].done) {
            at = ledger->tickets[at].previous;
        }
        decide(ledger, &ledger->tickets[at], OG_POOL_DEADLOCK);
    }
}

static og_pool_verdict
first_verdict(og_ledger *ledger, og_ticket *ticket)
{
    int64_t need, have;
    if (!is_held_up(ledger, ticket) && og_plan_fits(ledger, ticket) &&
        is_safe(ledger, ticket)) {
        grant(ledger, ticket);
        return OG_POOL_GRANTED;
    }
    if (og_plan_never(ledger, ticket, &need, &have) >= 0) {
        return OG_POOL_TOO_LARGE;
    }
    if ((ticket->flags & OG_POOL_TRY) != 0) {
        return OG_POOL_BUSY;
    }
    bool can_wait = og_deadlock_free(ledger, ticket, false);
    if (!can_wait && ledger->upset) {
        /* Perhaps those in the way are hopeless themselves since they began
         * to wait; who was told so can finish. */
        refuse_hopeless(ledger);
        return first_verdict(ledger, ticket);
    }
    return can_wait ? OG_POOL_WAIT : OG_POOL_DEADLOCK;
}

og_status
og_ledger_request(og_ledger *ledger, int64_t owner, const int64_t *units,
                  size_t count, const og_pool_extra *extra, size_t extra_count,
                  int64_t tick, int flags, int64_t *ticket_id, og_error *err)
{
    og_status status =
        check_request(ledger, owner, units, count, extra, extra_count, err);
    if (status != OG_OK) {
        return status;
    }
    uint32_t slot = make_ticket(ledger, count, extra_count);
    if (slot == 0) {
        return og_fail(err, OG_NO_MEMORY, "no memory for one more request");
    }
    og_ticket *ticket = &ledger->tickets[slot];
    ticket->owner = og_slot_of(owner);
    ticket->flags = (uint8_t)flags;
    ticket->tick = tick;
    fill_ticket(ledger, ticket, units, extra);
    ticket->state = TICKET_DECIDED;
    ticket->verdict = OG_POOL_BUSY;
    og_pool_verdict verdict = first_verdict(ledger, ticket);
    if (verdict == OG_POOL_WAIT) {
        enqueue(ledger, ticket);
    }
    ticket->verdict = (uint8_t)verdict;
    *ticket_id = ticket->id;
    return OG_OK;
}

/* One pass over the queue: whether it granted anything. */
static bool
grant_waiting(og_ledger *ledger, int64_t tick)
{
    uint64_t held_up = 0;
    bool any = false;
    mark_needed(ledger);
    for (uint32_t at = ledger->queue.first; at != 0;) {
        og_ticket *ticket = &ledger->tickets[at];
        at = ticket->next;
        if (og_ticket_stopped(ledger, ticket)) {
            continue;
        }
        bool in_turn = (ticket->pools & held_up) == 0;
        if ((!in_turn && !ticket->needed) || !og_plan_fits(ledger, ticket)) {
            held_up |= ticket->pools;
        }
        else if (is_safe(ledger, ticket)) { /* else others go before it */
            grant(ledger, ticket);
            ticket->tick = tick;
            decide(ledger, ticket, OG_POOL_GRANTED);
            any = true;
        }
    }
    return any;
}

size_t
og_ledger_pump(og_ledger *ledger, int64_t tick)
{
    bool again = true;
    while (again) {
        if (ledger->upset) {
            refuse_hopeless(ledger);
        }
        /* Who was granted something may be held up by others now. */
        again = grant_waiting(ledger, tick) || ledger->upset;
        again = again && ledger->queue.count > 0;
    }
    return ledger->news.count;
}

void
og_ledger_told(og_ledger *ledger, int64_t id)
{
    og_ticket *ticket = og_find_ticket(ledger, id);
    if (ticket != NULL && ticket->is_news) {
        unlink_from(ledger, &ledger->news, ticket);
        ticket->is_news = false;
    }
}

/* --- ending --- */

og_status
og_ledger_take(og_ledger *ledger, int64_t id, og_error *err)
{
    og_ticket *ticket = og_find_ticket(ledger, id);
    if (ticket == NULL) {
        return og_unknown(err, "a ticket", id);
    }
    if (ticket->state == TICKET_QUEUED) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected a ticket that is decided, %lld still waits",
                       (long long)id);
    }
    if (ticket->verdict == OG_POOL_GRANTED) {
        int64_t tick = og_ledger_next_tick(ledger, ticket->tick);
        for (uint32_t slot = ticket->victims; slot != 0;) {
            og_unit *unit = &ledger->units[slot];
            unit->claimed = false;
            og_policy_evict(ledger, unit);
            slot = unit->victim;
        }
        for (uint32_t i = 0; i < ticket->unit_count; i++) {
            og_policy_touch(ledger, &ledger->units[ticket->units[i]], tick);
        }
    }
    free_ticket(ledger, ticket);
    return OG_OK;
}

int
og_ledger_cancel(og_ledger *ledger, int64_t id, og_error *err)
{
    og_ticket *ticket = og_find_ticket(ledger, id);
    if (ticket == NULL) {
        return og_unknown(err, "a ticket", id);
    }
    if (ticket->state == TICKET_QUEUED) {
        dequeue(ledger, ticket);
    }
    else if (ticket->verdict == OG_POOL_GRANTED) {
        og_plan_undo(ledger, ticket);
    }
    free_ticket(ledger, ticket);
    return og_should_pump(ledger, true);
}

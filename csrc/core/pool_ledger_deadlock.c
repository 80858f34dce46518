/* The deadlock test (Habermann's): let every owner that waits for nothing
 * finish and give back what it holds, then whoever that makes room for, and
 * so on. Who is left could wait for ever.
 *
 * An owner cannot finish before its own tickets, before those of owners that
 * descend from it (unless such a ticket ends by itself), and before one that
 * blocks its thread. Nor can what a task waits for end before what blocks the
 * task's thread. An og_wait ends when its holder has finished. An owner that
 * waits for another outside the ledger, and did not say so, is not seen.
 *
 * Whom a grant lets finish only frees, so such grants are made in any order.
 * What is granted to an owner that another's ticket still keeps from going on
 * stays with it, is charged to it here, and is put off as long as others can
 * go on. (One owner that asks twice at a time is in truth two who go on by
 * themselves.) The same test says whether a real grant is safe, so that one
 * who was told to wait is never told later that it was in vain. */
#include "core/pool_ledger_parts.h"

/* The tickets of a test, from one to the next: the queue, and in front of it
 * the one that is not in it. */
static og_ticket *
ticket_at(const og_ledger *ledger, uint32_t slot)
{
    return slot == 0 ? NULL : &ledger->tickets[slot];
}

/* What is absent was left by the test before as it happened to be. */
static void
forget_absent(og_unit *unit)
{
    if (unit->state == OG_UNIT_ABSENT) {
        unit->stuck = false;
        unit->left = 0;
    }
}

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
}

/* Calls on_unit for each unit of which the owner holds leases. */
static void
for_held(og_ledger *ledger, const og_owner *owner, void (*on_unit)(og_unit *))
{
    for (uint32_t slot = owner->holds; slot != 0;) {
        const og_hold *hold = &ledger->holds[slot];
        if ((hold->unit & HOLD_EXTRA) == 0) {
            on_unit(&ledger->units[hold->unit]);
        }
        slot = hold->owner_next;
    }
}

static void
count_holder(og_unit *unit)
{
    unit->left++;
}

static void
begin_owners(og_ledger *ledger)
{
    for (uint32_t at = ledger->holding; at != 0;
         at = ledger->owners[at].next) {
        ledger->owners[at].blocked = 0;
        ledger->owners[at].finished = false;
        for_held(ledger, &ledger->owners[at], forget_absent);
    }
    for (uint32_t at = ledger->holding; at != 0;
         at = ledger->owners[at].next) {
        for_held(ledger, &ledger->owners[at], count_holder);
    }
}

/* Adds change to the count of what blocks, for its owner and those above. */
static void
block(og_ledger *ledger, const og_ticket *ticket, uint32_t change)
{
    bool ends = (ticket->flags & OG_POOL_ENDS) != 0;
    uint32_t above = ticket->owner;
    do {
        ledger->owners[above].blocked += change;
        above = ends ? 0 : ledger->owners[above].parent;
    } while (above != 0);
}

static void
block_wait(og_ledger *ledger, const og_wait *wait, uint32_t change)
{
    uint32_t above = wait->owner;
    while (above != 0 && above != wait->until) {
        ledger->owners[above].blocked += change;
        above = ledger->owners[above].parent;
    }
}

/* Counts from zero also for owners that hold nothing. */
static void
begin_waiter(og_ledger *ledger, uint32_t at)
{
    while (at != 0) {
        ledger->owners[at].blocked = 0;
        at = ledger->owners[at].parent;
    }
}

static void
begin_ticket(og_ledger *ledger, og_ticket *ticket)
{
    ticket->done = ticket->charged = false;
    begin_waiter(ledger, ticket->owner);
    for (uint32_t i = 0; i < ticket->unit_count; i++) {
        forget_absent(&ledger->units[ticket->units[i]]);
    }
}

static bool
stops(const og_ledger *ledger, uint32_t owner, int flags, int64_t thread)
{
    return (flags & OG_POOL_BLOCKS_THREAD) != 0 && thread != 0 &&
           ledger->owners[owner].thread == thread;
}

/* Whether a wait blocks the thread; test: that is not done. */
static bool
is_stopped_outside(const og_ledger *ledger, int64_t thread, bool test)
{
    bool stopped = false;
    for (uint32_t i = 0; i < ledger->wait_count && !stopped; i++) {
        const og_wait *wait = &ledger->waits[i];
        stopped = !(test && wait->done) &&
                  stops(ledger, wait->owner, wait->flags, thread);
    }
    return stopped;
}

/* Whether a ticket or wait that is not done blocks the thread. */
static bool
is_stopped(const og_ledger *ledger, uint32_t first, int64_t thread)
{
    const og_ticket *at = thread == 0 ? NULL : ticket_at(ledger, first);
    for (; at != NULL; at = ticket_at(ledger, at->next)) {
        if (!at->done && stops(ledger, at->owner, at->flags, thread)) {
            return true;
        }
    }
    return is_stopped_outside(ledger, thread, true);
}

static bool
can_finish(const og_ledger *ledger, uint32_t first, const og_owner *owner)
{
    return owner->blocked == 0 && !is_stopped(ledger, first, owner->thread);
}

/* Whether it can do what it was granted something for. */
static bool
can_go_on(const og_ledger *ledger, uint32_t first, uint32_t slot)
{
    const og_owner *owner = &ledger->owners[slot];
    uint32_t own = 0;
    const og_ticket *at = owner->blocked > 0 ? ticket_at(ledger, first) : NULL;
    for (; at != NULL; at = ticket_at(ledger, at->next)) {
        own += !at->done && at->owner == slot;
    }
    return owner->blocked == own && !is_stopped(ledger, first, owner->thread);
}

/* One owner less has it. */
static void
release(og_ledger *ledger, og_unit *unit)
{
    unit->left--;
    if (unit->left == 0 && unit->stuck && !unit->pinned && !unit->kept) {
        unit->stuck = false;
        ledger->pools[unit->pool].stuck -= unit->bytes;
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
        }
        else {
            release(ledger, &ledger->units[hold->unit]);
        }
    }
}

/* What the ticket is granted stays with its owner, or no longer does. */
static void
charge(og_ledger *ledger, og_ticket *ticket, bool charged)
{
    uint64_t stamp = ++ledger->stamp;
    ticket->charged = charged;
    for (uint32_t i = 0; i < ticket->unit_count; i++) {
        og_unit *unit = &ledger->units[ticket->units[i]];
        if (unit->stamp == stamp) {
            continue;
        }
        unit->stamp = stamp;
        if (!charged) {
            release(ledger, unit);
            continue;
        }
        unit->left++;
        if (!unit->stuck) {
            unit->stuck = true;
            ledger->pools[unit->pool].stuck += unit->bytes;
        }
    }
    for (uint32_t i = 0; i < ticket->extra_count; i++) {
        const og_pool_extra *extra = &ticket->extra[i];
        ledger->pools[extra->pool].stuck +=
            charged ? extra->bytes : -extra->bytes;
    }
}

static bool
end_waits(og_ledger *ledger)
{
    bool any = false;
    for (uint32_t i = 0; i < ledger->wait_count; i++) {
        og_wait *wait = &ledger->waits[i];
        if (!wait->done && ledger->owners[wait->holder].finished) {
            wait->done = any = true;
            block_wait(ledger, wait, (uint32_t)-1);
        }
    }
    return any;
}

static bool
finish_owners(og_ledger *ledger, uint32_t first)
{
    bool any = end_waits(ledger);
    for (uint32_t at = ledger->holding; at != 0;) {
        og_owner *owner = &ledger->owners[at];
        if (!owner->finished && can_finish(ledger, first, owner)) {
            finish(ledger, owner);
            any = true;
        }
        at = owner->next;
    }
    og_ticket *at = ticket_at(ledger, first);
    for (; at != NULL; at = ticket_at(ledger, at->next)) {
        if (at->charged && can_go_on(ledger, first, at->owner)) {
            charge(ledger, at, false);
            any = true;
        }
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
        if (unit->stamp != stamp && !unit->stuck) {
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

/* A task's ticket waits for what stops the task's thread. */
static bool
can_be_met(og_ledger *ledger, uint32_t first, const og_ticket *ticket)
{
    bool task = (ticket->flags & OG_POOL_BLOCKS_THREAD) == 0;
    int64_t thread = ledger->owners[ticket->owner].thread;
    return !ticket->done && fits(ledger, ticket) &&
           !(task && is_stopped(ledger, first, thread));
}

/* Grants that let their owners finish. */
static uint32_t
grant_finishing(og_ledger *ledger, uint32_t first)
{
    uint32_t count = 0;
    og_ticket *at = ticket_at(ledger, first);
    for (; at != NULL; at = ticket_at(ledger, at->next)) {
        if (!can_be_met(ledger, first, at)) {
            continue;
        }
        at->done = true;
        block(ledger, at, (uint32_t)-1);
        if (can_go_on(ledger, first, at->owner)) {
            count++;
            continue;
        }
        at->done = false;
        block(ledger, at, 1);
    }
    return count;
}

/* Whether others of its thread could go on, were it granted; if not, it can as
 * well be granted after those who keep its owner. */
static bool
stops_others(const og_ledger *ledger, uint32_t first, const og_ticket *ticket)
{
    int64_t thread = ledger->owners[ticket->owner].thread;
    bool found = false;
    if ((ticket->flags & OG_POOL_BLOCKS_THREAD) == 0 || thread == 0) {
        return false;
    }
    const og_ticket *at = ticket_at(ledger, first);
    for (; at != NULL && !found; at = ticket_at(ledger, at->next)) {
        bool other = at->owner != ticket->owner && (!at->done || at->charged);
        found = other && ledger->owners[at->owner].thread == thread;
    }
    for (uint32_t slot = ledger->holding; slot != 0 && !found;) {
        const og_owner *owner = &ledger->owners[slot];
        found = slot != ticket->owner && !owner->finished &&
                owner->thread == thread;
        slot = owner->next;
    }
    return found;
}

/* One grant whose owner goes on to wait for another. Who keeps an owner by an
 * og_wait may wait for one above it, so then it need not come first. */
static uint32_t
grant_charged(og_ledger *ledger, uint32_t first)
{
    og_ticket *at = ticket_at(ledger, first);
    for (; at != NULL; at = ticket_at(ledger, at->next)) {
        if (can_be_met(ledger, first, at) &&
            (ledger->wait_count > 0 || stops_others(ledger, first, at))) {
            at->done = true;
            block(ledger, at, (uint32_t)-1);
            charge(ledger, at, true);
            return 1;
        }
    }
    return 0;
}

static void
begin(og_ledger *ledger, uint32_t first)
{
    begin_pools(ledger);
    og_ticket *at = ticket_at(ledger, first);
    for (; at != NULL; at = ticket_at(ledger, at->next)) {
        begin_ticket(ledger, at);
    }
    for (uint32_t i = 0; i < ledger->wait_count; i++) {
        ledger->waits[i].done = false;
        begin_waiter(ledger, ledger->waits[i].owner);
    }
    begin_owners(ledger);
    for (at = ticket_at(ledger, first); at != NULL;
         at = ticket_at(ledger, at->next)) {
        block(ledger, at, 1);
    }
    for (uint32_t i = 0; i < ledger->wait_count; i++) {
        block_wait(ledger, &ledger->waits[i], 1);
    }
}

bool
og_deadlock_free(og_ledger *ledger, og_ticket *also, bool granted)
{
    uint32_t first = ledger->queue.first, left = ledger->queue.count;
    if (also != NULL && also->state != TICKET_QUEUED) {
        also->next = first;
        first = og_slot_of(also->id);
        left++;
    }
    begin(ledger, first);
    if (granted) {
        also->done = true;
        block(ledger, also, (uint32_t)-1);
        charge(ledger, also, true);
        left--;
    }
    bool any = true;
    while (any && left + ledger->wait_count > 0) {
        any = finish_owners(ledger, first);
        uint32_t count = grant_finishing(ledger, first);
        if (!any && count == 0) {
            count = grant_charged(ledger, first);
        }
        any = any || count > 0;
        left -= count;
    }
    return left == 0;
}

/* --- what the queue means for one that asks now --- */

bool
og_ticket_stopped(const og_ledger *ledger, const og_ticket *ticket)
{
    int64_t thread = ledger->owners[ticket->owner].thread;
    bool stopped = false;
    bool task = thread != 0 && (ticket->flags & OG_POOL_BLOCKS_THREAD) == 0;
    og_ticket *at = task ? ticket_at(ledger, ledger->queue.first) : NULL;
    for (; at != NULL && !stopped; at = ticket_at(ledger, at->next)) {
        stopped = stops(ledger, at->owner, at->flags, thread);
    }
    return stopped || (task && is_stopped_outside(ledger, thread, false));
}

/* Whether the owner is above at, but below until, where that is not 0. */
static bool
is_above(const og_ledger *ledger, uint32_t owner, uint32_t at, uint32_t until)
{
    do {
        at = ledger->owners[at].parent;
    } while (at != 0 && at != until && at != owner);
    return at == owner && at != until;
}

static bool
is_blocked_outside(const og_ledger *ledger, uint32_t owner)
{
    bool blocked =
        is_stopped_outside(ledger, ledger->owners[owner].thread, false);
    for (uint32_t i = 0; i < ledger->wait_count && !blocked; i++) {
        const og_wait *wait = &ledger->waits[i];
        blocked = wait->owner != owner &&
                  is_above(ledger, owner, wait->owner, wait->until);
    }
    return blocked;
}

bool
og_owner_blocked(const og_ledger *ledger, uint32_t owner, const og_ticket *but)
{
    int64_t thread = ledger->owners[owner].thread;
    const og_ticket *at = ticket_at(ledger, ledger->queue.first);
    for (; at != NULL; at = ticket_at(ledger, at->next)) {
        if (at == but) {
            continue;
        }
        if (stops(ledger, at->owner, at->flags, thread)) {
            return true;
        }
        bool ends = (at->flags & OG_POOL_ENDS) != 0;
        if (!ends && at->owner != owner &&
            is_above(ledger, owner, at->owner, 0)) {
            return true;
        }
    }
    return is_blocked_outside(ledger, owner);
}

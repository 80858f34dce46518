/* Waits of owners for each other outside of the ledger, as for the turn to
 * change an object. The ledger does not grant these: it is told of all that
 * there are, so that its deadlock test sees circles that lead through both. */
#include "core/pool_ledger_parts.h"

#include <stdlib.h>

/* Counts a wait in the owners it names, or counts it no more. */
static void
count_wait(og_ledger *ledger, const og_wait *wait, bool begins)
{
    og_owner *holder = &ledger->owners[wait->holder];
    uint32_t change = begins ? 1 : (uint32_t)-1;
    ledger->owners[wait->owner].tickets += change;
    holder->tickets += change;
    if (begins) {
        og_owner_list(ledger, wait->holder);
    }
    holder->awaited += change;
    if (!begins) {
        og_owner_unlist(ledger, wait->holder);
        og_owner_settle(ledger, wait->owner);
        og_owner_settle(ledger, wait->holder);
    }
}

/* The first above the owner that it waits for: that one can let go without
 * it, and so can who is above. */
static uint32_t
first_awaited(const og_ledger *ledger, const og_wait *waits, size_t count,
              uint32_t owner)
{
    uint32_t at = ledger->owners[owner].parent;
    for (; at != 0; at = ledger->owners[at].parent) {
        for (size_t i = 0; i < count; i++) {
            if (waits[i].owner == owner && waits[i].holder == at) {
                return at;
            }
        }
    }
    return 0;
}

int
og_ledger_set_waits(og_ledger *ledger, const og_pool_await *waits,
                    size_t count, int64_t asker, og_error *err)
{
    if (count > SLOT_MASK) {
        return og_fail(err, OG_BAD_ARGUMENT, "expected at most %lld waits",
                       (long long)SLOT_MASK);
    }
    for (size_t i = 0; i < count; i++) {
        int64_t each[] = {waits[i].owner, waits[i].holder};
        for (int k = 0; k < 2; k++) {
            if (og_find_owner(ledger, each[k]) == NULL) {
                return og_unknown(err, "an owner", each[k]);
            }
        }
    }
    og_wait *made = malloc((count + 1) * sizeof *made);
    if (made == NULL) {
        return og_fail(err, OG_NO_MEMORY, "no memory for %zu waits", count);
    }
    for (size_t i = 0; i < count; i++) {
        made[i] = (og_wait){.owner = og_slot_of(waits[i].owner),
                            .holder = og_slot_of(waits[i].holder),
                            .flags = waits[i].flags};
        count_wait(ledger, &made[i], true);
    }
    for (size_t i = 0; i < count; i++) {
        made[i].until = first_awaited(ledger, made, count, made[i].owner);
    }
    og_wait *over = ledger->waits;
    size_t over_count = ledger->wait_count;
    bool before = asker != 0 && og_deadlock_free(ledger, NULL, false);
    ledger->waits = made;
    ledger->wait_count = (uint32_t)count;
    bool after = og_deadlock_free(ledger, NULL, false);
    bool ends = asker == 0 || after || !before;
    for (size_t i = 0; i < count && asker != 0; i++) {
        ends = ends && (waits[i].owner != asker || made[i].done);
    }
    if (!ends) {
        ledger->waits = over;
        ledger->wait_count = (uint32_t)over_count;
        over = made;
        over_count = count;
    }
    for (size_t i = 0; i < over_count; i++) {
        count_wait(ledger, &over[i], false);
    }
    free(over);
    ledger->upset = ledger->upset || (ends && ledger->queue.count > 0);
    return ends;
}

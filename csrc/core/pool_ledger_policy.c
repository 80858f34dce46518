/* Which idle unit goes first. Condemned units before all others, then lower
 * priority, then what the policy says, then the older. */
#include "core/pool_ledger_parts.h"

/* The ageing makes a unit that was used much long ago go in the end: what it
 * earns is added to the clock of its last use, and the clock is the highest
 * score that was evicted so far. */
static double
cost_score(const og_unit *unit)
{
    double bytes = unit->bytes > 0 ? (double)unit->bytes : 1.0;
    return unit->age + (double)unit->uses * unit->cost / bytes;
}

void
og_policy_evict(og_ledger *ledger, const og_unit *unit)
{
    double score = cost_score(unit);
    if (ledger->policy == OG_POLICY_COST && !unit->condemned &&
        score > ledger->clock && score < 1e300) {
        ledger->clock = score;
    }
}

static int
compare(double a, double b)
{
    return (a > b) - (a < b);
}

bool
og_policy_before(const og_ledger *ledger, const og_unit *a, const og_unit *b)
{
    if (a->condemned != b->condemned) {
        return a->condemned;
    }
    if (a->priority != b->priority) {
        return a->priority < b->priority;
    }
    int order = 0;
    if (ledger->policy == OG_POLICY_COST) {
        order = compare(cost_score(a), cost_score(b));
    }
    else if (ledger->policy == OG_POLICY_RANK) {
        order = compare(a->rank, b->rank);
    }
    if (order == 0) {
        order = (a->tick > b->tick) - (a->tick < b->tick);
    }
    return order != 0 ? order < 0 : a->id < b->id;
}

/* The records of a ledger; private to pool_ledger*.c.
 *
 * Records lie in growing arrays and name each other by slot; slot 0 is nobody.
 * An id is the slot with a generation above it, so a slot is used again and
 * an id never. Lists are chains of slots through the records. */
#ifndef OPGUARD_CORE_POOL_LEDGER_PARTS_H
#define OPGUARD_CORE_POOL_LEDGER_PARTS_H

#include "core/pool_ledger.h"

#define SLOT_BITS 24
#define SLOT_MASK (((int64_t)1 << SLOT_BITS) - 1)
#define ID_LAST (INT64_MAX - SLOT_MASK - 1)

/* In og_hold.unit: this bit and a pool's index, for extra bytes. */
#define HOLD_EXTRA 0x80000000u

typedef struct og_unit {
    int64_t id; /* of a free slot: minus the id that it had last */
    int64_t bytes, leases, priority, tick, uses;
    int64_t credit; /* EVICTING: of its bytes, those counted for the grant */
    double cost, rank, age;
    uint64_t stamp;
    uint32_t holds;          /* first og_hold */
    uint32_t next, previous; /* of what is resident in the pool; free slots */
    uint32_t victim;         /* the next one chosen by the same plan */
    uint32_t wanted;         /* tickets that name it */
    uint32_t left;           /* deadlock test: holders not finished */
    uint8_t pool, state;
    bool pinned, condemned, kept, doomed;
    bool claimed; /* EVICTING for a ticket that nobody has taken yet */
    bool stuck;   /* deadlock test: its bytes cannot be had */
} og_unit;

typedef struct og_owner {
    int64_t id, thread;
    uint32_t parent;
    uint32_t holds; /* first og_hold */
    uint32_t next,
        previous; /* of those that hold or are awaited; free slots */
    uint32_t children, tickets;
    uint32_t awaited; /* og_waits for it */
    uint32_t blocked; /* deadlock test: what it cannot finish before */
    bool dropped, forfeited, finished;
} og_owner;

/* What one owner holds of one unit, or of extra bytes in one pool. */
typedef struct og_hold {
    int64_t count, leaving;
    uint32_t owner, unit;
    uint32_t bucket; /* the next of the same hash, or of the free ones */
    uint32_t owner_next, owner_previous;
    uint32_t unit_next, unit_previous;
} og_hold;

enum { TICKET_NEW, TICKET_QUEUED, TICKET_DECIDED };
enum { HOW_READY, HOW_LOAD, HOW_PENDING };

typedef struct og_ticket {
    int64_t id, tick;
    uint64_t pools; /* a bit a pool that it touches */
    uint32_t *units;
    og_pool_extra *extra;
    uint8_t *how;
    void *block; /* all three lie here */
    uint32_t unit_count, extra_count;
    uint32_t owner;
    uint32_t next, previous; /* of the queue, the news, or the free slots */
    uint32_t victims;        /* first of what it evicts */
    uint8_t state, verdict, flags;
    bool is_news, needed;
    bool done, charged; /* deadlock test: granted; with more to wait for */
} og_ticket;

/* One owner waits for another outside of the ledger. Each counts among the
 * tickets of both. */
typedef struct og_wait {
    uint32_t owner, holder;
    uint32_t until; /* of those above the owner, the first not held up */
    int flags;
    bool done;
} og_wait;

typedef struct og_pool {
    int64_t budget, used, idle, extra;
    int64_t total; /* of all units, so that no sum of them overflows */
    int64_t stuck; /* deadlock test: what cannot be had */
    uint32_t resident;
    uint32_t waiting;
} og_pool;

typedef struct og_list {
    uint32_t first, last, count;
} og_list;

/* An array of records; size is of one. */
typedef struct og_table {
    uint32_t capacity, used, free;
} og_table;

struct og_ledger {
    og_pool pools[OG_POOLS_MAX];
    og_unit *units;
    og_owner *owners;
    og_ticket *tickets;
    og_hold *holds;
    uint32_t *buckets; /* as many as holds, a power of two */
    uint32_t *scratch; /* room for every unit */
    og_table unit_table, owner_table, ticket_table;
    uint32_t hold_capacity, hold_used, hold_free, hold_reserved;
    uint32_t pool_count;
    uint32_t holding; /* first owner that holds anything or is awaited */
    og_wait *waits;
    uint32_t wait_count;
    uint32_t chosen, chosen_count;
    og_list queue, news;
    uint64_t stamp;
    int64_t tick;
    double clock;
    og_pool_policy policy;
    bool upset; /* what waits may have become impossible */
};

/* What a set of units and extra bytes asks of each pool. */
typedef struct og_demand {
    int64_t need[OG_POOLS_MAX]; /* to be brought in, extra included */
    int64_t keep[OG_POOLS_MAX]; /* idle now, and wanted */
    int64_t all[OG_POOLS_MAX];  /* whatever state it is in */
    bool evicting, gone;
} og_demand;

static inline uint32_t
og_slot_of(int64_t id)
{
    return (uint32_t)(id & SLOT_MASK);
}

/* The record of an id, or NULL. */
static inline og_unit *
og_find_unit(const og_ledger *ledger, int64_t id)
{
    uint32_t slot = og_slot_of(id);
    bool known = id > 0 && slot < ledger->unit_table.used;
    return known && ledger->units[slot].id == id ? ledger->units + slot : NULL;
}

static inline og_owner *
og_find_owner(const og_ledger *ledger, int64_t id)
{
    uint32_t slot = og_slot_of(id);
    bool known = id > 0 && slot < ledger->owner_table.used;
    return known && ledger->owners[slot].id == id ? ledger->owners + slot
                                                  : NULL;
}

static inline og_ticket *
og_find_ticket(const og_ledger *ledger, int64_t id)
{
    uint32_t slot = og_slot_of(id);
    bool known = id > 0 && slot < ledger->ticket_table.used;
    return known && ledger->tickets[slot].id == id ? ledger->tickets + slot
                                                   : NULL;
}

static inline bool
og_unit_idle(const og_unit *unit)
{
    return unit->state == OG_UNIT_READY && unit->leases == 0 &&
           !unit->pinned && !unit->kept;
}

/* Around whatever changes what og_unit_idle looks at. */
static inline void
og_unit_hide(og_ledger *ledger, const og_unit *unit)
{
    if (og_unit_idle(unit)) {
        ledger->pools[unit->pool].idle -= unit->bytes;
    }
}

static inline void
og_unit_show(og_ledger *ledger, const og_unit *unit)
{
    if (og_unit_idle(unit)) {
        ledger->pools[unit->pool].idle += unit->bytes;
    }
}

/* Whether it is on the list of those that hold something or are awaited. */
static inline bool
og_owner_listed(const og_owner *owner)
{
    return owner->holds != 0 || owner->awaited != 0;
}

/* On and off that list: before the first reason for it, after the last. */
static inline void
og_owner_list(og_ledger *ledger, uint32_t slot)
{
    og_owner *owner = &ledger->owners[slot];
    if (!og_owner_listed(owner)) {
        owner->previous = 0;
        owner->next = ledger->holding;
        if (ledger->holding != 0) {
            ledger->owners[ledger->holding].previous = slot;
        }
        ledger->holding = slot;
    }
}

static inline void
og_owner_unlist(og_ledger *ledger, uint32_t slot)
{
    og_owner *owner = &ledger->owners[slot];
    if (!og_owner_listed(owner)) {
        if (owner->next != 0) {
            ledger->owners[owner->next].previous = owner->previous;
        }
        *(owner->previous == 0 ? &ledger->holding
                               : &ledger->owners[owner->previous].next) =
            owner->next;
        owner->next = owner->previous = 0;
    }
}

/* pool_ledger.c */

OG_COLD og_status
og_unknown(og_error *err, const char *what, int64_t id);

/* A slot that is free, or 0 without memory. *records has elements of size
 * bytes, of which the first member is the id. */
uint32_t
og_table_take(og_table *table, void **records, size_t size);

/* The next id of a slot, 0 when it has had them all. */
int64_t
og_next_id(int64_t before, uint32_t slot);

/* 0: one more than the last. */
static inline int64_t
og_ledger_next_tick(og_ledger *ledger, int64_t tick)
{
    if (tick == 0) {
        tick = ledger->tick + 1;
    }
    ledger->tick = tick > ledger->tick ? tick : ledger->tick;
    return tick;
}

/* Whether a call that has freed something should tell its caller to pump. */
static inline bool
og_should_pump(const og_ledger *ledger, bool freed)
{
    return ledger->news.count > 0 ||
           (ledger->queue.count > 0 && (freed || ledger->upset));
}

/* The pools of what waits already. */
static inline uint64_t
og_waited_for(const og_ledger *ledger)
{
    uint64_t pools = 0;
    for (uint32_t i = 0; i < ledger->pool_count; i++) {
        pools |= (uint64_t)(ledger->pools[i].waiting > 0) << i;
    }
    return pools;
}

/* pool_ledger_units.c */

/* Changes the state, the used bytes and the list of what is resident. */
void
og_unit_become(og_ledger *ledger, og_unit *unit, og_pool_state state);

/* Frees a removed unit's bytes and then its slot, once nobody needs them. */
void
og_unit_settle(og_ledger *ledger, og_unit *unit);

/* pool_ledger_holds.c */

/* Room for count more records: false without memory. */
OG_COLD bool
og_holds_grow(og_ledger *ledger, size_t count);

static inline bool
og_holds_reserve(og_ledger *ledger, size_t count)
{
    size_t used = 1 + (size_t)ledger->hold_used + ledger->hold_reserved;
    return OG_LIKELY(count <= ledger->hold_capacity &&
                     used + count <= ledger->hold_capacity) ||
           og_holds_grow(ledger, count);
}

static inline uint32_t *
og_hold_bucket(const og_ledger *ledger, uint32_t owner, uint32_t unit)
{
    uint32_t hash = (owner * 0x9E3779B1u) ^ (unit * 0x85EBCA77u);
    hash ^= hash >> 15;
    return &ledger->buckets[hash & (ledger->hold_capacity - 1)];
}

static inline og_hold *
og_hold_find(const og_ledger *ledger, uint32_t owner, uint32_t unit)
{
    if (ledger->hold_capacity == 0) {
        return NULL;
    }
    uint32_t slot = *og_hold_bucket(ledger, owner, unit);
    while (slot != 0) {
        og_hold *hold = &ledger->holds[slot];
        if (hold->owner == owner && hold->unit == unit) {
            return hold;
        }
        slot = hold->bucket;
    }
    return NULL;
}

/* There must be room. unit: a slot, or HOLD_EXTRA | pool. */
void
og_hold_add(og_ledger *ledger, uint32_t owner, uint32_t unit, int64_t count);

/* At most what is held; a hold of nothing is gone. */
void
og_hold_lessen(og_ledger *ledger, og_hold *hold, int64_t count);

static inline void
og_hold_remove(og_ledger *ledger, uint32_t owner, uint32_t unit, int64_t count)
{
    og_hold_lessen(ledger, og_hold_find(ledger, owner, unit), count);
}

/* pool_ledger_owners.c */

/* Whether it or one it descends from holds anything or is awaited. */
bool
og_owner_holds(const og_ledger *ledger, const og_owner *owner);

/* Frees a dropped owner that nothing refers to, and so on upwards. */
void
og_owner_settle(og_ledger *ledger, uint32_t slot);

/* pool_ledger_policy.c */

/* Somebody took a lease. */
static inline void
og_policy_touch(const og_ledger *ledger, og_unit *unit, int64_t tick)
{
    unit->tick = tick;
    unit->uses++;
    unit->age = ledger->clock;
    unit->condemned = false;
}

/* Somebody's plan evicts it. */
void
og_policy_evict(og_ledger *ledger, const og_unit *unit);

/* Whether a goes before b. */
bool
og_policy_before(const og_ledger *ledger, const og_unit *a, const og_unit *b);

/* pool_ledger_plan.c */

void
og_plan_demand(og_ledger *ledger, const og_ticket *ticket, og_demand *demand);

/* The first pool that is short, or -1. */
int
og_plan_short(const og_ledger *ledger, const og_ticket *ticket,
              const og_demand *demand);

/* Whether it fits now, once what is idle has gone. */
bool
og_plan_fits(og_ledger *ledger, const og_ticket *ticket);

/* Grants a ticket that fits. */
void
og_plan_grant(og_ledger *ledger, og_ticket *ticket);

/* The inverse. */
void
og_plan_undo(og_ledger *ledger, og_ticket *ticket);

/* The pool in which the ticket never fits, or -1. */
int
og_plan_never(og_ledger *ledger, const og_ticket *ticket, int64_t *need,
              int64_t *have);

/* pool_ledger_deadlock.c */

/* Marks as done every ticket that waits (and `also`, NULL allowed) and every
 * og_wait that can be met once those who can finish have; true if all tickets
 * can. granted: as if also, which may be in the queue, were granted now. */
bool
og_deadlock_free(og_ledger *ledger, og_ticket *also, bool granted);

/* Whether its thread is stopped by another wait, so that it could do nothing
 * with a grant but keep the bytes from that one. */
bool
og_ticket_stopped(const og_ledger *ledger, const og_ticket *ticket);

/* Whether the owner cannot go on before somebody who waits, but for this
 * ticket (NULL allowed). Who is not blocked gives back what it is granted. */
bool
og_owner_blocked(const og_ledger *ledger, uint32_t owner,
                 const og_ticket *but);

#endif

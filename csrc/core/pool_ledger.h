/* The ledger of the pools: who holds what, what must go, who waits.
 *
 * A pool is a budget of bytes. A unit is what one user takes in one pool. An
 * owner is a thread or a task; it holds leases, counted, on units that it
 * shares with other owners. A request is a set of units, granted whole or not
 * at all. The ledger only decides: the caller moves the bytes and says so
 * with og_ledger_loaded and its like. Its invariant is that what it counts as
 * used never passes a budget by a grant.
 *
 * No clock, lock, thread or I/O. All calls on one ledger must exclude each
 * other; each is a whole step. What needs memory takes it before it changes
 * anything, so that a failure leaves the ledger as it was; og_ledger_pump,
 * leaving and giving back need none.
 *
 * Ids are positive and never used again; each call finds its record in
 * constant time. Pointers given in are borrowed for the call. A function that
 * returns int gives 1, 0 or a negative og_status with err filled (err may be
 * NULL). "Pump" means: call og_ledger_pump, somebody who waits may go on. */
#ifndef OPGUARD_CORE_POOL_LEDGER_H
#define OPGUARD_CORE_POOL_LEDGER_H

#include "core/base.h"

#ifdef __cplusplus
extern "C" {
#endif

#define OG_POOLS_MAX 64
#define OG_POOL_BYTES_MAX ((int64_t)1 << 60)

typedef enum og_pool_state {
    OG_UNIT_ABSENT = 0,
    OG_UNIT_LOADING = 1,
    OG_UNIT_READY = 2,
    OG_UNIT_EVICTING = 3,
} og_pool_state;

typedef enum og_pool_verdict {
    OG_POOL_GRANTED = 0,
    OG_POOL_WAIT = 1,
    OG_POOL_TOO_LARGE = 2, /* never fits, what is pinned counted */
    OG_POOL_DEADLOCK = 3,  /* those who must let go wait for the asker */
    OG_POOL_BUSY = 4,      /* not now, and OG_POOL_TRY was given */
    OG_POOL_GONE = 5,      /* a unit was removed while the request waited */
} og_pool_verdict;

typedef enum og_pool_policy {
    OG_POLICY_LRU = 0,  /* the oldest tick goes first */
    OG_POLICY_COST = 1, /* the lowest ageing clock + uses * cost / bytes */
    OG_POLICY_RANK = 2, /* the lowest rank */
} og_pool_policy;

enum og_pool_flags {
    OG_POOL_TRY = 1,           /* do not queue */
    OG_POOL_BLOCKS_THREAD = 2, /* the thread can do nothing else meanwhile */
    OG_POOL_ENDS =
        4 /* gives up by itself: who started it may not wait for it */
};

typedef enum og_unit_field {
    OG_FIELD_BYTES = 0,
    OG_FIELD_PRIORITY = 1,
    OG_FIELD_PINNED = 2,
    OG_FIELD_COST = 3, /* og_ledger_set_score: these two are doubles */
    OG_FIELD_RANK = 4,
} og_unit_field;

/* Bytes that are no unit's, such as those of patched tensors. */
typedef struct og_pool_extra {
    int64_t pool, bytes;
} og_pool_extra;

/* A lease in the way. unit 0: count bytes of extra. owner 0: the unit is
 * pinned, or its user would not give it back. */
typedef struct og_pool_holder {
    int64_t owner, unit, count;
} og_pool_holder;

typedef struct og_pool_info {
    int64_t budget, used; /* see og_ledger_evicted for units on their way */
    int64_t idle;         /* of it: what could be evicted now */
    int64_t extra;        /* of it: granted beside units */
    int64_t waiting;      /* requests that wait and touch this pool */
} og_pool_info;

typedef struct og_unit_info {
    int64_t pool, bytes, leases, priority, tick, uses;
    double cost, rank;
    og_pool_state state;
    bool condemned, pinned;
} og_unit_info;

/* What a request came to. All arrays lie in one block, freed by
 * og_pool_answer_clear. */
typedef struct og_pool_answer {
    og_pool_verdict verdict;
    int64_t ticket;
    int64_t need, have, pool; /* of the pool that is short; else 0, 0, -1 */
    size_t evict_count, load_count, pending_count, holder_count;
    int64_t *evict, *load, *pending;
    og_pool_holder *holders;
    void *block;
} og_pool_answer;

typedef struct og_ledger og_ledger;

/* NULL without memory. */
og_ledger *
og_ledger_new(void);

/* NULL allowed. */
void
og_ledger_free(og_ledger *ledger);

/* --- pools --- */

/* The index of the new pool. */
og_status
og_ledger_add_pool(og_ledger *ledger, int64_t budget, int64_t *pool,
                   og_error *err);

/* 1: pump. A budget may be less than what is used: nothing is evicted by
 * itself, see og_ledger_reclaim. */
int
og_ledger_set_budget(og_ledger *ledger, int64_t pool, int64_t budget,
                     og_error *err);

og_status
og_ledger_pool(const og_ledger *ledger, int64_t pool, og_pool_info *info,
               og_error *err);

og_status
og_ledger_set_policy(og_ledger *ledger, og_pool_policy policy, og_error *err);

/* --- units --- */

og_status
og_ledger_add_unit(og_ledger *ledger, int64_t pool, int64_t bytes,
                   int64_t priority, bool pinned, double cost, int64_t *unit,
                   og_error *err);

/* 1: pump. */
int
og_ledger_set_unit(og_ledger *ledger, int64_t unit, og_unit_field field,
                   int64_t value, og_error *err);

og_status
og_ledger_set_score(og_ledger *ledger, int64_t unit, og_unit_field field,
                    double value, og_error *err);

/* 1: pump. Nobody can ask for the unit any more; requests that wait for it
 * are answered OG_POOL_GONE. While it is leased, loading or evicting its id
 * stays good for saying how that ended. */
int
og_ledger_remove_unit(og_ledger *ledger, int64_t unit, og_error *err);

og_status
og_ledger_unit(const og_ledger *ledger, int64_t unit, og_unit_info *info,
               og_error *err);

/* Writes at most room ids and returns how many there are. */
size_t
og_ledger_units(const og_ledger *ledger, int64_t pool, int64_t *ids,
                size_t room);

/* Tells a unit to go: it is the first victim until somebody enters it. 1: it
 * is idle now, og_ledger_reclaim_condemned would take it. */
int
og_ledger_condemn(og_ledger *ledger, int64_t unit, og_error *err);

/* How loading and evicting ended; each 1: pump. failed: ABSENT again, and who
 * holds leases on it gives them back. kept: READY again, since its user did
 * not give it back; it is no victim until somebody has entered it. A grant
 * counts the bytes of its victims as its own until they are evicted, so after
 * kept `used` may be above the budget: reclaim the difference, or give the
 * grant back. */
int
og_ledger_loaded(og_ledger *ledger, int64_t unit, og_error *err);

int
og_ledger_failed(og_ledger *ledger, int64_t unit, og_error *err);

int
og_ledger_evicted(og_ledger *ledger, int64_t unit, og_error *err);

int
og_ledger_kept(og_ledger *ledger, int64_t unit, og_error *err);

/* READY again like kept, but nobody tried to evict it: it may be chosen. */
int
og_ledger_spared(og_ledger *ledger, int64_t unit, og_error *err);

/* Idle units worth at least bytes, or as much as there is, become EVICTING;
 * returns how many, never more than the pool has units. They are read by
 * og_ledger_chosen, at once: the next call of any kind may forget them. */
int64_t
og_ledger_reclaim(og_ledger *ledger, int64_t pool, int64_t bytes,
                  og_error *err);

int64_t
og_ledger_reclaim_condemned(og_ledger *ledger, int64_t pool, og_error *err);

void
og_ledger_chosen(const og_ledger *ledger, int64_t *ids);

/* A unit that a reclaim chose is READY again, as if it had not been chosen. */
void
og_ledger_unchoose(og_ledger *ledger, int64_t unit);

/* Who holds leases on a unit: writes at most room, gives the number. */
og_status
og_ledger_holders(const og_ledger *ledger, int64_t unit,
                  og_pool_holder *holders, size_t room, size_t *count,
                  og_error *err);

/* --- owners --- */

/* parent: 0 or an owner that may wait for this one. thread: 0 or a number
 * that tells threads apart. */
og_status
og_ledger_add_owner(og_ledger *ledger, int64_t parent, int64_t thread,
                    int64_t *owner, og_error *err);

/* The owner asks for nothing any more. Leases that it still holds stay and
 * are left under the same id. */
og_status
og_ledger_drop_owner(og_ledger *ledger, int64_t owner, og_error *err);

/* 1: pump. All that the owner holds is left and all that it asked for is
 * cancelled: its thread is not there any more. Who leaves for it what it held
 * leaves nothing, without an error. */
int
og_ledger_forfeit(og_ledger *ledger, int64_t owner, og_error *err);

/* One owner waits for another outside of the ledger: for what that one has
 * and will give up, whatever it is. flags: OG_POOL_BLOCKS_THREAD or 0. */
typedef struct og_pool_await {
    int64_t owner, holder;
    int flags;
} og_pool_await;

/* All such waits from now on, in place of those told before; the deadlock
 * test counts them, and who is waited for may overtake. asker: 0, or an owner
 * that begins to wait by this: 0 is returned, and nothing changed, where not
 * all of its waits can end; else 1. Pump: requests that wait may go on now, or
 * may have become impossible. */
int
og_ledger_set_waits(og_ledger *ledger, const og_pool_await *waits,
                    size_t count, int64_t asker, og_error *err);

/* 1 where the owner, or one that it descends from, holds a lease or is waited
 * for. */
int
og_ledger_owner_holds(const og_ledger *ledger, int64_t owner, og_error *err);

/* The fast road. 1: every unit was READY and nobody was in front, the leases
 * are counted. 0: nothing done, request them. A unit may be named more than
 * once: each is a lease. tick 0: the next of the ledger's own. */
int
og_ledger_enter(og_ledger *ledger, int64_t owner, const int64_t *units,
                size_t count, int64_t tick, og_error *err);

/* 1: pump. All are held by this owner, or nothing is done. */
int
og_ledger_leave(og_ledger *ledger, int64_t owner, const int64_t *units,
                size_t count, const og_pool_extra *extra, size_t extra_count,
                og_error *err);

/* --- requests --- */

/* Makes a ticket and decides it, or queues it: read it by og_ledger_answer,
 * then end it by og_ledger_take unless it waits. */
og_status
og_ledger_request(og_ledger *ledger, int64_t owner, const int64_t *units,
                  size_t count, const og_pool_extra *extra, size_t extra_count,
                  int64_t tick, int flags, int64_t *ticket, og_error *err);

/* Fills answer from a ticket, which stays as it is. */
og_status
og_ledger_answer(og_ledger *ledger, int64_t ticket, og_pool_answer *answer,
                 og_error *err);

void
og_pool_answer_clear(og_pool_answer *answer);

/* Ends a decided ticket: what it was granted is the owner's. */
og_status
og_ledger_take(og_ledger *ledger, int64_t ticket, og_error *err);

/* 1: pump. Ends a ticket, queued or decided, and gives back what it was
 * granted: its victims are READY again, what it should have loaded is ABSENT
 * as by og_ledger_failed. */
int
og_ledger_cancel(og_ledger *ledger, int64_t ticket, og_error *err);

/* Decides what can be decided now; returns how many decided tickets nobody
 * was told of. og_ledger_news reads them, og_ledger_told ends that. */
size_t
og_ledger_pump(og_ledger *ledger, int64_t tick);

void
og_ledger_news(const og_ledger *ledger, int64_t *tickets);

void
og_ledger_told(og_ledger *ledger, int64_t ticket);

/* The queue in order: writes at most room ids, returns how many there are. */
size_t
og_ledger_queue(const og_ledger *ledger, int64_t *tickets, size_t room);

/* Of a ticket: its owner, how many units, these (room at most), and the bytes
 * that must be brought in for it. */
og_status
og_ledger_queued(og_ledger *ledger, int64_t ticket, int64_t *owner,
                 size_t *count, int64_t *units, size_t room, int64_t *need,
                 og_error *err);

#ifdef __cplusplus
}
#endif
#endif

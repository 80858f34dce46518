/* Every allocation of the ledger failing in turn: a call that fails has
 * changed nothing, and the same call succeeds when there is memory again. The
 * sources are compiled into this program, over an allocator that fails. */
#include <stdlib.h>
#include <string.h>

static int until_failure; /* allocations left; negative: none fails */

static int
fails_now(void)
{
    return until_failure >= 0 && until_failure-- == 0;
}

static void *
failing_malloc(size_t size)
{
    return fails_now() ? NULL : malloc(size);
}

static void *
failing_calloc(size_t count, size_t size)
{
    return fails_now() ? NULL : calloc(count, size);
}

static void *
failing_realloc(void *block, size_t size)
{
    return fails_now() ? NULL : realloc(block, size);
}

#define malloc failing_malloc
#define calloc failing_calloc
#define realloc failing_realloc
#include "core/pool_ledger.c"
#include "core/pool_ledger_answers.c"
#include "core/pool_ledger_deadlock.c"
#include "core/pool_ledger_holds.c"
#include "core/pool_ledger_owners.c"
#include "core/pool_ledger_plan.c"
#include "core/pool_ledger_policy.c"
#include "core/pool_ledger_requests.c"
#include "core/pool_ledger_units.c"
#include "core/pool_ledger_waits.c"
#undef malloc
#undef calloc
#undef realloc

#include "check.h"

enum { UNITS = 60, OWNERS = 60 };

typedef struct picture {
    og_pool_info pool;
    og_unit_info units[UNITS];
    size_t unit_count, waiting, holds, reserved, news;
    int64_t tick;
} picture;

static og_ledger *ledger;
static int64_t units[UNITS], owners[OWNERS];
static size_t made_units, made_owners;

static picture
look(void)
{
    picture seen;
    memset(&seen, 0, sizeof seen);
    if (ledger == NULL || ledger->pool_count == 0) {
        return seen;
    }
    CHECK(og_ledger_pool(ledger, 0, &seen.pool, NULL) == OG_OK);
    for (size_t i = 0; i < made_units; i++) {
        og_unit_info info;
        CHECK(og_ledger_unit(ledger, units[i], &info, NULL) == OG_OK);
        memcpy(&seen.units[i].pool, &info.pool, 6 * sizeof info.pool);
        seen.units[i].state = info.state;
    }
    seen.unit_count = og_ledger_units(ledger, 0, NULL, 0);
    seen.waiting = og_ledger_queue(ledger, NULL, 0);
    seen.holds = ledger->hold_used;
    seen.reserved = ledger->hold_reserved;
    seen.news = ledger->news.count;
    seen.tick = ledger->tick;
    return seen;
}

/* Runs a call with its first allocation failing, its second, and so on until
 * one succeeds; each failure must have left all as it was. */
static int
insist(int (*call)(size_t), size_t with)
{
    for (int first = 0;; first++) {
        picture before = look();
        until_failure = first;
        int status = call(with);
        until_failure = -1;
        if (status >= 0) {
            return status;
        }
        CHECK(status == OG_NO_MEMORY);
        picture after = look();
        CHECK(memcmp(&before, &after, sizeof before) == 0);
    }
}

static int
make_ledger(size_t with)
{
    (void)with;
    ledger = og_ledger_new();
    return ledger == NULL ? OG_NO_MEMORY : 0;
}

static int
make_unit(size_t with)
{
    og_error error;
    int status = og_ledger_add_unit(ledger, 0, (int64_t)with % 7 + 1, 0, false,
                                    1.0, &units[with], &error);
    made_units += status == OG_OK;
    return status;
}

static int
make_owner(size_t with)
{
    og_error error;
    int status = og_ledger_add_owner(ledger, 0, 0, &owners[with], &error);
    made_owners += status == OG_OK;
    return status;
}

static int64_t ticket;

static int
ask_for(size_t with)
{
    og_error error;
    int64_t set[] = {units[with], units[(with + 1) % UNITS]};
    og_pool_extra extra = {0, 1};
    return og_ledger_request(ledger, owners[with], set, 2, &extra, 1, 0, 0,
                             &ticket, &error);
}

static og_pool_answer answer;

static int
answer_of(size_t with)
{
    og_error error;
    (void)with;
    return og_ledger_answer(ledger, ticket, &answer, &error);
}

static int
enter(size_t with)
{
    og_error error;
    return og_ledger_enter(ledger, owners[with], units, 20, 0, &error);
}

int
main(void)
{
    int64_t pool;
    until_failure = -1;
    (void)insist(make_ledger, 0);
    CHECK(og_ledger_add_pool(ledger, 120, &pool, NULL) == OG_OK);
    for (size_t i = 0; i < UNITS; i++) {
        (void)insist(make_unit, i);
        (void)insist(make_owner, i);
    }
    size_t granted = 0, waits = 0;
    for (size_t i = 0; i < OWNERS; i++) {
        (void)insist(ask_for, i);
        (void)insist(answer_of, i);
        granted += answer.verdict == OG_POOL_GRANTED;
        waits += answer.verdict == OG_POOL_WAIT;
        for (size_t j = 0; j < answer.load_count; j++) {
            CHECK(og_ledger_loaded(ledger, answer.load[j], NULL) >= 0);
        }
        if (answer.verdict != OG_POOL_WAIT) {
            CHECK(og_ledger_take(ledger, ticket, NULL) == OG_OK);
        }
        og_pool_answer_clear(&answer);
    }
    CHECK(granted > 10 && waits > 10);
    CHECK(insist(enter, 0) == 1); /* it holds leases: past the queue */
    CHECK(insist(enter, 1) == 1);
    og_ledger_free(ledger);
    return failures != 0;
}

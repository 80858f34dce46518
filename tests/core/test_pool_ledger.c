/* The ledger of the pools from C: leases, room made, and who waits. */
#include "core/pool_ledger.h"

#include "check.h"

#include <stdlib.h>
#include <string.h>

static og_ledger *ledger;
static og_pool_answer answer;

static int64_t
owner(int64_t parent, int64_t thread)
{
    int64_t made = 0;
    CHECK(og_ledger_add_owner(ledger, parent, thread, &made, NULL) == OG_OK);
    return made;
}

static int64_t
unit(int64_t pool, int64_t bytes)
{
    int64_t made = 0;
    CHECK(og_ledger_add_unit(ledger, pool, bytes, 0, false, 1.0, &made,
                             NULL) == OG_OK);
    return made;
}

/* The verdict; what was granted is loaded and taken. */
static og_pool_verdict
ask_for(int64_t who, const int64_t *units, size_t count, int flags)
{
    int64_t ticket = 0;
    og_pool_answer_clear(&answer);
    CHECK(og_ledger_request(ledger, who, units, count, NULL, 0, 0, flags,
                            &ticket, NULL) == OG_OK);
    CHECK(og_ledger_answer(ledger, ticket, &answer, NULL) == OG_OK);
    if (answer.verdict != OG_POOL_WAIT) {
        CHECK(og_ledger_take(ledger, ticket, NULL) == OG_OK);
    }
    return answer.verdict;
}

static void
carry_out(void)
{
    for (size_t i = 0; i < answer.evict_count; i++) {
        CHECK(og_ledger_evicted(ledger, answer.evict[i], NULL) >= 0);
    }
    for (size_t i = 0; i < answer.load_count; i++) {
        CHECK(og_ledger_loaded(ledger, answer.load[i], NULL) >= 0);
    }
}

static int64_t
used(int64_t pool)
{
    og_pool_info info = {0};
    CHECK(og_ledger_pool(ledger, pool, &info, NULL) == OG_OK);
    CHECK(info.used <= info.budget);
    return info.used;
}

static void
begin(int64_t budget)
{
    int64_t pool = -1;
    ledger = og_ledger_new();
    CHECK(og_ledger_add_pool(ledger, budget, &pool, NULL) == OG_OK);
    CHECK(pool == 0);
}

static void
end(void)
{
    og_pool_answer_clear(&answer);
    og_ledger_free(ledger);
}

static void
test_room_is_made(void)
{
    begin(100);
    int64_t a = unit(0, 40), b = unit(0, 40), c = unit(0, 40);
    int64_t who = owner(0, 1);
    int64_t both[] = {a, b};
    CHECK(og_ledger_enter(ledger, who, &a, 1, 0, NULL) == 0);
    CHECK(ask_for(who, both, 2, 0) == OG_POOL_GRANTED);
    CHECK(answer.load_count == 2 && used(0) == 80);
    carry_out();
    CHECK(og_ledger_enter(ledger, who, &a, 1, 0, NULL) == 1);
    CHECK(og_ledger_leave(ledger, who, &a, 1, NULL, 0, NULL) == 0);
    CHECK(ask_for(who, &c, 1, OG_POOL_TRY) == OG_POOL_BUSY);
    CHECK(answer.need == 40 && answer.have == 20 && answer.holder_count == 2);
    CHECK(og_ledger_leave(ledger, who, both, 2, NULL, 0, NULL) == 0);
    CHECK(ask_for(who, &c, 1, 0) == OG_POOL_GRANTED);
    CHECK(answer.evict_count == 1 && answer.evict[0] == b && used(0) == 100);
    carry_out();
    CHECK(used(0) == 80);
    end();
}

static void
test_waiting_and_deadlock(void)
{
    begin(100);
    int64_t a = unit(0, 60), b = unit(0, 60), large = unit(0, 101);
    int64_t one = owner(0, 1), two = owner(0, 2);
    CHECK(ask_for(one, &a, 1, 0) == OG_POOL_GRANTED);
    carry_out();
    CHECK(ask_for(one, &large, 1, 0) == OG_POOL_TOO_LARGE);
    CHECK(ask_for(one, &b, 1, 0) == OG_POOL_DEADLOCK);
    CHECK(ask_for(two, &b, 1, 0) == OG_POOL_WAIT);
    int64_t waits = answer.ticket, told = 0;
    CHECK(og_ledger_pump(ledger, 0) == 0);
    CHECK(og_ledger_leave(ledger, one, &a, 1, NULL, 0, NULL) == 1);
    CHECK(og_ledger_pump(ledger, 0) == 1);
    og_ledger_news(ledger, &told);
    CHECK(told == waits);
    og_ledger_told(ledger, told);
    CHECK(og_ledger_pump(ledger, 0) == 0);
    CHECK(og_ledger_evicted(ledger, a, NULL) < 0); /* nobody took it yet */
    CHECK(og_ledger_cancel(ledger, waits, NULL) >= 0);
    CHECK(used(0) == 60);
    CHECK(og_ledger_drop_owner(ledger, two, NULL) == OG_OK);
    CHECK(og_ledger_enter(ledger, two, &a, 1, 0, NULL) == OG_NOT_FOUND);
    end();
}

static uint64_t seed = 88172645463325252u;

static uint64_t
draw(uint64_t below)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed % below;
}

/* Many units and owners come, hold, wait and go; what is used stays within
 * the budgets, and nothing is left in the end. */
static void
test_many_at_random(void)
{
    enum { UNITS = 40, OWNERS = 12, STEPS = 20000 };
    int64_t units[UNITS], owners[OWNERS], tickets[OWNERS] = {0}, pool;
    int held[OWNERS][UNITS];
    memset(held, 0, sizeof held);
    begin(300);
    CHECK(og_ledger_add_pool(ledger, 200, &pool, NULL) == OG_OK);
    for (int i = 0; i < UNITS; i++) {
        units[i] = unit(i % 2, (int64_t)draw(60));
    }
    for (int i = 0; i < OWNERS; i++) {
        owners[i] = owner(0, i + 1);
    }
    for (int step = 0; step < STEPS; step++) {
        int who = (int)draw(OWNERS), what = (int)draw(UNITS);
        if (tickets[who] != 0) {
            if (draw(4) == 0) {
                CHECK(og_ledger_cancel(ledger, tickets[who], NULL) >= 0);
                tickets[who] = 0;
            }
        }
        else if (held[who][what] > 0) {
            held[who][what]--;
            CHECK(og_ledger_leave(ledger, owners[who], &units[what], 1, NULL,
                                  0, NULL) >= 0);
        }
        else {
            og_pool_verdict verdict = ask_for(owners[who], &units[what], 1, 0);
            if (verdict == OG_POOL_GRANTED) {
                carry_out();
                held[who][what]++;
            }
            tickets[who] = verdict == OG_POOL_WAIT ? answer.ticket : 0;
        }
        (void)og_ledger_pump(ledger, 0);
        (void)used(0);
        (void)used(1);
    }
    for (int i = 0; i < OWNERS; i++) {
        if (tickets[i] != 0) {
            CHECK(og_ledger_cancel(ledger, tickets[i], NULL) >= 0);
        }
        for (int j = 0; j < UNITS; j++) {
            for (; held[i][j] > 0; held[i][j]--) {
                CHECK(og_ledger_leave(ledger, owners[i], &units[j], 1, NULL, 0,
                                      NULL) >= 0);
            }
        }
        CHECK(og_ledger_drop_owner(ledger, owners[i], NULL) == OG_OK);
    }
    for (int i = 0; i < UNITS; i++) {
        CHECK(og_ledger_remove_unit(ledger, units[i], NULL) >= 0);
    }
    CHECK(used(0) == 0 && used(1) == 0);
    CHECK(og_ledger_units(ledger, 0, NULL, 0) == 0);
    end();
}

int
main(void)
{
    test_room_is_made();
    test_waiting_and_deadlock();
    test_many_at_random();
    return failures != 0;
}

/* The ledger's life, its pools, and the tables that its records lie in. */
#include "core/pool_ledger_parts.h"

#include <stdlib.h>
#include <string.h>

og_ledger *
og_ledger_new(void)
{
    return calloc(1, sizeof(og_ledger));
}

void
og_ledger_free(og_ledger *ledger)
{
    if (ledger == NULL) {
        return;
    }
    for (uint32_t i = 1; i < ledger->ticket_table.used; i++) {
        if (ledger->tickets[i].id > 0) {
            free(ledger->tickets[i].block);
        }
    }
    free(ledger->units);
    free(ledger->owners);
    free(ledger->tickets);
    free(ledger->holds);
    free(ledger->buckets);
    free(ledger->scratch);
    free(ledger->waits);
    free(ledger);
}

og_status
og_unknown(og_error *err, const char *what, int64_t id)
{
    return og_fail(err, OG_NOT_FOUND,
                   "expected the id of %s of this ledger, got %lld: there is "
                   "none, or it is gone",
                   what, (long long)id);
}

uint32_t
og_table_take(og_table *table, void **records, size_t size)
{
    char *base = *records;
    if (table->free != 0) {
        return table->free; /* the caller unlinks it */
    }
    if (table->used + 1 >= table->capacity) {
        uint32_t capacity = table->capacity * 2 + 16;
        if (capacity > SLOT_MASK) {
            return 0;
        }
        base = realloc(base, (size_t)capacity * size);
        if (base == NULL) {
            return 0;
        }
        *records = base;
        table->capacity = capacity;
        if (table->used == 0) {
            memset(base, 0, size); /* slot 0, which is nobody's */
            table->used = 1;
        }
    }
    memset(base + (size_t)table->used * size, 0, size);
    return table->used; /* the caller counts it */
}

int64_t
og_next_id(int64_t before, uint32_t slot)
{
    return before == 0 ? (int64_t)slot : -before + SLOT_MASK + 1;
}

/* --- pools --- */

static og_status
check_bytes(const char *what, int64_t bytes, og_error *err)
{
    if (bytes < 0 || bytes > OG_POOL_BYTES_MAX) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected %s from 0 to 2**60 bytes, got %lld", what,
                       (long long)bytes);
    }
    return OG_OK;
}

static og_status
check_pool(const og_ledger *ledger, int64_t pool, og_error *err)
{
    if (pool < 0 || pool >= (int64_t)ledger->pool_count) {
        return og_fail(err, OG_NOT_FOUND,
                       "expected the index of a pool below %u, got %lld",
                       (unsigned)ledger->pool_count, (long long)pool);
    }
    return OG_OK;
}

og_status
og_ledger_add_pool(og_ledger *ledger, int64_t budget, int64_t *pool,
                   og_error *err)
{
    og_status status = check_bytes("a budget", budget, err);
    if (status != OG_OK) {
        return status;
    }
    if (ledger->pool_count == OG_POOLS_MAX) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected at most %d pools in a ledger", OG_POOLS_MAX);
    }
    ledger->pools[ledger->pool_count] = (og_pool){.budget = budget};
    *pool = ledger->pool_count++;
    return OG_OK;
}

int
og_ledger_set_budget(og_ledger *ledger, int64_t pool, int64_t budget,
                     og_error *err)
{
    og_status status = check_pool(ledger, pool, err);
    if (status == OG_OK) {
        status = check_bytes("a budget", budget, err);
    }
    if (status != OG_OK) {
        return status;
    }
    ledger->upset = true;
    ledger->pools[pool].budget = budget;
    return og_should_pump(ledger, true);
}

og_status
og_ledger_pool(const og_ledger *ledger, int64_t pool, og_pool_info *info,
               og_error *err)
{
    og_status status = check_pool(ledger, pool, err);
    if (status == OG_OK) {
        const og_pool *found = &ledger->pools[pool];
        *info = (og_pool_info){found->budget, found->used, found->idle,
                               found->extra, found->waiting};
    }
    return status;
}

og_status
og_ledger_set_policy(og_ledger *ledger, og_pool_policy policy, og_error *err)
{
    if ((int)policy < OG_POLICY_LRU || policy > OG_POLICY_RANK) {
        return og_fail(err, OG_BAD_ARGUMENT,
                       "expected a policy from 0 to 2, got %d", (int)policy);
    }
    ledger->policy = policy;
    return OG_OK;
}

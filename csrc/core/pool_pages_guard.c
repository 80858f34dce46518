/* A file that is cut while it is mapped makes the next read of a lost page a
 * SIGBUS, which ends the process. Here such a read finds a page of zeros
 * instead, and the map is marked broken, so that whoever holds the model is
 * told by an exception as soon as code runs that can raise one.
 *
 * A signal handler is the process's, hence the one pointer at file scope. It
 * is set once and never freed, as a handler may be looking at it. Any other
 * SIGBUS goes to whoever was there before, faulthandler included. */
#define _GNU_SOURCE
#include "core/pool_pages.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SLOTS = 64, MOST_REPEATS = 8 };

/* start is 0: free; all ones: being filled. Ranges are looked at without a
 * lock. */
typedef struct og_pages_slot {
    _Atomic(uintptr_t) start, end;
    _Atomic(bool) broken;
} og_pages_slot;

typedef struct block {
    og_pages_slot slots[SLOTS];
    _Atomic(struct block *) next;
} block;

/* Never changed, never freed: a handler may be at it. */
typedef struct earlier {
    struct sigaction action;
    struct earlier *older;
} earlier;

typedef struct guard {
    block first;
    uintptr_t page;
    _Atomic(earlier *) before;
    _Atomic(uintptr_t) passed_on; /* the last address not ours */
    _Atomic(int) repeats;
    _Atomic(bool) forgiven;
    _Atomic(bool) any_broken; /* some map was, ever */
} guard;

/* Published once, by whoever maps first. */
static _Atomic(guard *) published;

static og_pages_slot *
slot_of(guard *g, uintptr_t address)
{
    for (block *b = &g->first; b != NULL; b = atomic_load(&b->next)) {
        for (int i = 0; i < SLOTS; i++) {
            og_pages_slot *slot = &b->slots[i];
            uintptr_t start = atomic_load(&slot->start);
            /* The same start again: the end is of that range, not of one
             * that took the slot meanwhile. */
            if (start <= address && address < atomic_load(&slot->end) &&
                atomic_load(&slot->start) == start) {
                return slot;
            }
        }
    }
    return NULL;
}

static void
pass_on(guard *g, int number, siginfo_t *info, void *context)
{
    uintptr_t address = (uintptr_t)info->si_addr;
    bool again = atomic_exchange(&g->passed_on, address) == address;
    int repeats = again ? atomic_fetch_add(&g->repeats, 1) : 0;
    const earlier *known = atomic_load(&g->before);
    const struct sigaction *before = known == NULL ? NULL : &known->action;
    atomic_store(&g->repeats, again ? repeats + 1 : 0);
    /* Handlers that pass on to each other would do so for ever. */
    bool ends = repeats > MOST_REPEATS || before == NULL ||
                (before->sa_flags & SA_SIGINFO) == 0;
    if (!ends) {
        before->sa_sigaction(number, info, context);
    }
    else if (before != NULL && repeats <= MOST_REPEATS &&
             before->sa_handler != SIG_DFL && before->sa_handler != SIG_IGN) {
        before->sa_handler(number);
    }
    else if (before == NULL || before->sa_handler != SIG_IGN ||
             info->si_code > 0) {
        signal(number, SIG_DFL);
        if (info->si_code <= 0) {
            raise(number); /* nothing will fault again */
        }
    }
}

static void
on_bus_error(int number, siginfo_t *info, void *context)
{
    const int saved = errno;
    guard *g = atomic_load(&published);
    uintptr_t address = (uintptr_t)info->si_addr;
    bool fault = info->si_code == BUS_ADRERR;
    og_pages_slot *slot = fault ? slot_of(g, address) : NULL;
    bool mended = false;
    if (slot != NULL) {
        atomic_store(&slot->broken, true);
        atomic_store(&g->any_broken, true);
        void *page = (void *)(address / g->page * g->page);
        mended =
            mmap(page, g->page, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
    }
    /* faulthandler, where it was installed after us, puts us back and raises
     * the signal anew: the instruction that faulted will tell us more. */
    bool raised = info->si_code == SI_TKILL && info->si_pid == getpid();
    if (raised && !atomic_exchange(&g->forgiven, true)) {
        mended = true;
    }
    else if (!raised) {
        atomic_store(&g->forgiven, false);
    }
    if (!mended) {
        pass_on(g, number, info, context);
    }
    errno = saved;
}

static guard *
guard_get(void)
{
    guard *g = atomic_load(&published);
    if (g == NULL) {
        guard *made = calloc(1, sizeof *made);
        if (made == NULL) {
            return NULL;
        }
        made->page = og_pages_size();
        if (atomic_compare_exchange_strong(&published, &g, made)) {
            return made;
        }
        free(made); /* another thread was first: g is its */
    }
    return g;
}

/* Puts us first, whoever has come since. */
static int
install(guard *g)
{
    struct sigaction now, ours = {0};
    if (sigaction(SIGBUS, NULL, &now) != 0) {
        return errno;
    }
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_bus_error) {
        return 0;
    }
    earlier *before = malloc(sizeof *before);
    if (before == NULL) {
        return ENOMEM;
    }
    *before = (earlier){now, atomic_load(&g->before)};
    atomic_store(&g->before, before);
    ours.sa_sigaction = on_bus_error;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    sigemptyset(&ours.sa_mask);
    return sigaction(SIGBUS, &ours, NULL) == 0 ? 0 : errno;
}

static og_pages_slot *
take_slot(guard *g)
{
    for (block *b = &g->first; b != NULL;) {
        for (int i = 0; i < SLOTS; i++) {
            uintptr_t none = 0;
            if (atomic_compare_exchange_strong(&b->slots[i].start, &none,
                                               UINTPTR_MAX)) {
                return &b->slots[i];
            }
        }
        block *next = atomic_load(&b->next);
        if (next == NULL) {
            block *made = calloc(1, sizeof *made);
            if (made == NULL) {
                return NULL;
            }
            if (atomic_compare_exchange_strong(&b->next, &next, made)) {
                next = made;
            }
            else {
                free(made);
            }
        }
        b = next;
    }
    return NULL;
}

struct og_pages_slot *
og_pages_guard(char *start, size_t length)
{
    guard *g = guard_get();
    og_pages_slot *slot = NULL;
    if (g != NULL && install(g) == 0 && (slot = take_slot(g)) != NULL) {
        atomic_store(&slot->broken, false);
        atomic_store(&slot->end, (uintptr_t)start + length);
        atomic_store(&slot->start, (uintptr_t)start);
    }
    return slot;
}

void
og_pages_unguard(struct og_pages_slot *slot)
{
    atomic_store(&slot->end, 0);
    atomic_store(&slot->start, 0);
}

bool
og_pages_slot_broken(const struct og_pages_slot *slot)
{
    return atomic_load(&slot->broken);
}

bool
og_pages_any_broken(void)
{
    guard *g = atomic_load(&published);
    return g != NULL && atomic_load(&g->any_broken);
}

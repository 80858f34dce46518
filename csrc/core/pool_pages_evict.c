/* Giving pages back without losing a write.
 *
 * Between the look at which pages are changed and the call that drops them
 * another thread may write: MADV_DONTNEED would throw its page away. So pages
 * are not dropped where they lie. mremap with MREMAP_DONTUNMAP takes them, in
 * one step, to a place nobody else knows; from then on the old place shows the
 * file. What turns out, over there, to differ from the file was written late,
 * and goes into the file too, or back to where it was if the file must not be
 * written. Where such a page was written yet again at the old place meanwhile,
 * both are put together element by element.
 *
 * What remains: a thread that, without holding the model, changes one page
 * twice in those microseconds and computes the second value from the first
 * may compute it from the value before, and a second value that is the one
 * before may be taken for none. Where the kernel has no such mremap
 * (before 5.13), a write between the last look and the drop is lost. */
#define _GNU_SOURCE
#include "core/pool_pages.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

/* --- writing changed pages ----------------------------------------------- */

typedef struct writing {
    const og_pages *pages;
    int fd;
    og_pages_span span;
    int64_t written;
} writing;

/* Bytes of the file in the run: its last page may go beyond the end. */
static size_t
size_in_file(const og_pages *pages, int64_t offset, size_t size)
{
    int64_t left = pages->offset + (int64_t)pages->nbytes - offset;
    return left < (int64_t)size ? (size_t)left : size;
}

static int
write_run(void *context, char *start, char *end)
{
    writing *w = context;
    int64_t offset = w->span.offset + (start - w->span.start);
    size_t size = size_in_file(w->pages, offset, (size_t)(end - start));
    int failed = og_pages_pwrite(w->fd, start, size, offset);
    w->written += failed == 0 ? end - start : 0;
    return failed == EFAULT ? ESTALE : failed; /* gone with the file's end */
}

/* The lock is held. held may be NULL. */
static int
write_changed(const og_pages *pages, const og_pages_scan *scan, int fd,
              og_pages_span span, int64_t *written, int64_t *held)
{
    writing w = {pages, fd, span, 0};
    int failed = og_pages_each_changed(scan, span, write_run, &w, held);
    *written += w.written;
    return failed;
}

/* Our own writing never changes the size: who did that is to be seen. */
static void
stamp_again(og_pages *pages)
{
    og_pages_stamp now;
    if (og_pages_stamp_of(pages->fd, &now) == 0 &&
        now.size == pages->stamp.size) {
        pages->stamp = now;
    }
}

/* --- pages that were written late ---------------------------------------- */

typedef struct settling {
    const og_pages *pages;
    const og_pages_scan *scan; /* of the file that the pages are of by now */
    og_pages_span away;        /* where the pages are now */
    char *home;                /* where everybody sees them */
    char *before;              /* room for a page: what the file had */
    bool writes;               /* else the file is left as it is */
    bool unscanned; /* pages are looked at that may not be in memory */
    struct og_pages_slot *slot; /* guards away; NULL without memory */
    int64_t written;
    int failed; /* the first error; the scan goes on */
} settling;

static int
note_changed(void *context, char *start, char *end)
{
    (void)start;
    (void)end;
    *(bool *)context = true;
    return 0;
}

static bool
is_changed(const settling *s, char *page, int64_t offset)
{
    bool changed = false;
    og_pages_span one = {page, page + og_pages_size(), offset};
    return og_pages_each_changed(s->scan, one, note_changed, &changed, NULL) !=
               0 ||
           changed;
}

/* One word of home as it is to be: elements that are late and that home has
 * as they were before. Never a part of an element: what home was given since
 * may have a byte or two in common with what was before. */
static void
take_late(const og_pages *pages, char *home, const char *late,
          const char *before, size_t count)
{
    const size_t grain = pages->grain;
    for (size_t i = 0; i < count; i += grain) {
        const size_t size = count - i < grain ? count - i : grain;
        if (before == NULL || (memcmp(late + i, before + i, size) != 0 &&
                               memcmp(home + i, before + i, size) == 0)) {
            memcpy(home + i, late + i, size);
        }
    }
}

/* What page changed of before (NULL: all of it) goes to home, except where
 * home was changed since. By whole words, as whoever writes home does so now:
 * what it puts between our look and our write must not be overwritten. */
static void
put_together(const og_pages *pages, char *home, const char *page,
             const char *before, size_t size)
{
    for (size_t at = 0; at < size; at += sizeof(uint64_t)) {
        _Atomic(uint64_t) *word = (_Atomic(uint64_t) *)(void *)(home + at);
        const size_t left = size - at;
        const size_t count = left < sizeof *word ? left : sizeof *word;
        uint64_t seen = atomic_load(word), wanted = seen;
        do {
            char bytes[sizeof seen];
            memcpy(bytes, &seen, sizeof seen);
            take_late(pages, bytes, page + at,
                      before == NULL ? NULL : before + at, count);
            memcpy(&wanted, bytes, sizeof wanted);
        } while (wanted != seen &&
                 !atomic_compare_exchange_weak(word, &seen, wanted));
    }
}

/* Returns when every page fault at home that had begun has ended: one of them
 * may have copied the page of the file as it was before it was written. Any
 * change of the mapping waits for them; this one is taken back at once. */
static void
wait_for_faults(const settling *s)
{
    size_t length = (size_t)(s->away.end - s->away.start);
    (void)madvise(s->home, length, MADV_RANDOM);
    (void)madvise(s->home, length, MADV_NORMAL);
}

/* Whether the page went with the end of the file: so do private pages, and to
 * read what is left of them is SIGBUS. All that come after it went as well. */
static bool
is_lost(const settling *s, const char *page)
{
    (void)*(const volatile char *)page;
    return s->slot != NULL && og_pages_slot_broken(s->slot);
}

/* One page over there against the file; differing, it goes into the file, or
 * stays in memory, as changed. */
static void
settle_page(settling *s, char *page)
{
    int64_t from = page - s->away.start, offset = s->away.offset + from;
    size_t size = size_in_file(s->pages, offset, og_pages_size());
    ssize_t got = pread(s->scan->file, s->before, size, (off_t)offset);
    const char *before = got == (ssize_t)size ? s->before : NULL;
    if (before != NULL && memcmp(before, page, size) == 0) {
        return;
    }
    int failed = before != NULL ? 0 : got < 0 ? errno : ESTALE;
    bool lost = (before == NULL && s->unscanned) || is_lost(s, page);
    if (lost && failed == 0) {
        failed = ESTALE;
    }
    if (failed == 0 && s->writes) {
        failed = og_pages_pwrite(s->scan->file, page, size, offset);
        s->written += failed == 0 ? (int64_t)og_pages_size() : 0;
    }
    if (s->failed == 0) {
        s->failed = failed;
    }
    if (lost) {
        return;
    }
    char *home = s->home == NULL ? NULL : s->home + from;
    bool in_file = failed == 0 && s->writes;
    if (home != NULL && in_file) {
        wait_for_faults(s);
    }
    if (home != NULL && (!in_file || is_changed(s, home, offset))) {
        put_together(s->pages, home, page, before, size);
    }
}

static int
settle_run(void *context, char *start, char *end)
{
    settling *s = context;
    for (char *page = start; page < end; page += og_pages_size()) {
        settle_page(s, page);
    }
    return 0;
}

/* before is room for a page. written: NULL where the file must not be; else
 * the lock is held. */
static int
settle(const og_pages *pages, const og_pages_scan *scan, og_pages_span away,
       char *home, char *before, int64_t *written)
{
    settling s = {.pages = pages,
                  .scan = scan,
                  .away = away,
                  .home = home,
                  .before = before,
                  .writes = written != NULL};
    s.slot = home == NULL
                 ? pages->slot
                 : og_pages_guard(away.start, (size_t)(away.end - away.start));
    if (og_pages_each_changed(scan, away, settle_run, &s, NULL) != 0) {
        /* Without memory, say. They are nowhere else by now. */
        s.unscanned = true;
        (void)settle_run(&s, away.start, away.end);
    }
    if (home != NULL && s.slot != NULL) {
        og_pages_unguard(s.slot);
    }
    if (written != NULL) {
        *written += s.written;
    }
    return s.failed;
}

/* --- giving back --------------------------------------------------------- */

/* The pages without their place: it shows the file from now on. */
static int
take_away(const og_pages *pages, og_pages_span span, og_pages_span *away,
          void **whole, size_t *size)
{
    size_t length = (size_t)(span.end - span.start);
    /* Comparing reads pages that are not there: where no guard watches. */
    if (pages->method == OG_PAGES_COMPARE) {
        return ENOSYS;
    }
    char *at = og_pages_reserve(length, span.start, whole, size);
    if (at == NULL) {
        return ENOMEM;
    }
    char *moved = mremap(span.start, length, length,
                         MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, at);
    if (moved == MAP_FAILED) {
        int failed = errno;
        munmap(*whole, *size);
        return failed;
    }
    *away = (og_pages_span){moved, moved + length, span.offset};
    return 0;
}

static int
drop(og_pages_span span)
{
    size_t length = (size_t)(span.end - span.start);
    return length > 0 && madvise(span.start, length, MADV_DONTNEED) != 0
               ? errno
               : 0;
}

typedef struct dropping {
    const og_pages *pages;
    const og_pages_scan *scan;
    og_pages_span left; /* neither dropped nor kept yet */
    char *before;
} dropping;

/* Pages up to end, none of which was changed when they were looked at. */
static int
drop_until(dropping *d, char *end)
{
    og_pages_span away, run = {d->left.start, end, d->left.offset};
    void *whole = NULL;
    size_t size = 0;
    d->left.start = end;
    d->left.offset += end - run.start;
    if (run.start == end) {
        return 0;
    }
    if (take_away(d->pages, run, &away, &whole, &size) != 0) {
        return drop(run);
    }
    int failed = settle(d->pages, d->scan, away, run.start, d->before, NULL);
    munmap(whole, size);
    return failed;
}

static int
drop_before(void *context, char *start, char *end)
{
    dropping *d = context;
    int failed = drop_until(d, start);
    d->left.start = end;
    d->left.offset += end - start;
    return failed;
}

/* The file must not be written: what is changed stays where it is. */
static int
drop_unchanged(const og_pages *pages, const og_pages_scan *scan,
               og_pages_span span, char *before)
{
    dropping d = {pages, scan, span, before};
    int failed = og_pages_each_changed(scan, span, drop_before, &d, NULL);
    return failed != 0 ? failed : drop_until(&d, span.end);
}

/* The lock is held, and what was changed is in the file. */
static int
drop_written(const og_pages *pages, const og_pages_scan *scan,
             og_pages_span span, char *before, int64_t *written)
{
    og_pages_span away;
    void *whole = NULL;
    size_t size = 0;
    if (take_away(pages, span, &away, &whole, &size) == 0) {
        int failed = settle(pages, scan, away, span.start, before, written);
        munmap(whole, size);
        return failed;
    }
    int failed = settle(pages, scan, span, NULL, before, written);
    return failed != 0 ? failed : drop(span);
}

static bool
is_as_stamped(const og_pages *pages)
{
    og_pages_stamp now;
    const og_pages_stamp *then = &pages->stamp;
    return og_pages_stamp_of(pages->fd, &now) == 0 && now.size == then->size &&
           now.seconds == then->seconds &&
           now.nanoseconds == then->nanoseconds && !og_pages_broken(pages);
}

/* Where the file may be written. The lock is held. */
static int
write_and_drop(og_pages *pages, const og_pages_scan *scan, og_pages_span span,
               char *before, int64_t *written)
{
    /* Writing into a file that was cut would make it whole again, with zeros
     * for what is lost. */
    if (!is_as_stamped(pages)) {
        return ESTALE;
    }
    int64_t held = 0;
    int failed = write_changed(pages, scan, pages->fd, span, written, &held);
    /* Nothing is there to be taken away: an absent model that is swept. */
    if (failed == 0 && held > 0) {
        failed = drop_written(pages, scan, span, before, written);
    }
    if (*written > 0 || failed != 0) { /* else others have written, if any */
        stamp_again(pages);
    }
    return failed;
}

int
og_pages_give_back(og_pages *pages, size_t start, size_t end, int64_t *written)
{
    og_pages_span span = og_pages_range(pages, start, end);
    og_pages_scan scan;
    *written = 0;
    if (og_pages_broken(pages)) {
        return ESTALE;
    }
    if (span.start == span.end) {
        return 0;
    }
    int failed = og_pages_scan_open(&scan, pages->method, pages->fd);
    if (failed != 0) {
        return failed;
    }
    char *before = malloc(og_pages_size());
    if (before == NULL) {
        failed = ENOMEM;
    }
    else if (!og_pages_writable(pages)) {
        failed = drop_unchanged(pages, &scan, span, before);
    }
    else {
        pthread_mutex_lock(&pages->lock);
        failed = write_and_drop(pages, &scan, span, before, written);
        pthread_mutex_unlock(&pages->lock);
    }
    free(before);
    og_pages_scan_close(&scan);
    return failed;
}

/* --- another file -------------------------------------------------------- */

/* The lock is held, and the scan's file has what was changed. A write by a
 * thread without the model between the two calls that change the map is lost.
 * Once the map shows the file there is no way back: what was written late and
 * does not go into the file stays in memory, and goes there another time. */
static int
show_file(og_pages *pages, const og_pages_scan *scan, og_pages_span span,
          char *before, int64_t *written)
{
    const size_t length = pages->length;
    og_pages_span away;
    void *whole = NULL;
    size_t size = 0;
    bool taken = take_away(pages, span, &away, &whole, &size) == 0;
    int failed = 0;
    if (og_pages_show(span.start, length, scan->file, pages->offset) == NULL) {
        failed = errno;
    }
    if (failed != 0 && taken) {
        (void)mremap(away.start, length, length, MREMAP_MAYMOVE | MREMAP_FIXED,
                     span.start);
    }
    else if (taken) {
        (void)settle(pages, scan, away, span.start, before, written);
    }
    if (whole != NULL && taken) {
        munmap(whole, size);
    }
    return failed;
}

/* The lock is held. */
static int
move_to(og_pages *pages, og_pages_scan *scan, int fd, char *before,
        int64_t *written)
{
    og_pages_span span = og_pages_range(pages, 0, pages->nbytes);
    int failed = is_as_stamped(pages) ? 0 : ESTALE;
    if (failed == 0) {
        failed = write_changed(pages, scan, fd, span, written, NULL);
    }
    scan->file = fd;
    if (failed == 0) {
        failed = show_file(pages, scan, span, before, written);
    }
    if (failed == 0 && dup3(fd, pages->fd, O_CLOEXEC) < 0) {
        failed = errno;
    }
    if (failed == 0) {
        pages->process = (int64_t)getpid();
        (void)og_pages_stamp_of(fd, &pages->stamp);
    }
    return failed;
}

int
og_pages_move(og_pages *pages, int fd, int64_t *written)
{
    og_pages_scan scan;
    *written = 0;
    if (pages->borrowed || og_pages_broken(pages)) {
        return pages->borrowed ? EROFS : ESTALE;
    }
    int failed = og_pages_scan_open(&scan, pages->method, pages->fd);
    if (failed != 0) {
        return failed;
    }
    char *before = malloc(og_pages_size());
    if (before == NULL) {
        og_pages_scan_close(&scan);
        return ENOMEM;
    }
    if (pages->process != (int64_t)getpid()) {
        pthread_mutex_init(&pages->lock, NULL); /* perhaps copied locked */
    }
    pthread_mutex_lock(&pages->lock);
    failed = move_to(pages, &scan, fd, before, written);
    pthread_mutex_unlock(&pages->lock);
    free(before);
    og_pages_scan_close(&scan);
    return failed;
}

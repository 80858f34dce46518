/* Which pages of a private map were copied on write, asked in three ways. */
#define _GNU_SOURCE
#include "core/pool_pages.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

/* From linux/fs.h of 6.7, which the build machine need not have. */
typedef struct scan_region {
    uint64_t start, end, categories;
} scan_region;

typedef struct scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t inverted, mask, any_of, returned;
} scan_arg;

#define SCAN_COMMAND _IOWR('f', 16, scan_arg)

enum {
    IS_FILE = 1 << 2,
    IS_PRESENT = 1 << 3,
    IS_SWAPPED = 1 << 4,
    REGIONS = 64,
    ENTRIES = 512,
    COMPARED = 16,
};

/* Bits of an entry of /proc/self/pagemap. */
#define ENTRY_PRESENT (UINT64_C(1) << 63)
#define ENTRY_SWAPPED (UINT64_C(1) << 62)
#define ENTRY_FILE (UINT64_C(1) << 61)

int
og_pages_scan_open(og_pages_scan *scan, og_pages_method method, int file)
{
    *scan = (og_pages_scan){method, file, -1};
    if (method != OG_PAGES_COMPARE) {
        scan->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    }
    return method != OG_PAGES_COMPARE && scan->pagemap < 0 ? errno : 0;
}

void
og_pages_scan_close(og_pages_scan *scan)
{
    if (scan->pagemap >= 0) {
        close(scan->pagemap);
    }
    scan->pagemap = -1;
}

/* One answer of the kernel: which of its runs were changed, and how many bytes
 * all are. */
static int
visit_regions(const scan_region *regions, int count, og_pages_visit visit,
              void *context, int64_t *held)
{
    int failed = 0;
    for (int i = 0; i < count && failed == 0; i++) {
        char *start = (char *)(uintptr_t)regions[i].start;
        char *end = (char *)(uintptr_t)regions[i].end;
        if (held != NULL) {
            *held += end - start;
        }
        if (visit != NULL && (regions[i].categories & IS_FILE) == 0) {
            failed = visit(context, start, end);
        }
    }
    return failed;
}

/* visit is told of what was copied on write. Without held only that is asked
 * for. */
static int
scan_regions(int fd, og_pages_span span, og_pages_visit visit, void *context,
             int64_t *held)
{
    /* Set, because memcheck does not know that this ioctl writes there. */
    scan_region regions[REGIONS] = {{0}};
    scan_arg arg = {
        .size = sizeof arg,
        .start = (uint64_t)(uintptr_t)span.start,
        .end = (uint64_t)(uintptr_t)span.end,
        .vec = (uint64_t)(uintptr_t)regions,
        .vec_len = REGIONS,
        .inverted = held == NULL ? IS_FILE : 0,
        .mask = held == NULL ? IS_FILE : 0,
        .any_of = IS_PRESENT | IS_SWAPPED,
        .returned = IS_PRESENT | IS_SWAPPED | (visit == NULL ? 0 : IS_FILE),
    };
    int failed = 0;
    while (failed == 0 && arg.start < arg.end) {
        int found = ioctl(fd, SCAN_COMMAND, &arg);
        if (found < 0) {
            failed = errno == EINTR ? 0 : errno;
            continue;
        }
        failed = visit_regions(regions, found, visit, context, held);
        arg.start = arg.walk_end;
    }
    return failed;
}

static int
visit_entries(const uint64_t *entries, size_t count, char *at,
              og_pages_visit visit, void *context, int64_t *held)
{
    const size_t page = og_pages_size();
    int failed = 0;
    for (size_t i = 0; i < count && failed == 0; i++, at += page) {
        bool here = (entries[i] & (ENTRY_PRESENT | ENTRY_SWAPPED)) != 0;
        if (here && held != NULL) {
            *held += (int64_t)page;
        }
        if (here && visit != NULL && (entries[i] & ENTRY_FILE) == 0) {
            failed = visit(context, at, at + page);
        }
    }
    return failed;
}

static int
scan_entries(int fd, og_pages_span span, og_pages_visit visit, void *context,
             int64_t *held)
{
    uint64_t entries[ENTRIES];
    const size_t page = og_pages_size();
    int failed = 0;
    char *at = span.start;
    while (failed == 0 && at < span.end) {
        size_t count = (size_t)(span.end - at) / page;
        count = count < ENTRIES ? count : ENTRIES;
        off_t from = (off_t)((uintptr_t)at / page * sizeof *entries);
        ssize_t got = pread(fd, entries, count * sizeof *entries, from);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got < (ssize_t)sizeof *entries) {
            failed = got < 0 ? errno : EIO;
            break;
        }
        count = (size_t)got / sizeof *entries;
        failed = visit_entries(entries, count, at, visit, context, held);
        at += count * page;
    }
    return failed;
}

/* Reads the pages in: the last resort, where there is no /proc. */
static int
scan_bytes(int fd, og_pages_span span, og_pages_visit visit, void *context)
{
    const size_t page = og_pages_size();
    char buffer[COMPARED * 4096];
    const size_t step = page < sizeof buffer ? page : sizeof buffer;
    int failed = 0;
    for (char *at = span.start; failed == 0 && at < span.end; at += page) {
        bool same = true;
        for (size_t done = 0; same && failed == 0 && done < page;
             done += step) {
            off_t from = span.offset + (at - span.start) + (off_t)done;
            ssize_t got = pread(fd, buffer, step, from);
            if (got < 0) {
                failed = errno;
            }
            else if (done == 0 && got == 0) {
                failed = ESTALE;
            }
            else {
                same = memcmp(buffer, at + done, (size_t)got) == 0;
            }
        }
        if (failed == 0 && !same) {
            failed = visit(context, at, at + page);
        }
    }
    return failed;
}

int
og_pages_each_changed(const og_pages_scan *scan, og_pages_span span,
                      og_pages_visit visit, void *context, int64_t *held)
{
    if (held != NULL) {
        *held = scan->method == OG_PAGES_COMPARE ? span.end - span.start : 0;
    }
    switch (scan->method) {
        case OG_PAGES_SCAN:
            return scan_regions(scan->pagemap, span, visit, context, held);
        case OG_PAGES_PAGEMAP:
            return scan_entries(scan->pagemap, span, visit, context, held);
        default:
            return scan_bytes(scan->file, span, visit, context);
    }
}

static int
add_bytes(void *context, char *start, char *end)
{
    *(int64_t *)context += end - start;
    return 0;
}

int
og_pages_changed(const og_pages *pages, size_t start, size_t end,
                 int64_t *changed)
{
    og_pages_scan scan;
    int64_t sum = 0;
    int failed = og_pages_scan_open(&scan, pages->method, pages->fd);
    if (failed == 0) {
        failed = og_pages_each_changed(
            &scan, og_pages_range(pages, start, end), add_bytes, &sum, NULL);
    }
    og_pages_scan_close(&scan);
    if (failed == 0) {
        *changed = sum;
    }
    return failed;
}

int
og_pages_resident(const og_pages *pages, size_t start, size_t end,
                  int64_t *resident)
{
    og_pages_span span = og_pages_range(pages, start, end);
    og_pages_scan scan;
    int64_t sum = 0;
    int failed = og_pages_scan_open(&scan, OG_PAGES_SCAN, -1);
    if (failed == 0) {
        failed = scan_regions(scan.pagemap, span, NULL, NULL, &sum);
        if (failed != 0) {
            sum = 0;
            failed = scan_entries(scan.pagemap, span, NULL, NULL, &sum);
        }
    }
    og_pages_scan_close(&scan);
    *resident = failed == 0 ? sum : span.end - span.start;
    return 0;
}

/* Whether the method tells a page that was read from one that was written. */
static bool
tells(og_pages_method method, og_pages_span two)
{
    const int64_t page = (int64_t)og_pages_size();
    volatile char *bytes = two.start;
    int64_t before = 0, after = 0, held = 0;
    char seen = (char)(bytes[0] + bytes[page]);
    og_pages_scan scan;
    int failed = og_pages_scan_open(&scan, method, -1);
    if (failed == 0) {
        failed = og_pages_each_changed(&scan, two, add_bytes, &before, &held);
    }
    bytes[0] = (char)(seen + 1);
    if (failed == 0) {
        failed = og_pages_each_changed(&scan, two, add_bytes, &after, NULL);
    }
    og_pages_scan_close(&scan);
    return failed == 0 && before == 0 && after == page && held == 2 * page;
}

og_pages_method
og_pages_method_best(void)
{
    const size_t size = 2 * og_pages_size();
    int fd = memfd_create("opguard-pages", MFD_CLOEXEC);
    og_pages_method best = OG_PAGES_SCAN;
    while (fd >= 0 && best < OG_PAGES_COMPARE) {
        char *map = MAP_FAILED;
        if (ftruncate(fd, (off_t)size) == 0) {
            map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
        }
        bool good = map != MAP_FAILED &&
                    tells(best, (og_pages_span){map, map + size, 0});
        if (map != MAP_FAILED) {
            munmap(map, size);
        }
        if (good) {
            close(fd);
            return best;
        }
        best++;
    }
    if (fd >= 0) {
        close(fd);
    }
    return OG_PAGES_COMPARE;
}

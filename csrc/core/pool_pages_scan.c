/* Which pages of a private map were copied on write, asked in three ways. The
 * descriptor of /proc/self/pagemap is opened for each question: one that was
 * opened before a fork tells of the parent. */
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

static int
open_pagemap(int *fd)
{
    *fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    return *fd < 0 ? errno : 0;
}

/* changed: copied on write; else all that is in memory. */
static int
scan_regions(og_pages_span span, bool changed, og_pages_visit visit,
             void *context)
{
    /* Set, because memcheck does not know that this ioctl writes there. */
    scan_region regions[REGIONS] = {{0}};
    scan_arg arg = {
        .size = sizeof arg,
        .start = (uint64_t)(uintptr_t)span.start,
        .end = (uint64_t)(uintptr_t)span.end,
        .vec = (uint64_t)(uintptr_t)regions,
        .vec_len = REGIONS,
        .inverted = changed ? IS_FILE : 0,
        .mask = changed ? IS_FILE : 0,
        .any_of = IS_PRESENT | IS_SWAPPED,
        .returned = IS_PRESENT | IS_SWAPPED,
    };
    int fd = -1, failed = open_pagemap(&fd);
    while (failed == 0 && arg.start < arg.end) {
        int found = ioctl(fd, SCAN_COMMAND, &arg);
        if (found < 0) {
            failed = errno == EINTR ? 0 : errno;
            continue;
        }
        for (int i = 0; i < found && failed == 0; i++) {
            failed = visit(context, (char *)(uintptr_t)regions[i].start,
                           (char *)(uintptr_t)regions[i].end);
        }
        arg.start = arg.walk_end;
    }
    if (fd >= 0) {
        close(fd);
    }
    return failed;
}

static bool
is_wanted(uint64_t entry, bool changed)
{
    bool held = (entry & (ENTRY_PRESENT | ENTRY_SWAPPED)) != 0;
    return held && !(changed && (entry & ENTRY_FILE) != 0);
}

static int
scan_entries(og_pages_span span, bool changed, og_pages_visit visit,
             void *context)
{
    uint64_t entries[ENTRIES];
    const size_t page = og_pages_size();
    int fd = -1, failed = open_pagemap(&fd);
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
        for (size_t i = 0; i < count && failed == 0; i++) {
            if (is_wanted(entries[i], changed)) {
                failed = visit(context, at + i * page, at + (i + 1) * page);
            }
        }
        at += count * page;
    }
    if (fd >= 0) {
        close(fd);
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
og_pages_each_changed(og_pages_method method, int fd, og_pages_span span,
                      og_pages_visit visit, void *context)
{
    switch (method) {
        case OG_PAGES_SCAN:
            return scan_regions(span, true, visit, context);
        case OG_PAGES_PAGEMAP:
            return scan_entries(span, true, visit, context);
        default:
            return scan_bytes(fd, span, visit, context);
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
    int64_t sum = 0;
    int failed = og_pages_each_changed(pages->method, pages->fd,
                                       og_pages_range(pages, start, end),
                                       add_bytes, &sum);
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
    int64_t sum = 0;
    int failed = scan_regions(span, false, add_bytes, &sum);
    if (failed != 0) {
        sum = 0;
        failed = scan_entries(span, false, add_bytes, &sum);
    }
    *resident = failed == 0 ? sum : span.end - span.start;
    return 0;
}

/* Whether the method tells a page that was read from one that was written. */
static bool
tells(og_pages_method method, og_pages_span two)
{
    const size_t page = og_pages_size();
    volatile char *bytes = two.start;
    int64_t before = 0, after = 0;
    char seen = (char)(bytes[0] + bytes[page]);
    if (og_pages_each_changed(method, -1, two, add_bytes, &before) != 0) {
        return false;
    }
    bytes[0] = (char)(seen + 1);
    return og_pages_each_changed(method, -1, two, add_bytes, &after) == 0 &&
           before == 0 && after == (int64_t)page;
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

/* Weights that lie in a file and are mapped privately: which pages were copied
 * on write, written back to the file, given back to the kernel.
 *
 * A map stays at its address from og_pages_map to og_pages_unmap: whoever
 * reads it while its pages are away gets them from the file again, and sees
 * the same bytes. What was written through the map lives in pages of this
 * process alone until og_pages_give_back puts it into the file.
 *
 * Functions that can fail return 0 or an errno, because every failure here is
 * the kernel's; ESTALE says that the file is not as it was mapped. They hold
 * no lock of Python's and may run in any thread; og_pages_unmap alone needs
 * that nobody uses the map any more. */
#ifndef OPGUARD_CORE_POOL_PAGES_H
#define OPGUARD_CORE_POOL_PAGES_H

#include <pthread.h>

#include "core/base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How changed pages are found; each finds every page that was changed. */
typedef enum og_pages_method {
    OG_PAGES_SCAN,    /* the ioctl PAGEMAP_SCAN, Linux 6.7 */
    OG_PAGES_PAGEMAP, /* /proc/self/pagemap, any Linux */
    OG_PAGES_COMPARE, /* the bytes themselves, against the file */
} og_pages_method;

/* What of a file's status changes when somebody else writes it. */
typedef struct og_pages_stamp {
    uint64_t device, inode;
    int64_t size, seconds, nanoseconds;
} og_pages_stamp;

struct og_pages_slot;

/* Filled by og_pages_map; callers read, and write what says so. */
typedef struct og_pages {
    char *start;    /* NULL: not mapped */
    size_t nbytes;  /* as asked for */
    size_t length;  /* nbytes in whole pages */
    int fd;         /* our own duplicate */
    int64_t offset; /* of start in the file, a multiple of the page size */
    bool borrowed;  /* somebody else's map of somebody else's file */
    size_t grain;   /* bytes that are written as one, 1 to 8; may be set */
    og_pages_method method;
    int64_t process; /* a forked child never writes the file */
    og_pages_stamp stamp;
    struct og_pages_slot *slot;
    pthread_mutex_t lock; /* of the stamp, and held while the file changes */
} og_pages;

/* A part of the address space that shows the file from offset on. */
typedef struct og_pages_span {
    char *start, *end;
    int64_t offset;
} og_pages_span;

/* Told of one run of whole pages; other than 0 ends the scan with it. */
typedef int (*og_pages_visit)(void *context, char *start, char *end);

/* What questions of one call are asked with: opened once, so that none fails
 * halfway for want of a descriptor. */
typedef struct og_pages_scan {
    og_pages_method method;
    int file;    /* borrowed: what OG_PAGES_COMPARE compares with */
    int pagemap; /* of this process; -1 where the method needs none */
} og_pages_scan;

/* Maps nbytes > 0 of fd from offset on, private, readable and writable. With
 * an address the map is there already and stays its owner's: nothing is
 * written to its file, and unmapping leaves it. Guards it against SIGBUS. */
int
og_pages_map(og_pages *pages, int fd, int64_t offset, size_t nbytes,
             void *address);

void
og_pages_unmap(og_pages *pages);

/* The best method that is seen to work here. */
og_pages_method
og_pages_method_best(void);

/* ESTALE where the file is another one, shorter, or written by others. */
int
og_pages_check(og_pages *pages);

/* Bytes were asked for that the file no longer has; zeros lie there now. */
bool
og_pages_broken(const og_pages *pages);

/* Ranges are bytes from the start of the map, taken in whole pages. */

/* Brings the pages in; ESTALE where the file is too short by now, EIO where it
 * is as it was and cannot be read. */
int
og_pages_populate(og_pages *pages, size_t start, size_t end);

/* Bytes in pages that were copied on write. */
int
og_pages_changed(const og_pages *pages, size_t start, size_t end,
                 int64_t *changed);

/* Bytes in pages this process holds; all where the kernel does not tell. */
int
og_pages_resident(const og_pages *pages, size_t start, size_t end,
                  int64_t *resident);

/* Puts changed pages into the file, then gives all pages back. What a thread
 * writes meanwhile is not lost: see pool_pages_evict.c. After an error what
 * was changed is still in memory. Where the file must not be written changed
 * pages stay, and the others go. */
int
og_pages_give_back(og_pages *pages, size_t start, size_t end,
                   int64_t *written);

/* Goes over to another file, a copy of the present one from the same offset
 * on: changed pages are written there, and the map shows it from then on. For
 * after a fork, when the child still reads the first file. */
int
og_pages_move(og_pages *pages, int fd, int64_t *written);

/* --- between the files of pool_pages ------------------------------------- */

size_t
og_pages_size(void);

og_pages_span
og_pages_range(const og_pages *pages, size_t start, size_t end);

/* To be closed by the same thread before it returns to its caller: in a forked
 * child the descriptor would tell of the parent. */
int
og_pages_scan_open(og_pages_scan *scan, og_pages_method method, int file);

void
og_pages_scan_close(og_pages_scan *scan);

/* Runs of pages that were copied on write, in order. held, which may be NULL,
 * gets the bytes of all pages in memory, or of the whole span where the method
 * cannot tell. */
int
og_pages_each_changed(const og_pages_scan *scan, og_pages_span span,
                      og_pages_visit visit, void *context, int64_t *held);

/* Whether the file may be written: not borrowed, and in the process that made
 * the map. */
bool
og_pages_writable(const og_pages *pages);

/* All bytes, however often the kernel stops; 0 or errno. */
int
og_pages_pwrite(int fd, const char *data, size_t size, int64_t offset);

int
og_pages_stamp_of(int fd, og_pages_stamp *stamp);

/* length bytes of address space that agree with `like` up to 2 MiB, so that
 * the kernel moves whole page tables; NULL without room. whole and size are
 * what to unmap. */
char *
og_pages_reserve(size_t length, const char *like, void **whole, size_t *size);

/* The file, privately, at this address, whatever was there; NULL with errno.
 */
char *
og_pages_show(char *at, size_t length, int fd, int64_t offset);

/* The guard of a range against SIGBUS; NULL without memory. Process-wide. */
struct og_pages_slot *
og_pages_guard(char *start, size_t length);

void
og_pages_unguard(struct og_pages_slot *slot);

bool
og_pages_slot_broken(const struct og_pages_slot *slot);

/* Whether any map of this process was ever found broken: what is cheap to ask
 * at the end of each lease. */
bool
og_pages_any_broken(void);

#ifdef __cplusplus
}
#endif
#endif

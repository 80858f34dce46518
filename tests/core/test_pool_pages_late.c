/* What happens to a private map in the middle of a call: writes that come
 * late, files that are cut or made longer, memory and descriptors that run
 * out. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "pages.h"

/* Calls of the library's that come here first: a write just before its pages
 * are taken away, after which no descriptor is left, and no answer. */
static char *late;
static bool no_descriptors;
static int resized = -1; /* a file that somebody makes so long meanwhile */
static size_t resized_to;
static int cut = -1;   /* a file that is cut as a page meets it */
static int unread = 0; /* what bringing pages in fails with */

ssize_t
pwrite(int fd, const void *from, size_t size, off_t to)
{
    if (fd == cut) {
        CHECK(ftruncate(fd, (off_t)page) == 0);
    }
    return (ssize_t)syscall(SYS_pwrite64, fd, from, size, to);
}

ssize_t
pread(int fd, void *to, size_t size, off_t from)
{
    if (fd == cut) {
        CHECK(ftruncate(fd, (off_t)page) == 0);
    }
    return (ssize_t)syscall(SYS_pread64, fd, to, size, from);
}

int
madvise(void *start, size_t size, int advice)
{
    if (unread != 0) {
        errno = unread;
        return -1;
    }
    return (int)syscall(SYS_madvise, start, size, advice);
}

int
ioctl(int fd, unsigned long request, ...)
{
    va_list more;
    va_start(more, request);
    void *argument = va_arg(more, void *);
    va_end(more);
    if (no_descriptors) {
        errno = ENOMEM;
        return -1;
    }
    return (int)syscall(SYS_ioctl, fd, request, argument);
}

void *
mremap(void *old, size_t size, size_t wanted, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    void *at = va_arg(more, void *);
    va_end(more);
    if (late != NULL) {
        *late = 'L';
        no_descriptors = cut < 0;
    }
    if (resized >= 0) {
        CHECK(ftruncate(resized, (off_t)resized_to) == 0);
    }
    return (void *)syscall(SYS_mremap, old, size, wanted, flags, at);
}

int
open(const char *path, int flags, ...)
{
    if (no_descriptors) {
        errno = EMFILE;
        return -1;
    }
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, 0);
}

/* What was written late is not lost where nobody can say any more which pages
 * were changed. */
static void
check_late_and_blind(bool borrowed)
{
    int fd = new_file(PAGES * page);
    og_pages own = mapped(fd, PAGES * page, OG_PAGES_SCAN), theirs = own;
    if (borrowed) {
        CHECK(og_pages_map(&theirs, fd, 0, PAGES * page, own.start) == 0);
        theirs.method = OG_PAGES_SCAN;
    }
    int64_t written = 0;
    CHECK(og_pages_populate(&own, 0, PAGES * page) == 0);
    late = own.start + 3 * page;
    (void)og_pages_give_back(&theirs, 0, PAGES * page, &written);
    late = NULL;
    no_descriptors = false;
    CHECK(own.start[3 * page] == 'L');
    CHECK(own.start[4 * page] == FILL);
    if (borrowed) {
        og_pages_unmap(&theirs);
    }
    og_pages_unmap(&own);
    close(fd);
}

/* After a fork, a late write and no room for it in the new file. */
static void
check_move_to_full(void)
{
    size_t size = PAGES * page;
    int fd = new_file(size), copy = new_file(size);
    int64_t written = 0;
    struct rlimit kept, none;
    og_pages pages = mapped(fd, size, OG_PAGES_SCAN);
    CHECK(getrlimit(RLIMIT_FSIZE, &kept) == 0);
    none = (struct rlimit){0, kept.rlim_max};
    CHECK(setrlimit(RLIMIT_FSIZE, &none) == 0);
    late = pages.start + 3 * page;
    (void)og_pages_move(&pages, copy, &written);
    late = NULL;
    no_descriptors = false;
    CHECK(setrlimit(RLIMIT_FSIZE, &kept) == 0);
    CHECK(og_pages_give_back(&pages, 0, size, &written) == 0);
    CHECK(pages.start[3 * page] == 'L' && pages.start[4 * page] == FILL);
    og_pages_unmap(&pages);
    close(fd);
    close(copy);
}

/* Somebody writes the file as pages are given back, of which one was written
 * late perhaps: it is not taken for our own writing. */
static void
check_resized_meanwhile(size_t size, bool is_late)
{
    int fd = new_file(PAGES * page);
    og_pages pages = mapped(fd, PAGES * page, OG_PAGES_SCAN);
    CHECK(og_pages_populate(&pages, 0, PAGES * page) == 0);
    resized = fd;
    resized_to = size;
    late = is_late ? pages.start + 3 * page : NULL;
    int end = is_late && size < PAGES * page ? ESTALE : 0;
    CHECK(og_pages_give_back(&pages, 0, PAGES * page, &(int64_t){0}) == end);
    resized = -1;
    late = NULL;
    no_descriptors = false;
    CHECK(og_pages_check(&pages) == ESTALE);
    og_pages_unmap(&pages);
    close(fd);
}

/* A late page goes with the end of its file, wherever it lies: whoever is at
 * it then does not end the program. */
static void
check_cut_under_late(bool borrowed)
{
    int fd = new_file(PAGES * page);
    og_pages own = mapped(fd, PAGES * page, OG_PAGES_SCAN), theirs = own;
    if (borrowed) {
        CHECK(og_pages_map(&theirs, fd, 0, PAGES * page, own.start) == 0);
        theirs.method = OG_PAGES_SCAN;
    }
    CHECK(og_pages_populate(&own, 0, PAGES * page) == 0);
    late = own.start + 3 * page;
    cut = theirs.fd;
    CHECK(og_pages_give_back(&theirs, 0, PAGES * page, &(int64_t){0}) ==
          ESTALE);
    late = NULL;
    cut = -1;
    CHECK(og_pages_check(&theirs) == ESTALE);
    CHECK(lseek(fd, 0, SEEK_END) == (off_t)page);
    if (borrowed) {
        og_pages_unmap(&theirs);
    }
    og_pages_unmap(&own);
    close(fd);
}

/* The same of pages that were changed before. */
static void
check_cut_under_changed(void)
{
    int fd = new_file(PAGES * page);
    og_pages pages = mapped(fd, PAGES * page, OG_PAGES_SCAN);
    pages.start[3 * page] = 'C';
    cut = pages.fd;
    CHECK(og_pages_give_back(&pages, 0, PAGES * page, &(int64_t){0}) ==
          ESTALE);
    cut = -1;
    CHECK(og_pages_check(&pages) == ESTALE);
    og_pages_unmap(&pages);
    close(fd);
}

/* A disk that cannot be read is not a file that was cut. */
static void
check_bad_disk(void)
{
    int fd = new_file(PAGES * page);
    og_pages pages = mapped(fd, PAGES * page, OG_PAGES_SCAN);
    unread = EFAULT;
    CHECK(og_pages_populate(&pages, 0, PAGES * page) == EIO);
    CHECK(ftruncate(fd, (off_t)page) == 0);
    CHECK(og_pages_populate(&pages, 0, PAGES * page) == ESTALE);
    unread = 0;
    og_pages_unmap(&pages);
    close(fd);
}

int
main(void)
{
    page = og_pages_size();
    signal(SIGXFSZ, SIG_IGN);
    check_late_and_blind(false);
    check_late_and_blind(true);
    check_move_to_full();
    check_resized_meanwhile((PAGES + 1) * page, false);
    check_resized_meanwhile((PAGES + 1) * page, true);
    check_resized_meanwhile(page, true);
    check_cut_under_late(false);
    check_cut_under_late(true);
    check_cut_under_changed();
    check_bad_disk();
    return failures != 0;
}

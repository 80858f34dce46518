/* Private maps of files: made, checked against the file, brought in, written
 * back. How pages are given back is in pool_pages_evict.c. */
#define _GNU_SOURCE
#include "core/pool_pages.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Linux 5.14; older headers lack it. */
#define POPULATE_READ 22
/* What one page table of the lowest level covers. */
#define TABLE ((size_t)2 << 20)

size_t
og_pages_size(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

og_pages_span
og_pages_range(const og_pages *pages, size_t start, size_t end)
{
    const size_t page = og_pages_size();
    end = end < pages->nbytes ? end : pages->nbytes;
    start = start < end ? start / page * page : end;
    end = start < end ? (end + page - 1) / page * page : end;
    return (og_pages_span){pages->start + start, pages->start + end,
                           pages->offset + (int64_t)start};
}

int
og_pages_stamp_of(int fd, og_pages_stamp *stamp)
{
    struct stat status;
    if (fstat(fd, &status) != 0) {
        return errno;
    }
    *stamp = (og_pages_stamp){
        .device = (uint64_t)status.st_dev,
        .inode = (uint64_t)status.st_ino,
        .size = (int64_t)status.st_size,
        .seconds = (int64_t)status.st_mtim.tv_sec,
        .nanoseconds = (int64_t)status.st_mtim.tv_nsec,
    };
    return 0;
}

bool
og_pages_writable(const og_pages *pages)
{
    return !pages->borrowed && pages->process == (int64_t)getpid();
}

bool
og_pages_broken(const og_pages *pages)
{
    return og_pages_slot_broken(pages->slot);
}

char *
og_pages_reserve(size_t length, const char *like, void **whole, size_t *size)
{
    *size = length + (length >= TABLE ? TABLE : 0);
    char *area = mmap(NULL, *size, PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED) {
        return NULL;
    }
    *whole = area;
    size_t gap = ((uintptr_t)like - (uintptr_t)area) % TABLE;
    return *size > length ? area + gap : area;
}

char *
og_pages_show(char *at, size_t length, int fd, int64_t offset)
{
    char *made =
        mmap(at, length, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, (off_t)offset);
    if (made == MAP_FAILED) {
        return NULL;
    }
    /* What the page cache has lost is read in pieces that one entry of a page
     * table maps; read page by page it would be mapped so ever after. */
    if (length >= TABLE) {
        (void)madvise(made, length, MADV_HUGEPAGE);
    }
    return made;
}

/* A fresh place for the map, which agrees with the file up to 2 MiB, so that
 * one entry of a page table can hold all of a large folio. What was reserved
 * around it goes at once. */
static int
map_file(og_pages *pages)
{
    void *whole = NULL;
    size_t size = 0, length = pages->length;
    const char *like = (const char *)(uintptr_t)pages->offset;
    char *at = og_pages_reserve(length, like, &whole, &size);
    if (at == NULL) {
        return ENOMEM;
    }
    char *made = og_pages_show(at, length, pages->fd, pages->offset);
    if (made == NULL) {
        int failed = errno;
        munmap(whole, size);
        return failed;
    }
    char *first = whole;
    if (made > first) {
        munmap(first, (size_t)(made - first));
    }
    if (made + length < first + size) {
        munmap(made + length, (size_t)(first + size - (made + length)));
    }
    pages->start = made;
    return 0;
}

int
og_pages_map(og_pages *pages, int fd, int64_t offset, size_t nbytes,
             void *address)
{
    const size_t page = og_pages_size();
    *pages = (og_pages){.fd = -1, .process = (int64_t)getpid(), .grain = 1};
    if (nbytes == 0 || nbytes > PTRDIFF_MAX - TABLE || offset < 0 ||
        (size_t)offset % page != 0 || (uintptr_t)address % page != 0) {
        return EINVAL;
    }
    pages->nbytes = nbytes;
    pages->length = (nbytes + page - 1) / page * page;
    pages->offset = offset;
    pages->borrowed = address != NULL;
    pages->method = og_pages_method_best();
    pages->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    int failed = pages->fd < 0 ? errno : 0;
    if (failed == 0) {
        failed = og_pages_stamp_of(pages->fd, &pages->stamp);
    }
    /* A map that goes beyond the end of its file would be a trap. */
    if (failed == 0 && pages->stamp.size - offset < (int64_t)nbytes) {
        failed = ESTALE;
    }
    pages->start = address;
    if (failed == 0 && address == NULL) {
        failed = map_file(pages);
    }
    if (failed == 0) {
        pages->slot = og_pages_guard(pages->start, pages->length);
        failed = pages->slot == NULL ? ENOMEM : 0;
    }
    pthread_mutex_init(&pages->lock, NULL);
    if (failed != 0) {
        og_pages_unmap(pages);
    }
    return failed;
}

void
og_pages_unmap(og_pages *pages)
{
    if (pages->slot != NULL) {
        og_pages_unguard(pages->slot);
    }
    if (pages->start != NULL && !pages->borrowed) {
        munmap(pages->start, pages->length);
    }
    if (pages->fd >= 0) {
        close(pages->fd);
    }
    pages->slot = NULL;
    pages->start = NULL;
    pages->fd = -1;
}

int
og_pages_check(og_pages *pages)
{
    og_pages_stamp now = {0};
    /* A fork may have copied the lock as another thread held it. */
    bool ours = og_pages_writable(pages);
    if (ours) {
        pthread_mutex_lock(&pages->lock);
    }
    const og_pages_stamp then = pages->stamp;
    int failed = og_pages_stamp_of(pages->fd, &now);
    if (ours) {
        pthread_mutex_unlock(&pages->lock);
    }
    if (failed != 0) {
        return failed;
    }
    bool same = now.device == then.device && now.inode == then.inode &&
                now.size == then.size && now.seconds == then.seconds &&
                now.nanoseconds == then.nanoseconds;
    return same && !og_pages_broken(pages) ? 0 : ESTALE;
}

int
og_pages_populate(og_pages *pages, size_t start, size_t end)
{
    og_pages_span span = og_pages_range(pages, start, end);
    size_t length = (size_t)(span.end - span.start);
    int failed = 0;
    do {
        failed = length > 0 && madvise(span.start, length, POPULATE_READ) != 0
                     ? errno
                     : 0;
    } while (failed == EINTR || failed == EAGAIN);
    if (failed == EINVAL) { /* before Linux 5.14: by touching */
        failed = 0;
        for (volatile char *at = span.start; at < span.end;
             at += og_pages_size()) {
            (void)*at;
        }
    }
    if (failed == EFAULT) { /* the file is too short, or the disk is bad */
        failed = og_pages_check(pages) == 0 ? EIO : ESTALE;
    }
    return og_pages_broken(pages) ? ESTALE : failed;
}

int
og_pages_pwrite(int fd, const char *data, size_t size, int64_t offset)
{
    while (size > 0) {
        ssize_t put = pwrite(fd, data, size, (off_t)offset);
        if (put < 0 && errno != EINTR) {
            return errno;
        }
        if (put == 0) {
            return ENOSPC;
        }
        if (put > 0) {
            data += put;
            size -= (size_t)put;
            offset += put;
        }
    }
    return 0;
}

/* Private maps: the three ways to find changed pages agree, what was changed
 * comes back after the pages were given back, also under writers that do not
 * wait, and a file that is cut is a status and not the end of the program. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "pages.h"

static const og_pages_method all[] = {OG_PAGES_SCAN, OG_PAGES_PAGEMAP,
                                      OG_PAGES_COMPARE};

static int64_t
changed(const og_pages *pages)
{
    int64_t bytes = -1;
    CHECK(og_pages_changed(pages, 0, pages->nbytes, &bytes) == 0);
    return bytes;
}

static int64_t
resident(const og_pages *pages)
{
    int64_t bytes = -1;
    CHECK(og_pages_resident(pages, 0, pages->nbytes, &bytes) == 0);
    return bytes;
}

static void
check_methods_agree(void)
{
    size_t size = PAGES * page;
    int fd = new_file(size);
    for (int round = 0; round < 20; round++) {
        og_pages pages = mapped(fd, size, OG_PAGES_SCAN);
        int64_t expected = 0;
        for (int i = 0; i < PAGES; i++) {
            if (rand() % 3 == 0) {
                pages.start[(size_t)i * page + (size_t)rand() % page] ^= 1;
                expected += (int64_t)page;
            }
        }
        for (int i = 0; i < 3; i++) {
            pages.method = all[i];
            CHECK(changed(&pages) == expected);
        }
        og_pages_unmap(&pages);
    }
    close(fd);
}

static void
check_round_trip(og_pages_method method)
{
    size_t size = PAGES * page + 5;
    int fd = new_file(size);
    int64_t written = -1;
    og_pages pages = mapped(fd, size, method);
    CHECK(og_pages_check(&pages) == 0);
    CHECK(og_pages_populate(&pages, 0, size) == 0);
    CHECK(resident(&pages) == (int64_t)pages.length);
    pages.start[0] = 1;
    pages.start[size - 1] = 2;
    pages.start[3 * page] = 3;
    /* Of a part: the others stay. */
    CHECK(og_pages_give_back(&pages, 0, page, &written) == 0);
    CHECK(written == (int64_t)page && changed(&pages) == 2 * (int64_t)page);
    CHECK(og_pages_give_back(&pages, 0, size, &written) == 0);
    CHECK(written == 2 * (int64_t)page);
    CHECK(method == OG_PAGES_COMPARE || resident(&pages) == 0);
    CHECK(pages.start[0] == 1 && pages.start[3 * page] == 3);
    CHECK(pages.start[size - 1] == 2 && pages.start[1] == FILL);
    CHECK(og_pages_check(&pages) == 0);
    CHECK(lseek(fd, 0, SEEK_END) == (off_t)size);
    og_pages_unmap(&pages);
    close(fd);
}

static void
check_arguments(void)
{
    int fd = new_file(2 * page);
    og_pages pages;
    CHECK(og_pages_map(&pages, fd, 0, 0, NULL) == EINVAL);
    CHECK(og_pages_map(&pages, fd, 1, page, NULL) == EINVAL);
    CHECK(og_pages_map(&pages, fd, 0, 3 * page, NULL) == ESTALE);
    CHECK(og_pages_map(&pages, -1, 0, page, NULL) == EBADF);
    pages = mapped(fd, 2 * page, OG_PAGES_SCAN);
    int64_t written = -1;
    CHECK(og_pages_give_back(&pages, page, page, &written) == 0);
    CHECK(og_pages_give_back(&pages, 9 * page, 10 * page, &written) == 0);
    og_pages_unmap(&pages);
    close(fd);
}

/* --- threads that do not wait -------------------------------------------- */

typedef struct counting {
    char *start;
    _Atomic(bool) stop;
    int64_t counts[PAGES];
} counting;

/* Writes ascending numbers, each page by this thread alone. */
static void *
count(void *context)
{
    counting *c = context;
    while (!atomic_load(&c->stop)) {
        for (int i = 0; i < PAGES; i++) {
            int64_t next = ++c->counts[i];
            memcpy(c->start + (size_t)i * page + 8 * (next % 16), &next, 8);
        }
    }
    return NULL;
}

static void
check_stray_writer(og_pages_method method)
{
    size_t size = PAGES * page;
    int fd = new_file(size);
    og_pages pages = mapped(fd, size, method);
    pages.grain = sizeof(int64_t);
    counting c = {.start = pages.start};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, count, &c) == 0);
    for (int i = 0; i < 400; i++) {
        int64_t written = -1;
        CHECK(og_pages_give_back(&pages, 0, size, &written) == 0);
    }
    atomic_store(&c.stop, true);
    pthread_join(thread, NULL);
    CHECK(og_pages_give_back(&pages, 0, size, &(int64_t){0}) == 0);
    int lost = 0;
    for (int i = 0; i < PAGES; i++) {
        for (int64_t k = 0; k < 16; k++) {
            int64_t found = 0, last = c.counts[i] - (c.counts[i] - k) % 16;
            memcpy(&found, pages.start + (size_t)i * page + 8 * k, 8);
            lost += c.counts[i] >= 32 && found != last;
        }
    }
    CHECK(lost == 0);
    og_pages_unmap(&pages);
    close(fd);
}

/* --- files that others write --------------------------------------------- */

static void
check_cut(void)
{
    size_t size = PAGES * page;
    int fd = new_file(size);
    int64_t written = -1;
    og_pages pages = mapped(fd, size, OG_PAGES_SCAN);
    og_pages other = mapped(fd, size, OG_PAGES_SCAN);
    CHECK(og_pages_populate(&pages, 0, size) == 0);
    pages.start[0] = 7;
    CHECK(ftruncate(fd, (off_t)(size / 2)) == 0);
    CHECK(!og_pages_broken(&pages));
    CHECK(og_pages_check(&pages) == ESTALE);
    CHECK(og_pages_give_back(&pages, 0, size, &written) == ESTALE);
    CHECK(lseek(fd, 0, SEEK_END) == (off_t)(size / 2));
    CHECK(pages.start[0] == 7 && pages.start[1] == FILL);
    volatile char *at = pages.start;
    CHECK(at[size - 1] == 0);
    at[size - page] = 9;
    CHECK(at[size - page] == 9);
    CHECK(og_pages_broken(&pages) && !og_pages_broken(&other));
    CHECK(og_pages_populate(&other, 0, size) == ESTALE);
    CHECK(og_pages_give_back(&pages, 0, size, &written) == ESTALE);
    og_pages_unmap(&pages);
    og_pages_unmap(&other);
    close(fd);
}

static _Atomic(int) passed;

static void
mend(int number, siginfo_t *info, void *context)
{
    (void)number;
    (void)context;
    atomic_fetch_add(&passed, 1);
    mmap((void *)((uintptr_t)info->si_addr / page * page), page,
         PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
         0);
}

/* A bus error of somebody else's goes to the handler that was there before. */
static void
check_passed_on(void)
{
    struct sigaction theirs = {.sa_flags = SA_SIGINFO}, kept;
    theirs.sa_sigaction = mend;
    CHECK(sigaction(SIGBUS, &theirs, &kept) == 0);
    int fd = new_file(2 * page);
    og_pages pages = mapped(fd, page, OG_PAGES_SCAN); /* puts us first again */
    volatile char *map = mmap(NULL, 2 * page, PROT_READ, MAP_PRIVATE, fd, 0);
    CHECK(ftruncate(fd, (off_t)page) == 0);
    CHECK(map[page] == 0 && atomic_load(&passed) == 1);
    CHECK(!og_pages_broken(&pages));
    munmap((void *)(uintptr_t)map, 2 * page);
    og_pages_unmap(&pages);
    close(fd);
    CHECK(sigaction(SIGBUS, &kept, NULL) == 0);
}

static void
check_full(void)
{
    size_t size = PAGES * page;
    int fd = new_file(size);
    int64_t written = -1;
    og_pages pages = mapped(fd, size, OG_PAGES_SCAN);
    memset(pages.start, 3, size);
    struct rlimit kept, small;
    CHECK(getrlimit(RLIMIT_FSIZE, &kept) == 0);
    small = (struct rlimit){size / 2, kept.rlim_max};
    signal(SIGXFSZ, SIG_IGN);
    CHECK(setrlimit(RLIMIT_FSIZE, &small) == 0);
    CHECK(og_pages_give_back(&pages, 0, size, &written) == EFBIG);
    CHECK(setrlimit(RLIMIT_FSIZE, &kept) == 0);
    CHECK(pages.start[0] == 3 && pages.start[size - 1] == 3);
    CHECK(changed(&pages) == (int64_t)size);
    CHECK(og_pages_give_back(&pages, 0, size, &written) == 0);
    CHECK(resident(&pages) == 0 && pages.start[size - 1] == 3);
    og_pages_unmap(&pages);
    close(fd);
}

/* --- forks --------------------------------------------------------------- */

static void
check_fork(void)
{
    size_t size = PAGES * page;
    int fd = new_file(size), copy = new_file(size);
    int64_t written = -1;
    og_pages pages = mapped(fd, size, OG_PAGES_SCAN);
    int pipes[2];
    CHECK(pipe(pipes) == 0);
    pid_t child = fork();
    if (child == 0) {
        char byte = 0;
        failures = 0;
        pages.start[page] = 2;
        CHECK(!og_pages_writable(&pages));
        CHECK(og_pages_give_back(&pages, 0, size, &written) == 0);
        CHECK(written == 0 && resident(&pages) == (int64_t)page);
        CHECK(read(pipes[0], &byte, 1) == 1); /* the parent has moved */
        CHECK(pages.start[0] == FILL && pages.start[page] == 2);
        CHECK(og_pages_check(&pages) == 0);
        _exit(failures != 0);
    }
    pages.start[0] = 1;
    CHECK(og_pages_move(&pages, copy, &written) == 0);
    CHECK(written == (int64_t)page && resident(&pages) == 0);
    CHECK(pages.start[0] == 1 && pages.start[page] == FILL);
    pages.start[2 * page] = 4;
    CHECK(og_pages_give_back(&pages, 0, size, &written) == 0);
    CHECK(pages.start[2 * page] == 4 && og_pages_check(&pages) == 0);
    CHECK(write(pipes[1], "x", 1) == 1);
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    og_pages_unmap(&pages);
    close(fd);
    close(copy);
}

/* More maps at once than one block of the guard has room for. */
static void
check_many(void)
{
    enum { MANY = 200 };
    int fd = new_file(page);
    og_pages maps[MANY];
    for (int i = 0; i < MANY; i++) {
        maps[i] = mapped(fd, page, OG_PAGES_SCAN);
    }
    CHECK(ftruncate(fd, 0) == 0);
    volatile char *last = maps[MANY - 1].start;
    CHECK(last[0] == 0 && og_pages_broken(&maps[MANY - 1]));
    CHECK(!og_pages_broken(&maps[0]));
    for (int i = 0; i < MANY; i++) {
        og_pages_unmap(&maps[i]);
    }
    close(fd);
}

int
main(void)
{
    page = og_pages_size();
    CHECK(og_pages_method_best() <= OG_PAGES_PAGEMAP);
    check_methods_agree();
    check_arguments();
    for (int i = 0; i < 3; i++) {
        check_round_trip(all[i]);
    }
    check_stray_writer(OG_PAGES_SCAN);
    check_stray_writer(OG_PAGES_PAGEMAP);
    check_cut();
    check_passed_on();
    check_full();
    check_fork();
    check_many();
    return failures != 0;
}

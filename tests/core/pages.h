/* A file of pages and its map, for the programs about private maps. */
#ifndef OPGUARD_TESTS_CORE_PAGES_H
#define OPGUARD_TESTS_CORE_PAGES_H

#include "core/pool_pages.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"

enum { PAGES = 64, FILL = 0x5A };

static size_t page;

static int
new_file(size_t size)
{
    char name[] = "/var/tmp/opguard-test-XXXXXX";
    int fd = mkstemp(name);
    unlink(name);
    char *data = malloc(size);
    memset(data, FILL, size);
    CHECK(write(fd, data, size) == (ssize_t)size);
    free(data);
    return fd;
}

static og_pages
mapped(int fd, size_t size, og_pages_method method)
{
    og_pages pages;
    CHECK(og_pages_map(&pages, fd, 0, size, NULL) == 0);
    pages.method = method;
    return pages;
}

#endif

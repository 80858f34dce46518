/* The least a C test needs: CHECK counts what fails and says where. */
#ifndef OPGUARD_TESTS_CHECK_H
#define OPGUARD_TESTS_CHECK_H

#include <stdio.h>

static int failures;

#define CHECK(what)                                                           \
    do {                                                                      \
        if (!(what)) {                                                        \
            failures++;                                                       \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what);        \
        }                                                                     \
    } while (0)

#endif

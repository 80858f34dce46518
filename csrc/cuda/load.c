/* Opens libopguard_cuda.so beside this library at the first CUDA use and
 * publishes its functions once. */
#define _GNU_SOURCE /* dladdr */
#include "cuda/opguard_cuda.h"

#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* NULL until a load has succeeded; then never changed or freed. */
static _Atomic(const og_cuda_table *) published;

static og_status
library_path(char *path, size_t size, og_error *err)
{
    Dl_info info;
    if (dladdr((void *)&published, &info) == 0 || info.dli_fname == NULL) {
        return og_fail(err, OG_NOT_FOUND,
                       "dladdr cannot tell where "
                       "libopguard_ops.so lies");
    }
    const char *slash = strrchr(info.dli_fname, '/');
    int folder = slash == NULL ? 0 : (int)(slash - info.dli_fname) + 1;
    int length =
        snprintf(path, size, "%.*slibopguard_cuda.so", folder, info.dli_fname);
    if (length < 0 || (size_t)length >= size) {
        return og_fail(err, OG_NOT_FOUND,
                       "the path of libopguard_cuda.so "
                       "is too long");
    }
    return OG_OK;
}

/* dlsym gives object pointers; ISO C has no cast from them to functions. */
static bool
fill(og_cuda_table *table, void *library)
{
#define OG_CUDA_FIND(name)                                     \
    *(void **)&table->name = dlsym(library, "og_cuda_" #name); \
    if (table->name == NULL) {                                 \
        return false;                                          \
    }
    OG_CUDA_FUNCTIONS(OG_CUDA_FIND)
#undef OG_CUDA_FIND
    return true;
}

static og_status
load(og_error *err)
{
    char path[4096];
    og_status status = library_path(path, sizeof path, err);
    if (status != OG_OK) {
        return status;
    }
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        return og_fail(err, OG_NOT_FOUND,
                       "expected opguard's CUDA kernels: %.160s; build with "
                       "nvcc on PATH",
                       dlerror());
    }
    og_cuda_table *table = calloc(1, sizeof *table);
    if (table == NULL) {
        dlclose(library);
        return og_fail(err, OG_NO_MEMORY, "no memory for the CUDA table");
    }
    const og_cuda_table *expected = NULL;
    if (!fill(table, library)) {
        status =
            og_fail(err, OG_NOT_FOUND,
                    "%.160s is not of this opguard; install it again", path);
    }
    else if (atomic_compare_exchange_strong(&published, &expected, table)) {
        return OG_OK;
    }
    /* Another thread was first, or the library is a stranger. */
    free(table);
    dlclose(library);
    return status;
}

og_status
og_cuda_functions(const og_cuda_table **table, og_error *err)
{
    *table = atomic_load(&published);
    if (OG_LIKELY(*table != NULL)) {
        return OG_OK;
    }
    og_status status = load(err);
    *table = atomic_load(&published);
    return status;
}

og_status
og_cuda_ready(og_error *err)
{
    const og_cuda_table *table;
    return og_cuda_functions(&table, err);
}

og_status
og_cuda_outcome(const og_cuda_table *table, int code, const char *what,
                og_error *err)
{
    return OG_LIKELY(code == 0) ? OG_OK
                                : og_fail(err, OG_CUDA_FAILED, "%s: %.160s",
                                          what, table->error_text(code));
}

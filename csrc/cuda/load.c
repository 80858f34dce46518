/* Opens libopguard_cuda.so beside this library at the first CUDA use and
 * publishes its functions once. */
#define _GNU_SOURCE /* dladdr */
#include "cuda/opguard_cuda.h"

#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct cuda_table {
    int (*launch_pack)(void *, const og_cuda_span *, size_t, int, void *);
    const char *(*error_text)(int);
} cuda_table;

/* NULL until a load has succeeded; then never changed or freed. */
static _Atomic(const cuda_table *) published;

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
    cuda_table *table = calloc(1, sizeof *table);
    if (table == NULL) {
        dlclose(library);
        return og_fail(err, OG_NO_MEMORY, "no memory for the CUDA table");
    }
    *(void **)&table->launch_pack = dlsym(library, "og_cuda_launch_pack");
    *(void **)&table->error_text = dlsym(library, "og_cuda_error_text");
    const cuda_table *expected = NULL;
    if (table->launch_pack == NULL || table->error_text == NULL) {
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
og_cuda_ready(og_error *err)
{
    return atomic_load(&published) != NULL ? OG_OK : load(err);
}

og_status
og_cuda_pack(void *packed, const og_cuda_span *spans, size_t count, int device,
             void *stream, og_error *err)
{
    og_status status = og_cuda_ready(err);
    if (status != OG_OK) {
        return status;
    }
    const cuda_table *table = atomic_load(&published);
    int code = table->launch_pack(packed, spans, count, device, stream);
    if (code != 0) {
        return og_fail(err, OG_CUDA_FAILED, "packing %zu leaves: %.160s",
                       count, table->error_text(code));
    }
    return OG_OK;
}

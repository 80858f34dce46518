/* What is looked up in libtorch at run time: functions newer than the floor,
 * and those that only a CUDA build has. */
#define _GNU_SOURCE /* RTLD_DEFAULT */
#include "torch/shim.h"

#include <dlfcn.h>

typedef const char *(*what_function)(void);
typedef OgShimCode (*stream_function)(int32_t, void **);

/* dlsym gives an object pointer; ISO C has no cast from it to a function. */
static void
find(const char *name, void *function)
{
    *(void **)function = dlsym(RTLD_DEFAULT, name);
}

og_status
og_shim_check(OgShimCode code, const char *what, og_error *err)
{
    if (OG_LIKELY(code == 0)) {
        return OG_OK;
    }
    what_function message = NULL;
    find("torch_exception_get_what_without_backtrace", &message);
    const char *text = message != NULL ? message() : NULL;
    return og_fail(err, OG_TORCH_FAILED, "%s failed in torch: %s", what,
                   text != NULL ? text : "this torch gives no reason");
}

og_status
og_shim_cuda_stream(int32_t device, void **stream, og_error *err)
{
    stream_function function = NULL;
    find("aoti_torch_get_current_cuda_stream", &function);
    if (function == NULL) {
        return og_fail(err, OG_NOT_FOUND,
                       "expected a torch with CUDA, this one has no "
                       "aoti_torch_get_current_cuda_stream");
    }
    return og_shim_check(function(device, stream), "current stream", err);
}

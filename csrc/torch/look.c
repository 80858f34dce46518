/* og_tensor_look: dimensions, dtype, device and memory of a tensor, for those
 * who have to make one like it before they call an op. */
#include "torch/look.h"

#include "torch/shim.h"

og_status
og_tensor_look(void *impl, og_look *look)
{
    /* An at::Tensor is one pointer, and a handle the address of one. */
    AtenTensorHandle handle = (AtenTensorHandle)(void *)&impl;
    og_look found;
    int64_t *sizes = NULL;
    if (aoti_torch_get_dim(handle, &found.ndim) != 0 ||
        aoti_torch_get_numel(handle, &found.numel) != 0 ||
        aoti_torch_get_sizes(handle, &sizes) != 0 ||
        aoti_torch_get_dtype(handle, &found.dtype) != 0 ||
        aoti_torch_get_device_type(handle, &found.device_type) != 0 ||
        torch_get_const_data_ptr(handle, &found.data) != 0) {
        return OG_TORCH_FAILED;
    }
    found.sizes = sizes;
    *look = found;
    return OG_OK;
}

/* A program without Python: loads libtorch and the ops library, packs two
 * tensors and takes them apart again, many times.
 *
 *     ops_program PATH_TO_libopguard_ops.so [ROUNDS]
 *
 * Prints the resident size before and after the rounds, in pages. */
#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "torch/opguard_ops.h"
#include "torch/shim.h"

/* Declared here, because the library itself calls no other op. */
OgShimCode
torch_call_dispatcher(const char *name, const char *overload,
                      StableIValue *stack, uint64_t version);

static AtenTensorHandle
filled(int64_t rows, int64_t columns, unsigned char byte)
{
    const int64_t sizes[2] = {rows, columns}, strides[2] = {columns, 1};
    AtenTensorHandle tensor = NULL;
    void *data = NULL;
    CHECK(aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_uint8(),
                                   aoti_torch_device_type_cpu(), 0,
                                   &tensor) == 0);
    CHECK(aoti_torch_get_data_ptr(tensor, &data) == 0);
    memset(data, byte, (size_t)(rows * columns));
    return tensor;
}

static StableListHandle
pair(AtenTensorHandle *first, AtenTensorHandle *second)
{
    StableListHandle list = NULL;
    *first = filled(3, 5, 0x11);
    *second = filled(2, 70, 0x22);
    CHECK(torch_new_list_reserve_size(2, &list) == 0);
    CHECK(torch_list_push_back(list, (StableIValue)(uintptr_t)*first) == 0);
    CHECK(torch_list_push_back(list, (StableIValue)(uintptr_t)*second) == 0);
    return list;
}

static void
check_leaf(StableListHandle list, size_t index, unsigned char byte,
           int64_t bytes)
{
    StableIValue element = 0;
    void *data = NULL;
    int64_t numel = 0;
    CHECK(torch_list_get_item(list, index, &element) == 0);
    AtenTensorHandle leaf = (AtenTensorHandle)(uintptr_t)element;
    CHECK(aoti_torch_get_data_ptr(leaf, &data) == 0);
    CHECK(aoti_torch_get_numel(leaf, &numel) == 0 && numel == bytes);
    for (int64_t i = 0; i < numel; i++) {
        CHECK(((unsigned char *)data)[i] == byte);
    }
    CHECK(aoti_torch_delete_tensor_object(leaf) == 0);
}

static void
round_trip(void)
{
    AtenTensorHandle first = NULL, second = NULL;
    StableIValue stack[2] = {0, 0};
    size_t count = 0;
    stack[0] = (StableIValue)(uintptr_t)pair(&first, &second);
    CHECK(torch_call_dispatcher("opguard::pack", "", stack, OG_TORCH_FLOOR) ==
          0);
    AtenTensorHandle packed = (AtenTensorHandle)(uintptr_t)stack[0];
    stack[0] = (StableIValue)(uintptr_t)packed;
    stack[1] = (StableIValue)(uintptr_t)pair(&first, &second);
    CHECK(torch_call_dispatcher("opguard::unpack", "", stack,
                                OG_TORCH_FLOOR) == 0);
    StableListHandle leaves = (StableListHandle)(uintptr_t)stack[0];
    CHECK(torch_list_size(leaves, &count) == 0 && count == 2);
    check_leaf(leaves, 0, 0x11, 15);
    check_leaf(leaves, 1, 0x22, 140);
    CHECK(torch_delete_list(leaves) == 0);
}

static long
resident_pages(void)
{
    long size = 0, resident = 0;
    FILE *statm = fopen("/proc/self/statm", "r");
    if (statm != NULL && fscanf(statm, "%ld %ld", &size, &resident) != 2) {
        resident = 0;
    }
    if (statm != NULL) {
        fclose(statm);
    }
    return resident;
}

int
main(int argc, char **argv)
{
    void *library = argc < 2 ? NULL : dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        fprintf(stderr, "%s\n", argc < 2 ? "expected a path" : dlerror());
        return 2;
    }
    const og_ops *(*table)(void) = NULL;
    og_status (*registered)(og_error *) = NULL;
    *(void **)&table = dlsym(library, "og_ops_table");
    *(void **)&registered = dlsym(library, "og_ops_registered");
    og_error err = {OG_OK, ""};
    if (table == NULL || registered == NULL || registered(&err) != OG_OK) {
        fprintf(stderr, "not registered: %s\n", err.message);
        return 3;
    }
    CHECK(table()->size >= sizeof(og_ops));
    CHECK(table()->cpu_isa() != NULL);
    int rounds = argc > 2 ? atoi(argv[2]) : 1;
    for (int i = 0; i < rounds / 4 + 1; i++) {
        round_trip();
    }
    long before = resident_pages();
    for (int i = 0; i < rounds; i++) {
        round_trip();
    }
    printf("%ld %ld\n", before, resident_pages());
    return failures != 0;
}

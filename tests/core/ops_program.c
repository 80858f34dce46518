/* A program without Python: loads libtorch and the ops library, packs two
 * tensors and takes them apart again, and flags a tensor, many times.
 *
 *     ops_program PATH_TO_libopguard_ops.so [ROUNDS]
 *
 * Prints the resident size before and after the rounds, in pages. */
#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "core/slots.h"
#include "torch/opguard_ops.h"
#include "torch/shim.h"

/* Declared here, because the library itself does not call them. */
OgShimCode
aoti_torch_new_tensor_handle(AtenTensorHandle from, AtenTensorHandle *to);
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

enum { KEY = 16 | OG_DEDUPE_UNIQUE << OG_KEY_DEDUPE_SHIFT };

/* (2, 3) float32: a NaN in the second sample. */
static AtenTensorHandle
with_nan(void)
{
    const int64_t sizes[2] = {2, 3}, strides[2] = {3, 1};
    const float values[6] = {0, 1, 2, 3, NAN, 5};
    AtenTensorHandle x = NULL;
    void *data = NULL;
    CHECK(aoti_torch_empty_strided(2, sizes, strides,
                                   aoti_torch_dtype_float32(),
                                   aoti_torch_device_type_cpu(), 0, &x) == 0);
    CHECK(aoti_torch_get_data_ptr(x, &data) == 0);
    memcpy(data, values, sizeof values);
    return x;
}

static AtenTensorHandle
another(AtenTensorHandle tensor)
{
    AtenTensorHandle more = NULL;
    CHECK(aoti_torch_new_tensor_handle(tensor, &more) == 0);
    return more;
}

/* check_new, merge with itself, find; the flags through the table too. */
static void
flags_round(const og_ops *table)
{
    uint16_t slots[4] = {0};
    int64_t used = 0;
    void *data = NULL;
    og_error err = {OG_OK, ""};
    StableIValue stack[4] = {(StableIValue)(uintptr_t)with_nan(), 5, 7, KEY};
    CHECK(torch_call_dispatcher("opguard::flags_check_new", "", stack,
                                OG_TORCH_FLOOR) == 0);
    AtenTensorHandle flags = (AtenTensorHandle)(uintptr_t)stack[0];
    void *impl = *(void **)flags;
    CHECK(table->flags_push(impl, NULL, impl, og_slot_make(6, 3, 2), KEY,
                            &err) == OG_OK);
    CHECK(table->flags_push(impl, NULL, impl, -1, KEY, &err) ==
          OG_BAD_ARGUMENT);
    CHECK(table->flags_read(impl, 1, slots, 4, &used, &err) == OG_OK);
    CHECK(used == 2 && slots[0] == og_slot_make(5, OG_CODE_NAN, 3) &&
          slots[1] == og_slot_make(6, 3, 2));
    CHECK(table->flags_read(impl, 2, slots, 4, &used, &err) == OG_BAD_BATCH);
    StableListHandle list = NULL;
    CHECK(torch_new_list_reserve_size(2, &list) == 0);
    for (int i = 0; i < 2; i++) {
        StableIValue one = (StableIValue)(uintptr_t)another(flags);
        CHECK(torch_list_push_back(list, one) == 0);
    }
    stack[0] = (StableIValue)(uintptr_t)list;
    stack[1] = KEY;
    CHECK(torch_call_dispatcher("opguard::flags_merge", "", stack,
                                OG_TORCH_FLOOR) == 0);
    stack[1] = OG_CODE_MASK;
    stack[2] = OG_CODE_NAN << OG_CODE_SHIFT;
    CHECK(torch_call_dispatcher("opguard::flags_find", "", stack,
                                OG_TORCH_FLOOR) == 0);
    AtenTensorHandle found = (AtenTensorHandle)(uintptr_t)stack[0];
    CHECK(aoti_torch_get_data_ptr(found, &data) == 0);
    CHECK(!((bool *)data)[0] && ((bool *)data)[1]);
    CHECK(aoti_torch_delete_tensor_object(found) == 0);
    CHECK(aoti_torch_delete_tensor_object(flags) == 0);
}

/* One sample may have any stride: it is nowhere multiplied. */
static void
single_sample(const og_ops *table)
{
    const int64_t far = (int64_t)1 << 62, near = 1;
    const int64_t sizes[2] = {1, 4}, strides[2] = {far, 1};
    AtenTensorHandle flags = NULL, column = NULL;
    void *data = NULL, *ids = NULL;
    og_error err = {OG_OK, ""};
    CHECK(aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_int64(),
                                   aoti_torch_device_type_cpu(), 0,
                                   &flags) == 0);
    CHECK(aoti_torch_empty_strided(1, &near, &far, aoti_torch_dtype_int64(),
                                   aoti_torch_device_type_cpu(), 0,
                                   &column) == 0);
    CHECK(aoti_torch_get_data_ptr(flags, &data) == 0);
    CHECK(aoti_torch_get_data_ptr(column, &ids) == 0);
    memset(data, 0, 32);
    *(int64_t *)ids = OG_CODE_INF;
    void *to = *(void **)flags, *codes = *(void **)column;
    CHECK(table->flags_push_codes(to, codes, to, 3, -1, 2, KEY, &err) ==
          OG_OK);
    CHECK(table->flags_index(codes, to, to, codes, 2, 4, KEY, &err) == OG_OK);
    CHECK(((uint16_t *)data)[0] == og_slot_make(3, OG_CODE_INF, 3));
    CHECK(((uint16_t *)data)[1] == og_slot_make(4, OG_CODE_OUT_OF_BOUNDS, 2));
    CHECK(*(int64_t *)ids == 1);
    CHECK(aoti_torch_delete_tensor_object(column) == 0);
    CHECK(aoti_torch_delete_tensor_object(flags) == 0);
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
    single_sample(table());
    int rounds = argc > 2 ? atoi(argv[2]) : 1;
    for (int i = 0; i < rounds / 4 + 1; i++) {
        round_trip();
        flags_round(table());
    }
    long before = resident_pages();
    for (int i = 0; i < rounds; i++) {
        round_trip();
        flags_round(table());
    }
    printf("%ld %ld\n", before, resident_pages());
    return failures != 0;
}

/* The flag ops by TensorImpl *, as og_ops_table offers them; what each takes
 * is said in opguard_ops.h. */
#ifndef OPGUARD_TORCH_FLAGS_TABLE_H
#define OPGUARD_TORCH_FLAGS_TABLE_H

#include "torch/opguard_ops.h"

og_status
og_table_flags_check(void *x, void *flags, void *out, int64_t location,
                     int64_t checks, int64_t key, og_error *err);
og_status
og_table_flags_index(void *ids, void *flags, void *out, void *clamped,
                     int64_t size, int64_t location, int64_t key,
                     og_error *err);
og_status
og_table_flags_push(void *flags, void *where, void *out, int64_t slot,
                    int64_t key, og_error *err);
og_status
og_table_flags_push_codes(void *flags, void *codes, void *out,
                          int64_t location, int64_t severity,
                          int64_t default_severity, int64_t key,
                          og_error *err);
og_status
og_table_flags_merge(void *const *flags, size_t count, void *out, int64_t key,
                     og_error *err);
og_status
og_table_flags_gather(void *flags, void *index, void *out, int64_t key,
                      og_error *err);
og_status
og_table_flags_query(void *flags, og_flags_what what, int64_t mask,
                     int64_t value, void *out, og_error *err);
og_status
og_table_flags_clear(void *flags, int64_t code, void *out, og_error *err);
og_status
og_table_flags_read(void *flags, int64_t row, uint16_t *slots,
                    int64_t capacity, int64_t *used, og_error *err);
og_status
og_table_flags_chain(void *const *impls, size_t tensors,
                     const og_flags_step *steps, size_t count, void *out,
                     og_error *err);

#endif

/* One call of the ops library that writes flags. */
#ifndef OPGUARD_PY_FLAGS_WORK_H
#define OPGUARD_PY_FLAGS_WORK_H

#include "py/detach_walk.h"
#include "py/flags_road.h"

/* Most flags that one merge takes the short road with. */
#define OG_FLAGS_MERGED 16

typedef enum og_flags_kind {
    OG_WORK_CHECK,
    OG_WORK_INDEX,
    OG_WORK_PUSH,
    OG_WORK_MERGE,
    OG_WORK_GATHER
} og_flags_kind;

/* Every tensor is a borrowed impl. */
typedef struct og_flags_work {
    og_flags_kind kind;
    void *inputs[OG_FLAGS_MERGED]; /* flags first, others only to merge */
    size_t count;
    void *other; /* x, ids, where or index */
    void *out;
    int64_t number; /* checks or size */
    int64_t place;  /* a location; a slot for a push */
    int64_t key;
    int64_t elements; /* how big it is */
} og_flags_work;

/* Lets go of the GIL when it is big. */
og_status
og_flags_run(og_state *state, const og_flags_work *work, og_error *err);

#endif

/* Payload. */
#include "py/sanitize_walk.h"

int
og_walk_payload(og_walk *walk, PyObject *exc)
{
    (void)walk;
    (void)exc;
    return 0;
}

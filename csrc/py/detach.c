#include "py/state.h"

const og_family og_detach_family = {.methods = NULL};

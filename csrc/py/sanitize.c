#include "py/state.h"

const og_family og_sanitize_family = {.methods = NULL};

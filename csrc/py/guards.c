#include "py/state.h"

const og_family og_guards_family = {.methods = NULL};

/* The family of files.c: what Python's os module does not offer. */
#ifndef OPGUARD_PY_FILES_H
#define OPGUARD_PY_FILES_H

#include "py/family.h"

extern const og_family og_files_family;

#endif

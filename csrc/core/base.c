/* The one way a function below the Python layer reports a failure. */
#include "core/base.h"

#include <stdarg.h>
#include <stdio.h>

og_status
og_fail(og_error *err, og_status status, const char *format, ...)
{
    if (err != NULL) {
        va_list args;
        va_start(args, format);
        err->status = status;
        vsnprintf(err->message, sizeof err->message, format, args);
        va_end(args);
    }
    return status;
}

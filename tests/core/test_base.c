/* og_fail: always ends its text, never writes past the buffer. */
#include "core/base.h"

#include <string.h>

#include "check.h"

int
main(void)
{
    og_error err = {OG_OK, ""};
    CHECK(og_fail(&err, OG_BAD_ARGUMENT, "leaf %d", 7) == OG_BAD_ARGUMENT);
    CHECK(err.status == OG_BAD_ARGUMENT);
    CHECK(strcmp(err.message, "leaf 7") == 0);

    char text[1000];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    CHECK(og_fail(&err, OG_TORCH_FAILED, "%s", text) == OG_TORCH_FAILED);
    CHECK(strlen(err.message) == sizeof err.message - 1);

    CHECK(og_fail(NULL, OG_NO_MEMORY, "%s", text) == OG_NO_MEMORY);
    CHECK(OG_OK == 0 && OG_NO_MEMORY < 0 && OG_NOT_FOUND < 0);
    return failures != 0;
}

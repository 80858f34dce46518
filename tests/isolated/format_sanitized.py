"""Formats one failure, sanitized or not, with every formatter people look at; prints the text.

format_sanitized.py raw|sanitized. A wrong ``tb_lasti`` can keep IPython's formatter busy for ever,
so the test gives this process a time limit.
"""

from __future__ import annotations

import asyncio
import io
import re
import sys
import tempfile
import traceback
from pathlib import Path

from IPython.core.ultratb import AutoFormattedTB
from rich.console import Console
from rich.traceback import Traceback

from opguard import _C

SOURCE = """
import contextlib

class Layer:
    def forward(self, value, *more, flag=True, **rest):
        cell = [value]
        def inner(by):
            return (cell[0] / by
                    + 1)
        if flag:
            try:
                return inner(0)
            except ZeroDivisionError as error:
                raise ValueError("wrapped",
                                 value) from error

def generate(layer):
    for item in [lambda: layer.forward(1, 2, key=3)]:
        yield item()

async def awaited(layer):
    async def deeper():
        return [x for x in generate(layer)]
    return await deeper()

class Late:
    value = 1
    def __getattr__(self, name):
        exec("raise KeyError(name)", {"name": name})
"""


def fail(space: dict[str, object]) -> None:
    try:
        asyncio.run(space["awaited"](space["Layer"]()))
    except ValueError as first:
        try:
            space["Late"]().nope
        except KeyError as second:
            raise ExceptionGroup("both", [first, second]) from first


def formatted(error: BaseException) -> str:
    found = (type(error), error, error.__traceback__)
    parts = ["".join(traceback.format_exception(error))]
    # IPython's own Docs mode stops at chained exceptions with an assertion.
    root = error.exceptions[0].__cause__
    for mode in ("Plain", "Context", "Verbose", "Minimal", "Docs"):
        shown = found if mode != "Docs" else (type(root), root, root.__traceback__)
        maker = AutoFormattedTB(mode=mode, theme_name="nocolor", tb_offset=0)
        text = maker.stb2text(maker.structured_traceback(*shown))
        parts.append(f"--- IPython {mode}\n{text if mode != 'Verbose' else len(text) > 0}")
    for locals_too in (False, True):
        out = io.StringIO()
        console = Console(file=out, width=100)
        console.print(Traceback.from_exception(*found, show_locals=locals_too))
        parts.append(f"--- rich\n{out.getvalue() if not locals_too else len(out.getvalue()) > 0}")
    return "\n".join(parts)


def main(kind: str) -> None:
    folder = Path(tempfile.mkdtemp())
    path = folder / "failing.py"
    path.write_text(SOURCE)
    space: dict[str, object] = {"__name__": "failing", "__file__": str(path)}
    exec(compile(SOURCE, str(path), "exec"), space)
    try:
        fail(space)
    except ExceptionGroup as error:
        caught = error
    if kind == "sanitized":
        _C.sanitize_exception(caught)
    text = formatted(caught).replace(str(folder), "FOLDER")
    # IPython writes the arguments of each function; an empty frame has none.
    print(re.sub(r"in ([\w.<>]+)\([^\n]*\)$", r"in \1()", text, flags=re.MULTILINE))


main(sys.argv[1])

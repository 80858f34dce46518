"""What a failing notebook cell leaves alive: prints one line of JSON, a name to a list of bools.

ipython_cells.py: no collector runs; the shell is a real one, without a terminal.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import weakref

from IPython.core.interactiveshell import InteractiveShell

gc.disable()

PREPARE = """
import signal, os, sys, weakref
import torch
from opguard import _C

class Guard:
    def __enter__(self):
        self.handled = sys.exception()
        return self
    def __exit__(self, kind, exc, trace):
        if exc is not None:
            _C.sanitize_exit(exc, self.handled, ())

class Model(torch.nn.Module):
    def __init__(self, how):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.how = how
    def forward(self, x):
        activation = self.layer(x)
        REFS.append(weakref.ref(activation))
        if self.how == "interrupt":
            signal.raise_signal(signal.SIGINT)
        elif self.how == "attribute":
            self.nope
        raise RuntimeError("in forward", activation)

def helper(how, guard=Guard):
    model, x = Model(how), torch.ones(2, 4)
    REFS.extend([weakref.ref(model), weakref.ref(model.layer.weight), weakref.ref(x)])
    kept = [model, x]
    with guard():
        out = model(x)

def outer(how, guard=Guard):
    more = torch.ones(3)
    REFS.append(weakref.ref(more))
    helper(how, guard)

def chained(how):
    try:
        outer(how)
    except RuntimeError as error:
        raise KeyError("wrapped") from error

async def waiting(how):
    outer(how)
"""

CELLS = {
    "error": "outer('error')",
    "interrupt": "outer('interrupt')",
    "attribute": "outer('attribute')",
    "chained": "chained('error')",
    "async": "await waiting('error')",
}
BARE = "import contextlib; outer('error', contextlib.nullcontext)"


def main() -> None:
    shell = InteractiveShell.instance()
    shell.user_ns["REFS"] = refs = []
    shell.run_cell(PREPARE)
    report: dict[str, object] = {}

    def run(name: str, cell: str) -> None:
        refs.clear()
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            shell.run_cell(cell)
        report[name] = [ref() is not None for ref in refs]
        report[name + ":shown"] = out.getvalue()

    run("bare", BARE)
    with contextlib.redirect_stdout(io.StringIO()):
        shell.run_cell("1")
    gc.collect()
    for name, cell in CELLS.items():
        run(name, cell)
        report[name + ":tb"] = shell.InteractiveTB.stb2text(
            shell.InteractiveTB.structured_traceback(
                type(shell.last_execution_result.error_in_exec),
                shell.last_execution_result.error_in_exec,
                shell.last_execution_result.error_in_exec.__traceback__,
            )
        )
    count = len(shell.events.callbacks["post_run_cell"])
    from opguard import _ipython

    _ipython.load_ipython_extension(shell)
    report["registered_once"] = count == len(shell.events.callbacks["post_run_cell"])
    run("every", BARE)
    _ipython.unload_ipython_extension(shell)
    run("unloaded", BARE)
    ref = weakref.ref(shell.user_ns["helper"])
    report["user_names_stay"] = ref() is not None
    print(json.dumps(report))


main()

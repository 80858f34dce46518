"""The ``opguard`` command: demo, info, selftest, exports, replay, profile.

Only argparse is imported here; each command imports what it needs, so that ``--help`` is light.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["main"]


def _demo(arguments: argparse.Namespace) -> int:
    from opguard import demo
    from opguard.devices import normalize_device

    try:
        normalize_device(arguments.device)
    except ValueError as error:
        print(f"opguard demo: --{error}", file=sys.stderr)
        return 2
    return demo.main(device=arguments.device)


def _info(arguments: argparse.Namespace) -> int:
    from opguard import info

    print(info.as_json() if arguments.json else info.as_text())
    return 0


def _selftest(arguments: argparse.Namespace) -> int:
    from opguard import tests

    return tests.main(arguments.pytest_arguments)


def _exports(arguments: argparse.Namespace) -> int:
    from opguard.exports import commands

    return commands.run(arguments)


def _days(text: str) -> float:
    with contextlib.suppress(ValueError):
        days = float(text)
        if 0 <= days < math.inf:
            return days
    raise argparse.ArgumentTypeError(f"expected a number of days, 0 or more, got {text!r}")


def _add_exports(commands: Any) -> None:
    exports = commands.add_parser(
        "exports", help="list, verify and prune the local exports of models"
    )
    exports.set_defaults(run=_exports)
    actions = exports.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="print each export's size, model, commit and times")
    listing.add_argument("--json", action="store_true", help="print a JSON list")

    verify = actions.add_parser("verify", help="read each export and compare its digests")
    verify.add_argument("name", nargs="*", metavar="NAME", help="only these; may hold * and ?")
    verify.add_argument("--json", action="store_true", help="print a JSON list")

    prune = actions.add_parser(
        "prune",
        help="remove exports that meet every condition given, and what killed writers left",
    )
    prune.add_argument("--older-than", type=_days, metavar="DAYS", help="not loaded for DAYS days")
    prune.add_argument("--name", action="append", metavar="NAME", help="of this NAME; * and ? fit")
    prune.add_argument("--broken", action="store_true", help="that verify finds bad")
    prune.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def _replay(arguments: argparse.Namespace) -> int:
    from opguard import repro

    return repro.main(arguments.file, class_name=arguments.class_name, as_json=arguments.json)


def _profile(arguments: argparse.Namespace) -> int:
    from opguard import profiling

    return profiling.main(
        arguments.class_name,
        calls=arguments.calls,
        input_file=arguments.input,
        trace=arguments.trace,
        device=arguments.device,
        as_json=arguments.json,
    )


def _add_profile(commands: Any) -> None:
    profile = commands.add_parser(
        "profile", help="measure calls of a class: time, operators, what the guard adds"
    )
    profile.add_argument("class_name", metavar="CLASS", help="module:Class or file.py:Class")
    profile.add_argument("--calls", type=int, default=10, metavar="N", help="default: 10")
    profile.add_argument(
        "--input", metavar="FILE", help="take the call from a repro bundle, not from example_inputs"
    )
    profile.add_argument("--trace", metavar="FILE", help="write the timeline there, as JSON")
    profile.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")
    profile.add_argument("--json", action="store_true", help="print a JSON object")
    profile.set_defaults(run=_profile)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="opguard", description="Run PyTorch models under guard: nothing leaks."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="run a real sentence-embedding model under guard, offline"
    )
    demo.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: the best there is)")
    demo.set_defaults(run=_demo)

    info = commands.add_parser("info", help="print versions, devices, instruction set and floors")
    info.add_argument("--json", action="store_true", help="print a JSON object")
    info.set_defaults(run=_info)

    selftest = commands.add_parser("selftest", help="run the smoke tests of this installation")
    selftest.add_argument(
        "pytest_arguments", nargs="*", metavar="ARG", help="arguments for pytest, after --"
    )
    selftest.set_defaults(run=_selftest)
    _add_exports(commands)

    replay = commands.add_parser(
        "replay", help="run a failed call again from the file it left in OPGUARD_REPRO_DIR"
    )
    replay.add_argument("file", metavar="FILE", help="a repro bundle")
    replay.add_argument(
        "--class",
        dest="class_name",
        metavar="CLASS",
        help="module:Class or file.py:Class, where the bundle's own cannot be imported",
    )
    replay.add_argument("--json", action="store_true", help="print a JSON object")
    replay.set_defaults(run=_replay)
    _add_profile(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0 done, 1 failed, 2 wrong usage.

    Args:
        argv: the arguments without the program's name; None takes those of the process.
    """
    arguments = _parser().parse_args(argv)
    try:
        result: int = arguments.run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # Who read has read enough (`opguard info | head -1`). What is buffered has nowhere to go,
        # and the interpreter would fail to write it at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return result


if __name__ == "__main__":
    sys.exit(main())

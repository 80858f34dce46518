"""Processes that all refresh one export at the same moment; what each did is printed as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import torch

import tiny_exports


def one(folder: Path, start: float, generation: int, force: bool) -> dict[str, object]:
    did = {"source": 0, "export": 0}
    real_model, real_load = tiny_exports.model, tiny_exports.load

    def model(*args):
        did["source"] += 1
        time.sleep(0.2)  # as long as the others need to come here too
        return real_model(*args)

    def load(*args):
        did["export"] += 1
        return real_load(*args)

    tiny_exports.model, tiny_exports.load = model, load
    time.sleep(max(0.0, start - time.time()))
    got = tiny_exports.get(folder, generation, size=20_000, force_refresh=force)
    return did | {"asked": generation, "got": tiny_exports.generation_of(got)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("generations", type=int, nargs="+")
    parser.add_argument("--force", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.time() + 0.3
    children = []
    for generation in arguments.generations:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                did = one(arguments.folder, start, generation, arguments.force)
                os.write(writing, json.dumps(did).encode())
            except BaseException as error:
                print(type(error).__name__, error, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        os.close(writing)
        children.append((child, reading))
    all_did = []
    for child, reading in children:
        assert os.waitpid(child, 0)[1] == 0
        all_did.append(json.loads(os.read(reading, 1000)))
    print(json.dumps(all_did))


if __name__ == "__main__":
    main()

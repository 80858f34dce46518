"""Loading from an export against loading from its source, and what verifying costs.

The first load from an export on a machine reads every byte once more than one from the source, to
compare its digest; later processes, and later loads of one, are spared that while the files' stat
stays the same. The second half says what SHA-256 costs against reading the same bytes, by as many
threads.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import Row

from opguard.base import OpGuardBase
from opguard.exports import hashing

MEGABYTES = 256


def _by_threads(function: Callable[[int], None], count: int) -> None:
    with ThreadPoolExecutor(min(count, os.cpu_count() or 1)) as pool:
        list(pool.map(function, range(count)))


def _read(path: Path) -> None:
    """Reads a file into memory that is used again."""

    def chunk(index: int) -> None:
        buffer = memoryview(bytearray(1 << 20))
        left = hashing.CHUNK
        with open(path, "rb", buffering=0) as file:
            file.seek(index * hashing.CHUNK)
            while left and (count := file.readinto(buffer[:left])):
                left -= count

    _by_threads(chunk, -(-path.stat().st_size // hashing.CHUNK))


def _hash_memory() -> None:
    """Hashes as many bytes as the file has, without reading any."""
    data = bytes(1 << 20)

    def chunk(index: int) -> None:
        digest = hashlib.sha256()
        for _ in range(hashing.CHUNK >> 20):
            digest.update(data)

    _by_threads(chunk, (MEGABYTES << 20) // hashing.CHUNK)


def _timed(function: Callable[[], object]) -> Callable[[], float]:
    def timed() -> float:
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin

    return timed


def _model(folder: Path) -> type[OpGuardBase]:
    from transformers import BertConfig, BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = BertConfig(
        hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048
    )
    BertModel(config).save_pretrained(folder)

    class Bert(OpGuardBase):
        NAME = "bench"
        MODEL_ID = str(folder)
        DETECTOR_TYPE = BertModel

    return Bert


def rows() -> list[Row]:
    folder = Path(tempfile.mkdtemp(prefix="opguard-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    kind = _model(folder / "source")

    def load(exports: str) -> None:
        os.environ["OPGUARD_EXPORTS"] = exports
        kind(device_override="cpu", keep_warm=True).free()

    def from_source() -> None:
        load("0")

    def again() -> None:
        load(str(folder / "exports"))

    def later() -> None:
        # As a process would that has just begun.
        hashing._known.clear()
        again()

    def first() -> None:
        for path in (folder / "exports").glob("*/.verified.json"):
            path.unlink()
        later()

    first()
    time.sleep(2.1)  # a file just written is never taken as known
    first()
    large = folder / "large"
    large.write_bytes(os.urandom(1 << 20) * MEGABYTES)

    def verify() -> None:
        hashing._known.clear()
        hashing.hash_files([large])

    gigabytes = MEGABYTES / 1000 * 1.048576
    return [
        Row(
            "load 163 MB from an export for the first time, against the source",
            _timed(first),
            _timed(from_source),
            self_timed=True,
        ),
        Row(
            "load 163 MB from an export in another process, against the source",
            _timed(later),
            _timed(from_source),
            limit=1.5,
            self_timed=True,
        ),
        Row(
            "load 163 MB from an export again in a process, against the source",
            _timed(again),
            _timed(from_source),
            self_timed=True,
        ),
        Row(
            f"verifying {gigabytes:.2f} GB, against reading it",
            _timed(verify),
            _timed(lambda: _read(large)),
            self_timed=True,
        ),
        Row(
            f"verifying {gigabytes:.2f} GB, against hashlib on memory by as many threads",
            _timed(verify),
            _timed(_hash_memory),
            limit=1.3,
            self_timed=True,
        ),
    ]

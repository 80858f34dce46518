"""What every test starts from: one torch thread, known seeds, modes and settings left as found.

Nothing here puts ``python/`` on sys.path: the tests run against the opguard that is installed.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from order import long_first

ROOT = Path(__file__).resolve().parents[1]

# No test may reach the network by accident, and no progress bar or advice may turn into a failure.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config: pytest.Config) -> None:
    """One thread: the machine may have few cores, and timings and sums then repeat.

    Exports go to a folder of this run's own: none of a user's is read, replaced or left behind.
    """
    if "OPGUARD_EXPORTS" not in os.environ:
        folder = tempfile.mkdtemp(prefix="opguard-exports-")
        os.environ["OPGUARD_EXPORTS"] = folder
        config.add_cleanup(lambda: os.environ.pop("OPGUARD_EXPORTS", None))
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    try:
        import torch
    except ImportError:  # the torch-free tests run where there is none
        return
    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    """``-m full`` is everything, so every test has that marker; what was chosen is put in order."""
    for item in items:
        item.add_marker("full")
    yield
    workers = getattr(config, "workerinput", {}).get("workercount")
    if workers:  # alone, the order of files is easier to follow
        items[:] = long_first(items, workers)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test logged may be no text that can be sent, from one process to another."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="module", autouse=True)
def _heap_of_its_own() -> None:
    """What earlier files left (compilers, their caches) is not looked at by every collection.

    Tests of leaks collect often, and each collection goes through all objects there are.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _same_start(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same random numbers in every test, in any order; a mode left on is the test's failure."""
    random.seed(0)
    torch_free = "torchfree" in request.path.parts
    if torch_free:
        yield
        return
    import torch

    torch.manual_seed(0)
    yield
    left_on = [
        name
        for name, on in (
            ("no_grad", not torch.is_grad_enabled()),
            ("inference_mode", torch.is_inference_mode_enabled()),
            ("autocast", torch.is_autocast_enabled("cpu")),
            ("deterministic", torch.are_deterministic_algorithms_enabled()),
        )
        if on
    ]
    if left_on:
        torch._C._set_grad_enabled(True)
        torch.set_autocast_enabled("cpu", False)
        torch.use_deterministic_algorithms(False)
        pytest.fail(f"expected the test to leave torch's modes as found, left on: {left_on}")


@pytest.fixture
def collected() -> Iterator[None]:
    """The cyclic collector is off: what must be free is free without it."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The folder with csrc, python and tests in it."""
    return ROOT


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT and its weights, as from_pretrained takes it; only to be read."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder

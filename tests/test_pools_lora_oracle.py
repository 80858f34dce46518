"""LoraCommit gives the weights and outputs that peft gives, on tiny models of every layer kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_models import close, computed, gpt2, inputs, merged, net, peft_model, saved, state
from opguard.pools.lora import LoraCommit

peft = pytest.importorskip("peft")

LINEARS = ["q_proj", "v_proj", "head"]
CONFIGS = {
    "linear": {"r": 3, "lora_alpha": 7, "target_modules": LINEARS},
    "rslora": {"r": 4, "lora_alpha": 6, "target_modules": LINEARS, "use_rslora": True},
    "conv2d": {"r": 2, "lora_alpha": 5, "target_modules": ["conv", "point"]},
    "conv1d": {"r": 2, "lora_alpha": 5, "target_modules": ["line"]},
    "embedding": {"r": 3, "lora_alpha": 2, "target_modules": ["embed", "head"]},
    "rank_pattern": {
        "r": 2, "lora_alpha": 3, "target_modules": LINEARS,
        "rank_pattern": {"layers.1.q_proj": 5, "head": 1}, "use_rslora": True,
    },
    "alpha_pattern": {
        "r": 2, "lora_alpha": 3, "target_modules": LINEARS,
        "alpha_pattern": {r"layers\.0\..*": 9, "^head": 1, "q_proj": 4},
    },
    "lora_bias": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "head"], "lora_bias": True},
    "modules_to_save": {
        "r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "modules_to_save": ["head"],
    },
    "wrong_fan": {"r": 2, "lora_alpha": 3, "target_modules": ["head"], "fan_in_fan_out": True},
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_weights_and_output_equal_peft(kind, tmp_path):
    base = net()
    made = peft_model(base, **CONFIGS[kind])
    if kind == "modules_to_save":
        with torch.no_grad():
            made.base_model.model.head.modules_to_save["default"].weight.add_(1)
    commit = LoraCommit(saved(made, tmp_path))
    ours = computed(base, commit)
    with torch.no_grad():
        expected = made(*inputs())
    close(ours, merged(made))
    changed = [n for n, t in base.state_dict().items() if not torch.equal(t, ours[n])]
    assert changed, "the adapter changed nothing"
    patched = net()
    patched.load_state_dict(ours)
    with torch.no_grad():
        torch.testing.assert_close(patched(*inputs()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_rounded_once(dtype, tmp_path):
    base = net(dtype)
    made = peft_model(base, r=3, lora_alpha=7, target_modules=[*LINEARS, "conv", "embed"])
    factors = {n: p.detach().double() for n, p in made.named_parameters() if "lora_" in n}
    commit = LoraCommit(saved(made, tmp_path))
    ours = computed(base, commit)
    start = "base_model.model.head.lora_{}.default.weight"
    exact = base.head.weight.double() + 7 / 3 * (
        factors[start.format("B")] @ factors[start.format("A")]
    )
    assert (ours["head.weight"] == exact.to(dtype)).float().mean() > 0.95  # ties apart
    close(ours, merged(made), rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


def test_plain_formula_in_float64():
    base = net().double()
    tensors = state(rank=4)
    a, b = (tensors[f"base_model.model.head.lora_{x}.weight"].double() for x in "AB")
    commit = LoraCommit(tensors, scale=-0.5, config={"r": 4, "lora_alpha": 6})
    ours = computed(base, commit)["head.weight"]
    expected = base.head.weight - 0.5 * 6 / 4 * (b @ a)
    torch.testing.assert_close(ours, expected, rtol=1e-7, atol=1e-7)


def test_gpt2_whose_linear_layers_keep_their_weight_transposed(tmp_path):
    base = gpt2()
    made = peft_model(base, r=3, lora_alpha=5, target_modules=["c_attn", "c_proj", "c_fc"])
    commit = LoraCommit(saved(made, tmp_path))
    ours = computed(base, commit)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        expected = made(tokens).logits
    close(ours, merged(made))
    base.load_state_dict(ours)
    with torch.no_grad():
        torch.testing.assert_close(base(tokens).logits, expected, rtol=1e-3, atol=1e-4)


def test_tied_weight_gets_its_delta_once(tmp_path):
    base = gpt2()
    assert base.lm_head.weight is base.transformer.wte.weight
    made = peft_model(base, r=3, lora_alpha=5, target_modules=["wte"])
    commit = LoraCommit(saved(made, tmp_path), tied="add")
    assert len(commit.deltas(base)) == 1
    theirs = merged(made)["transformer.wte.weight"]
    torch.testing.assert_close(computed(base, commit)["transformer.wte.weight"], theirs)


def test_attention_of_torch_is_refused_because_versions_of_peft_differ(tmp_path):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attn(x, x, x)[0]

    torch.manual_seed(0)
    base = Attending().eval().requires_grad_(False)
    made = peft_model(base, r=2, lora_alpha=3, target_modules=["attn"])
    commit = LoraCommit(saved(made, tmp_path))
    with pytest.raises(TypeError, match=r"MultiheadAttention, whose out_proj .* twice; merge it"):
        commit.deltas(base)


def test_in_memory_state_with_the_adapters_name():
    base = net()
    made = peft_model(base, r=3, lora_alpha=7, target_modules=["head", "embed"])
    tensors = {n: p for n, p in made.named_parameters() if "lora_" in n}
    assert any("lora_A.default.weight" in n for n in tensors)
    commit = LoraCommit(tensors, config=made.peft_config["default"])
    close(computed(base, commit), merged(made))


def test_kernel_in_channels_last(tmp_path):
    base = net()
    made = peft_model(base, r=2, lora_alpha=5, target_modules=["conv"])
    commit = LoraCommit(saved(made, tmp_path))
    last = net().to(memory_format=torch.channels_last)
    assert not last.conv.weight.is_contiguous()
    close(computed(last, commit), merged(made))


def test_grouped_convolution_is_refused_as_peft_refuses_to_merge_it(tmp_path):
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3, groups=2)

    base = Grouped().requires_grad_(False)
    made = peft_model(base, r=2, lora_alpha=3, target_modules=["conv"])
    with pytest.raises(
        (TypeError, ValueError), match=r"matrices of one rank for conv|at conv .* with 2 groups"
    ):
        LoraCommit(saved(made, tmp_path)).deltas(base)
    with pytest.raises(NotImplementedError):
        merged(made)

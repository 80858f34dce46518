"""LoraCommit gives what the adapter was trained to give, or says by name what it cannot honour."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lora_models import close, computed, gpt2, inputs, net, pair, peft_model, saved, state
from opguard.pools import CommitObjectProxy
from opguard.pools.lora import LoraCommit

peft = pytest.importorskip("peft")

QUIET = {"r": 2, "lora_alpha": 2}
TOKENS = torch.arange(10)[None]


def llama():
    """A model whose head is tied to an embedding that peft knows by its name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def saved_by_peft(build, folder, **config):
    """(what the adapted model answers, the adapter's folder)."""
    made = peft_model(build(), r=3, lora_alpha=5, **config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
        return made(TOKENS).logits, saved(made, folder)


# --- tied weights ---------------------------------------------------------------------------------

ONE_END = {
    "a pair": {"target_modules": ["wte"]},
    "a whole weight": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", ONE_END)
def test_an_adapter_of_one_end_of_a_tied_weight_does_not_change_the_other(kind, tmp_path):
    expected, folder = saved_by_peft(gpt2, tmp_path, **ONE_END[kind])
    base = gpt2()
    with pytest.raises(ValueError, match=r"alone, which shares its weight with .*tied='add'"):
        LoraCommit(folder).deltas(base)
    assert len(LoraCommit(folder, tied="add").deltas(base)) == len(
        LoraCommit(folder).deltas(gpt2(tie_word_embeddings=False))
    )
    with torch.no_grad():
        untied = gpt2(tie_word_embeddings=False)
        untied.load_state_dict(base.state_dict())
        LoraCommit(folder).apply(untied)
        torch.testing.assert_close(untied(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_one_end_beside_its_module_is_what_was_trained(tmp_path):
    expected, folder = saved_by_peft(llama, tmp_path, target_modules=["embed_tokens", "q_proj"])
    base = llama()
    LoraCommit(folder, mode="hook").apply(base)  # the file has the embedding itself too, unchanged
    with torch.no_grad():
        torch.testing.assert_close(base(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [
    {"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
])  # fmt: skip
def test_adapters_that_were_tied_are_applied_once(config, tmp_path):
    expected, folder = saved_by_peft(llama, tmp_path, ensure_weight_tying=True, **config)
    base = llama()
    LoraCommit(folder).apply(base)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(base(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


# --- beside the weights ---------------------------------------------------------------------------


def test_hooks_stay_without_a_block():
    model = net()
    plain = model(*inputs())
    proxy = CommitObjectProxy(model, [LoraCommit(state(), config=QUIET, mode="hook")])
    proxy.apply_commit_stack()
    assert not torch.equal(model(*inputs()), plain)
    proxy.revert_commit_stack()
    assert torch.equal(model(*inputs()), plain)


def test_a_layer_may_be_called_by_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            return self.head(input=x)

    model, x = Named().requires_grad_(False), torch.randn(3, 8)
    commit = LoraCommit(state(), config=QUIET, mode="hook")
    a, b = pair(5, 8)
    expected = model(x) + x @ a.t() @ b.t()
    commit.apply(model)
    torch.testing.assert_close(model(x), expected)


def test_hooks_that_are_taken_off_are_all_off_or_all_on(monkeypatch):
    from opguard.pools import _lora_side

    model = net()
    commit = LoraCommit({**state(), **state("layers.0.q_proj", 8, 8)}, config=QUIET, mode="hook")
    remove, calls = torch.utils.hooks.RemovableHandle.remove, []

    def removed(handle):
        calls.append(handle)
        remove(handle)
        if len(calls) == 1:
            raise KeyboardInterrupt

    proxy = CommitObjectProxy(model, [commit])
    proxy.apply_commit_stack()
    monkeypatch.setattr(_lora_side.RemovableHandle, "remove", removed)
    with pytest.raises(KeyboardInterrupt):
        proxy.revert_commit_stack()
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    assert hooks == 2 * len(proxy.applied)
    proxy.revert_commit_stack()
    assert not any(m._forward_hooks for m in model.modules())


# --- what a file and its config leave out ---------------------------------------------------------

HEAD = state()
A, B = HEAD
DIFFUSERS = {
    f"unet.head.lora.{role}.weight": HEAD[key] for role, key in (("down", A), ("up", B))
}  # fmt: skip
REFUSED = {
    "the weights that its config names": (
        HEAD, {"modules_to_save": ["classifier"]}, r"weights of classifier .* came none; "),
    "the biases that its config names": (
        HEAD, {"lora_bias": True}, r"lora_bias=True of head .* without a bias"),
    "biases that its config does not have": (
        {**HEAD, B.replace("weight", "bias"): torch.ones(5)}, {"lora_bias": False},
        r"lora_bias=False of head .* with a bias"),
    "a beginning nobody knows": (HEAD, {"init_lora_weights": "milora"}, "not known here"),
    "no list of modules": (HEAD, {"modules_to_save": "head"}, "modules_to_save .* list of names"),
    "an alpha of nothing": (
        {**HEAD, "base_model.model.head.alpha": torch.zeros(())}, None, "an alpha other than 0"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_there_is_said(what):
    tensors, config, message = REFUSED[what]
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        LoraCommit(tensors, config=None if config is None else {**QUIET, **config})
    assert "\n" not in str(caught.value)


def test_a_component_takes_no_file_whose_keys_do_not_name_theirs():
    tensors = {**DIFFUSERS, **state("layers.0.q_proj", 8, 8)}
    with pytest.raises(LookupError, match=r"to name its component, came '.*layers\.0\.q_proj"):
        LoraCommit(tensors, config=QUIET, component="unet").deltas(net())
    assert len(LoraCommit(DIFFUSERS, config=QUIET, component="unet").deltas(net())) == 1


@pytest.mark.parametrize("mode", ["weights", "hook"])
def test_one_module_under_names_of_two_layouts(mode):
    commit = LoraCommit({**HEAD, **DIFFUSERS}, config=QUIET, mode=mode)
    with pytest.raises(ValueError, match="one pair of matrices for head"):
        commit.apply(net())


def test_a_scale_that_ends_in_infinity():
    with pytest.raises(ValueError, match=r"leaves its matrices finite, came 1e\+39"):
        LoraCommit(HEAD, config=QUIET, scale=1e39)


def test_modules_to_save_are_ends_of_names_as_in_peft():
    tensors = {**HEAD, "base_model.model.layers.0.v_proj.weight": torch.ones(8, 8)}
    commit = LoraCommit(tensors, config={**QUIET, "modules_to_save": ["v_proj"]})
    assert bool((computed(net(), commit)["layers.0.v_proj.weight"] == 1).all())
    commit = LoraCommit(tensors, config={**QUIET, "modules_to_save": ["_proj"]})
    assert bool((computed(net(), commit)["layers.0.v_proj.weight"] == 1).all())


def test_a_level_of_a_name_is_taken_out_whole_or_not_at_all():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.processor_in = nn.Linear(8, 5)

    model = nn.ModuleDict({"a": Inner()}).requires_grad_(False)
    tensors = {
        key.replace("head", "a.processor_in").removeprefix("base_model.model."): tensor
        for key, tensor in HEAD.items()
    }
    assert len(LoraCommit(tensors, config=QUIET).deltas(model)) == 1


def test_pickled_files_and_missing_configs(tmp_path):
    for name in ("adapter_model.bin", "x.pt"):
        torch.save(HEAD, tmp_path / name)
        with pytest.raises(ValueError, match="a pickled one, which could run code"):
            LoraCommit(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"config of a state dict at .*x\.json.*; "):
        LoraCommit(HEAD, config=tmp_path / "x.json")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="came 0 bytes that are none"):
        LoraCommit(tmp_path / "empty.safetensors")


# --- every setting of peft ------------------------------------------------------------------------


def test_every_setting_of_peft_is_known():
    """Defaults of the installed version pass; so a new setting is refused only where it is used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, lora_alpha=2)
    one, other = LoraCommit(HEAD, config=QUIET), LoraCommit(HEAD, config=config)
    close(computed(net(), one), computed(net(), other), rtol=0, atol=0)

"""LoRA files: every layout lands on the right weights, every damage is said in one sentence.

Expected weights are made from the matrices by the plain formula.
"""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from lora_models import Net, close, computed, net, pair, state
from opguard.pools.lora import LoraCommit

QUIET = {"r": 2, "lora_alpha": 2}


def only(commit, model=None):
    """{name: change} of a commit on a model whose weights are all that they were."""
    model = model or net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    after = computed(model, commit)
    return {n: after[n] - t for n, t in before.items() if not torch.equal(after[n], t)}


def is_close(found, expected):
    assert set(found) == set(expected), (set(found), set(expected))
    close(found, expected, rtol=1e-4, atol=1e-5)


# --- sources --------------------------------------------------------------------------------------


def test_file_may_change_or_go_after_reading(tmp_path):
    path = tmp_path / "one.safetensors"
    save_file(state(), path)
    commit = LoraCommit(path, config=QUIET)
    before = computed(net(), commit)["head.weight"]
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size - 64)
        file.write(b"\x7f" * 64)
    assert torch.equal(computed(net(), commit)["head.weight"], before)
    path.unlink()
    assert torch.equal(computed(net(), commit)["head.weight"], before)


def test_state_dict_may_change_after_reading():
    tensors = state()
    commit = LoraCommit(tensors, config=QUIET)
    before = computed(net(), commit)["head.weight"]
    for tensor in tensors.values():
        tensor.zero_()
    assert torch.equal(computed(net(), commit)["head.weight"], before)


def test_config_is_found_beside_the_file_and_in_it(tmp_path):
    a, b = pair(5, 8)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(state(), tmp_path / "adapter_model.safetensors")
    expected = {"head.weight": 6 / math.sqrt(2) * b @ a}
    is_close(only(LoraCommit(tmp_path)), expected)
    is_close(only(LoraCommit(str(tmp_path / "adapter_model.safetensors"))), expected)
    is_close(only(LoraCommit(tmp_path, config=QUIET)), {"head.weight": b @ a})
    diffusers = {
        "unet.head.lora_A.weight": a, "unet.head.lora_B.weight": b,
    }  # fmt: skip
    inside = {"unet.r": 2, "unet.lora_alpha": 10, "unet.rank_pattern": {}}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(diffusers, path, metadata={"lora_adapter_metadata": json.dumps(inside)})
    is_close(only(LoraCommit(path)), {"head.weight": 5 * b @ a})


def test_missing_alpha_is_said_once():
    a, b = pair(5, 8)
    with pytest.warns(UserWarning, match=r"came none for 1 of 1: alpha = r is taken") as said:
        commit = LoraCommit(state())
    assert len(said) == 1
    is_close(only(commit), {"head.weight": b @ a})


# --- layouts --------------------------------------------------------------------------------------


def keyed(name, down, up, alpha=None, style="lora_down.weight lora_up.weight"):
    first, second = style.split()
    made = {f"{name}.{first}": down, f"{name}.{second}": up}
    return made if alpha is None else {**made, f"{name}.alpha": torch.tensor(float(alpha))}


def test_kohya_names_and_alpha():
    a, b = pair(8, 8)
    conv_a, conv_b = torch.randn(3, 3, 3, 3), torch.randn(8, 3, 1, 1)
    commit = LoraCommit({
        **keyed("lora_unet_layers_1_q_proj", a, b, alpha=1),
        **keyed("lora_unet_conv", conv_a, conv_b, alpha=6),
        **keyed("lora_unet_point", a[:, :, None, None], b[:, :, None, None], alpha=2),
    })  # fmt: skip
    expected = {
        "layers.1.q_proj.weight": 0.5 * b @ a,
        "conv.weight": 2 * torch.einsum("or,rikl->oikl", conv_b[:, :, 0, 0], conv_a),
        "point.weight": (b @ a)[:, :, None, None],
    }
    is_close(only(commit), expected)


def test_locon_with_a_middle_kernel_is_three_convolutions():
    model = net().double()
    down, mid = torch.randn(2, 3, 1, 1).double(), torch.randn(2, 2, 3, 3).double()
    up = torch.randn(8, 2, 1, 1).double()
    tensors = keyed("lora_unet_conv", down, up, alpha=3)
    tensors["lora_unet_conv.lora_mid.weight"] = mid
    patched = computed(model, LoraCommit(tensors))["conv.weight"]
    x = torch.randn(1, 3, 6, 6).double()
    side = functional.conv2d(functional.conv2d(functional.conv2d(x, down), mid), up)
    expected = functional.conv2d(x, model.conv.weight) + 1.5 * side
    torch.testing.assert_close(functional.conv2d(x, patched), expected)


def test_kohya_name_of_two_modules_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a_b = nn.ModuleDict({"c": nn.Linear(8, 5)})
            self.a = nn.ModuleDict({"b_c": nn.Linear(8, 5)})

    commit = LoraCommit(keyed("lora_unet_a_b_c", *pair(5, 8), alpha=2))
    with pytest.raises(ValueError, match=r"one module of Twice .* came a_b\.c and a\.b_c"):
        commit.deltas(Twice())


@pytest.mark.parametrize(
    "name",
    [
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "input_blocks_2_0_out_layers_3",
        "input_blocks_4_0_skip_connection",
        "input_blocks_4_0_emb_layers_1",
        "input_blocks_3_0_op",
        "input_blocks_0_0",
        "middle_block_0_in_layers_2",
        "middle_block_1_proj_out",
        "output_blocks_0_1_transformer_blocks_0_attn1_to_v",
        "output_blocks_2_2_conv",
        "output_blocks_8_0_in_layers_2",
        "time_embed_0",
        "label_emb_0_2",
        "out_2",
    ],
)
def test_names_of_the_unet_that_sdxl_was_trained_as(name):
    """The module is where diffusers' own conversion puts it."""
    from diffusers.loaders import lora_conversion_utils as theirs

    a, b = pair(8, 8)
    given = keyed(f"lora_unet_{name}", a, b, alpha=2)
    mapped = theirs._maybe_map_sgm_blocks_to_diffusers(
        {k: v for k, v in given.items() if "alpha" not in k}, SimpleNamespace(layers_per_block=2)
    )
    key = next(k for k in theirs._convert_non_diffusers_lora_to_diffusers(mapped)[0] if "down" in k)
    path = key.removeprefix("unet.").replace(".processor", "")
    path = path.replace("_lora.down.weight", "").replace(".lora.down.weight", "")
    root = module = nn.Module()
    root.config = SimpleNamespace(layers_per_block=2)
    for part in path.split(".")[:-1]:
        module.add_module(part, nn.Module())
        module = getattr(module, part)
    layer = nn.Linear(8, 8)
    module.add_module(path.split(".")[-1], layer)
    assert list(LoraCommit(given).deltas(root)) == [layer.weight]


def test_diffusers_names_of_all_years():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = nn.Linear(8, 8)
            self.to_out = nn.ModuleList([nn.Linear(8, 8)])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn1 = Attention()
            both = {name: nn.Linear(8, 8) for name in ("q_proj", "out_proj")}
            self.self_attn = nn.ModuleDict(both)

    model = Model().requires_grad_(False)
    a, b = pair(8, 8)
    old, now, text = "down.weight up.weight", "lora.down.weight lora.up.weight", (
        "lora_linear_layer.down.weight lora_linear_layer.up.weight")  # fmt: skip
    for name, style, path in (
        ("unet.attn1.processor.to_q_lora", old, "attn1.to_q"),
        ("attn1.processor.to_out_lora", old, "attn1.to_out.0"),
        ("text_encoder.self_attn.to_out_lora", old, "self_attn.out_proj"),
        ("text_encoder.self_attn.q_proj", text, "self_attn.q_proj"),
        ("unet.attn1.to_q", now, "attn1.to_q"),
        ("unet.base_model.model.attn1.to_q", now, "attn1.to_q"),
        ("attn1.to_out.0", "lora_A.weight lora_B.weight", "attn1.to_out.0"),
    ):
        commit = LoraCommit(keyed(name, a, b, alpha=2, style=style))
        is_close(only(commit, model), {f"{path}.weight": b @ a})


class Pipeline:
    """As diffusers' pipelines: no module, but models for attributes."""

    def __init__(self):
        self.unet = net()
        self.text_encoder = net(seed=1)


def two_parts():
    a, b = pair(5, 8)
    return {**keyed("unet.head", a, b, 2), **keyed("text_encoder.head", a, b * 2, 2)}


@pytest.mark.parametrize("kohya", [False, True])
def test_a_pipeline_gets_each_part_where_it_belongs(kohya):
    tensors = two_parts()
    if kohya:
        tensors = {
            k.replace("unet.", "lora_unet_").replace("text_encoder.", "lora_te_"): v
            for k, v in tensors.items()
        }
    pipeline = Pipeline()
    found = LoraCommit(tensors).deltas(pipeline)
    weights = [pipeline.unet.head.weight, pipeline.text_encoder.head.weight]
    assert {id(p) for p in found} == {id(p) for p in weights}
    first, second = (torch.zeros(5, 8) for _ in range(2))
    found[weights[0]](torch.zeros(5, 8), first)
    found[weights[1]](torch.zeros(5, 8), second)
    torch.testing.assert_close(second, 2 * first)
    with pytest.raises(ValueError, match=r"one model to go into Net.*component='text_encoder'"):
        LoraCommit(tensors).deltas(pipeline.unet)
    chosen = LoraCommit(tensors, component="text_encoder").deltas(pipeline.text_encoder)
    assert list(chosen) == [pipeline.text_encoder.head.weight]
    with pytest.raises(LookupError, match=r"matrices for 'prior' .* came text_encoder"):
        LoraCommit(tensors, component="prior").deltas(pipeline.unet)


def test_a_compiled_model_keeps_its_names():
    model = net()
    compiled = torch.compile(model, backend="eager")
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    tensors = {**state(), **state("layers.0.q_proj", 8, 8)}
    found = LoraCommit(tensors, config=QUIET).deltas(compiled)
    assert {id(p) for p in found} == {
        id(model.head.weight),
        id(model.layers[0]._orig_mod.q_proj.weight),
    }


# --- what is refused ------------------------------------------------------------------------------


def without(key):
    return {k: v for k, v in state().items() if key not in k}


def bad_value(value):
    tensors = state()
    next(iter(tensors.values())).view(-1)[3] = value
    return tensors


A, B = state()
FILES = {
    "dora": ({**state(), A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(5)},
             r"DoRA's norms at 'base_model\.model\.head\.lora_magnitude_vector'"),
    "kohya dora": ({"lora_unet_head.dora_scale": torch.ones(1)},
                   r"DoRA's norms at 'lora_unet_head\.dora_scale'"),
    "hada": ({"lora_unet_head.hada_w1_a": torch.ones(5, 2)},
             r"LoHa.* at 'lora_unet_head\.hada_w1_a'"),
    "lokr": ({"lora_unet_head.lokr_w1": torch.ones(5, 2)},
             r"LoKr.* at 'lora_unet_head\.lokr_w1'"),
    "diff": ({"lora_unet_head.diff": torch.ones(5, 8)},
             r"full difference.* at 'lora_unet_head\.diff'"),
    "unknown": ({**state(), "base_model.model.head.extra": torch.ones(1)},
                r"peft, diffusers or kohya .* came 'base_model\.model\.head\.extra'"),
    "whole": ({**state(), "base_model.model.conv.weight": torch.ones(1)},
              r"'base_model.*conv\.weight'"),
    "no up": (without("lora_B"), r"both matrices of head .* without the up one"),
    "no down": (without("lora_A"), r"both matrices of head .* without the down one"),
    "lone alpha": ({**state(), "unet.conv.alpha": torch.ones(())}, r"'unet\.conv\.alpha' without"),
    "nan": (bad_value(math.nan), r"NaN or infinity at 'base_model\.model\.head\.lora_A\.weight'"),
    "inf": (bad_value(math.inf), r"NaN or infinity at"),
    "integers": ({k: v.int() for k, v in state().items()}, r"float tensors .* torch\.int32 at"),
    "meta": ({k: v.to("meta") for k, v in state().items()}, r"came a meta tensor at"),
    "no tensor": ({"a": 3}, r"came int at 'a'"),
    "empty": ({}, r"LoRA matrices in a state dict, came no tensor"),
    "ranks": ({A: torch.ones(2, 8), B: torch.ones(5, 3)},
              r"of one rank for head .*\[2, 8\].*\[5, 3\]"),
    "two adapters": ({**state(), A.replace("lora_A", "lora_A.other"): torch.ones(2, 8)},
                     r"one adapter in a state dict, came '.*lora_A\.other.*' and"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_not_understood(kind):
    tensors, message = FILES[kind]
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        LoraCommit(tensors, config=QUIET)
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)  # the way out


CONFIGS = {
    "dora": ({"use_dora": True}, "use_dora=True"),
    "parameters": ({"target_parameters": ["x"]}, "target_parameters"),
    "bias": ({"bias": "all"}, "bias='all'"),
    "other": ({"peft_type": "LOHA"}, "came LOHA"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*which moved them"),
    "new": ({"wobble": 3}, "wobble=3"),
    "replication": ({"layer_replication": [[0, 1]]}, "adds layers"),
    "rank": ({"r": 3}, "rank 3 of head .* came 2"),
    "rank pattern": ({"rank_pattern": {"he.d": 7}}, "rank 7 of head"),
    "pattern": ({"alpha_pattern": {"(": 7}}, r"came '\('"),
    "patterns": ({"alpha_pattern": [3]}, "as a mapping"),
    "alpha": ({"lora_alpha": "8"}, "finite number for lora_alpha"),
    "alpha nan": ({"lora_alpha": math.nan}, "finite number for lora_alpha"),
    "component": ({"unet.use_dora": True}, r"\(unet\), came use_dora"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_setting_that_cannot_be_honoured(kind):
    change, message = CONFIGS[kind]
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        LoraCommit(state(), config={**QUIET, **change})
    assert "\n" not in str(caught.value)


def test_settings_of_training_do_not_matter():
    more = {
        "lora_dropout": 0.3, "target_modules": ["head"], "task_type": "CAUSAL_LM",
        "init_lora_weights": True, "inference_mode": True, "bias": "none", "peft_version": "9",
        "layers_to_transform": [1], "qalora_group_size": 16, "use_qalora": False,
    }  # fmt: skip
    one, other = LoraCommit(state(), config=QUIET), LoraCommit(state(), config={**QUIET, **more})
    assert torch.equal(computed(net(), one)["head.weight"], computed(net(), other)["head.weight"])
    assert one.uuid == other.uuid


def test_alpha_said_twice_differently():
    tensors = {**state(), "base_model.model.head.alpha": torch.tensor(3.0)}
    with pytest.raises(ValueError, match=r"one scaling of head .* came 1\.5 by .* and 1 by"):
        LoraCommit(tensors, config=QUIET)
    LoraCommit(tensors, config={"r": 2, "lora_alpha": 3})


@pytest.mark.parametrize("cut", [4, 40, -3])
def test_truncated_file(tmp_path, cut):
    path = tmp_path / "x.safetensors"
    save_file(state(), path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a whole safetensors file at .*x\.safetensors") as caught:
        LoraCommit(path, config=QUIET)
    assert "\n" not in str(caught.value)


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(FileNotFoundError, match="fetch it first"):
        LoraCommit("someone/some-lora")
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"came 0 .safetensors files \(pickled .bin"):
        LoraCommit(tmp_path)
    with pytest.raises(TypeError, match="as a path or a state dict, came int"):
        LoraCommit(3)
    (tmp_path / "adapter_config.json").write_text("{")
    save_file(state(), tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"JSON in .*adapter_config\.json"):
        LoraCommit(tmp_path)


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, 8))


class Turned(Odd):
    in_features, out_features = 8, 5


def resized():
    model = net()
    model.head.weight = nn.Parameter(torch.zeros(6, 8), requires_grad=False)
    return model


def changed(path, module):
    model = net()
    setattr(model, path, module)
    return model


MODELS = {
    "missing": (net, state("layers.7.q_proj"), r"'layers\.7\.q_proj' in Net .* nearest"),
    "shape": (net, state(inputs_=7),
              r"\[r, 8\] and \[5, r\] for Linear at head, came \[r, 7\]"),
    "rows": (net, state(outputs=6), r"came \[r, 8\] and \[6, r\]"),
    "kernel": (
        net,
        {A.replace("head", "conv"): torch.ones(2, 3, 1, 1),
         B.replace("head", "conv"): torch.ones(8, 2, 1, 1)},
        r"kernel \[3, 3\]",
    ),
    "kind": (lambda: changed("head", nn.LayerNorm(8)), state(),
             r"came torch\.nn\.modules\.norm\w*\.LayerNorm"),
    "custom": (lambda: changed("head", Odd()), state(), r"came .*Odd; leave it out"),
    "custom linear": (lambda: changed("head", Turned()), state(), r"Turned, .*mode='hook'"),
    "resized": (resized, state(), r"5 x 8 at head .* came \[6, 8\]"),
    "meta": (lambda: net().to("meta"), state(), "a meta tensor; load the model first"),
    "parametrized": (
        lambda: changed("head", nn.utils.parametrizations.weight_norm(nn.Linear(8, 5))), state(),
        "with parametrizations",
    ),
    "float8": (lambda: net(torch.float8_e4m3fn), state(), r"torch\.float8_e4m3fn .*mode='hook'"),
    "embedding keys": (
        net,
        {"base_model.model.head.lora_embedding_A": torch.ones(2, 8),
         "base_model.model.head.lora_embedding_B": torch.ones(5, 2)},
        "for Linear at head",
    ),
    "in a pipeline": (Pipeline, state(), "the component's name before the path"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_it_was_not_made_for(kind):
    build, tensors, message = MODELS[kind]
    model = build()
    with pytest.raises((ValueError, TypeError, LookupError), match=message) as caught:
        LoraCommit(tensors, config=QUIET).deltas(model)
    assert "\n" not in str(caught.value)


def test_options_are_checked():
    for wrong in ({"scale": math.nan}, {"scale": "1"}, {"mode": "fast"}, {"tied": "yes"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoraCommit(state(), config=QUIET, **wrong)


def test_identity_is_of_contents():
    same = LoraCommit(state(), config=QUIET)
    assert LoraCommit(state(), config=QUIET, name="other").uuid == same.uuid
    tensors = bad_value(1.25)
    others = [
        LoraCommit(state(), config=QUIET, scale=0.5),
        LoraCommit(state(), config={"r": 2, "lora_alpha": 3}),
        LoraCommit(tensors, config=QUIET),
        LoraCommit(state("conv"), config=QUIET),
        LoraCommit(state(), config=QUIET, mode="hook"),
    ]
    assert len({c.uuid for c in [same, *others]}) == 6


def test_model_of_the_tests_has_each_kind():
    kinds = {type(m) for m in Net().modules()}
    assert {nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d} <= kinds

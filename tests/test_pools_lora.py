"""LoraCommit on a model: side path, tied weights, the arithmetic, real pipelines' files."""

from __future__ import annotations

import copy
import math
import random
import warnings

import pytest
import torch
from torch import nn

from lora_models import computed, inputs, net, pair, peft_model, saved, state
from opguard.pools._lora_math import Added, LowRank, Whole
from opguard.pools.lora import LoraCommit

QUIET = {"r": 2, "lora_alpha": 2}
ALL = ["q_proj", "v_proj", "head", "conv", "point", "line", "embed"]


# --- the arithmetic -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (700, 900), (3, 90000), (5,), (6, 4, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_is_the_plain_formula(shape, dtype):
    torch.manual_seed(0)
    source = torch.randn(shape).to(dtype)
    columns = source[0].numel()
    delta = LowRank(torch.randn(shape[0], 3), torch.randn(3, columns))
    exact = (delta.left.double() @ delta.right.double()).view(shape) + source.double()
    before = source.clone()
    out = torch.full_like(source, float("nan"))
    delta(source, out)
    assert torch.equal(source, before)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    delta(source, source)
    assert torch.equal(source, out)


def test_rows_are_rows_of_the_whole_and_bits_are_the_same_again():
    torch.manual_seed(0)
    source = torch.randn(1030, 300)
    low = LowRank(torch.randn(1030, 8), torch.randn(8, 300))
    for delta in (low, Added((Whole(torch.randn(1030, 300)), low, low))):
        whole, again, pieces = (torch.empty_like(source) for _ in range(3))
        delta(source, whole)
        delta(source, again)
        assert torch.equal(whole, again)
        for start in range(0, 1030, 257):
            stop = min(start + 257, 1030)
            delta.rows(start, stop)(source[start:stop], pieces[start:stop])
        torch.testing.assert_close(whole, pieces)


@pytest.mark.parametrize("shape", [(1024, 1024), (1000, 77), (333, 4096), (1030, 300)])
def test_bits_do_not_depend_on_the_number_of_threads(shape):
    torch.manual_seed(0)
    source = torch.randn(shape)
    delta = LowRank(torch.randn(shape[0], 16), torch.randn(16, shape[1]))
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(torch.empty_like(source))
            delta(source, found[-1])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_strided_weights():
    torch.manual_seed(0)
    delta = LowRank(torch.randn(6, 2), torch.randn(2, 36))
    plain = torch.randn(6, 4, 3, 3)
    expected = torch.empty_like(plain)
    delta(plain, expected)
    source = plain.to(memory_format=torch.channels_last)
    out = torch.empty_like(source)
    delta(source, out)
    torch.testing.assert_close(out, expected)
    turned = torch.randn(36, 6).t()
    out = torch.empty_like(turned)
    delta(turned, out)
    torch.testing.assert_close(out, turned + delta.left @ delta.right)


# --- tied weights ---------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(8, 5), nn.Linear(8, 5)
        self.other.weight = self.one.weight
        self.requires_grad_(False)


def test_two_names_of_one_weight():
    a, b = pair(5, 8)
    same = {**state("one"), **state("other")}
    different = {**state("one"), **state("other", seed=4)}
    a2, b2 = pair(5, 8, seed=4)
    model = Tied()
    before = model.one.weight.clone()
    once = computed(model, LoraCommit(same, config=QUIET))["one.weight"]
    torch.testing.assert_close(once, before + b @ a)
    with pytest.raises(ValueError, match=r"that one and other share.*tied='add'"):
        LoraCommit(different, config=QUIET).deltas(model)
    both = computed(model, LoraCommit(different, config=QUIET, tied="add"))["one.weight"]
    torch.testing.assert_close(both, before + b @ a + b2 @ a2)


def test_two_parameters_on_one_memory_are_one_weight():
    model = Tied()
    model.other.weight = nn.Parameter(model.one.weight.data, requires_grad=False)
    assert model.other.weight is not model.one.weight
    with pytest.raises(ValueError, match="that one and other share"):
        LoraCommit({**state("one"), **state("other", seed=4)}, config=QUIET).deltas(model)


# --- beside the weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_side_path_gives_peft_s_output_and_leaves_the_weights(dtype, tmp_path):
    base = net(dtype)
    made = peft_model(base, r=3, lora_alpha=7, target_modules=ALL)
    folder = saved(made, tmp_path)
    tensors = {n: p for n, p in made.named_parameters() if "lora_" in n}
    commit = LoraCommit(tensors, config=folder / "adapter_config.json", mode="hook")
    weights = copy.deepcopy(base.state_dict())
    plain = base(*inputs(dtype))
    commit.apply(base)
    patched = base(*inputs(dtype))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(patched, made(*inputs(dtype)), rtol=20 * eps, atol=20 * eps)
    assert all(torch.equal(t, weights[n]) for n, t in base.state_dict().items())
    assert not torch.equal(patched, plain)
    commit.revert(base)
    assert torch.equal(base(*inputs(dtype)), plain)
    assert not any(m._forward_hooks for m in base.modules())


def test_quantized_weights_are_refused_and_the_side_path_serves_them():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization = pytest.importorskip("torchao.quantization")
    model = net()
    model.head = nn.Linear(8, 32).requires_grad_(False)
    wide = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchao's own imports
        quantization.quantize_(
            model,
            quantization.Int8WeightOnlyConfig(),
            filter_fn=lambda module, name: name == "head",
        )
    tensors = state(outputs=32)
    with pytest.raises(TypeError, match=r"plain float weight at head .* quantize .*mode='hook'"):
        LoraCommit(tensors, config=QUIET).deltas(model)
    commit = LoraCommit(tensors, config=QUIET, mode="hook")
    plain, x = model(*inputs()), inputs()
    commit.apply(model)
    wide.load_state_dict(computed(wide, LoraCommit(tensors, config=QUIET)))
    torch.testing.assert_close(model(*x), wide(*x), rtol=0.05, atol=0.05)
    commit.revert(model)
    assert torch.equal(model(*x), plain)


def test_side_path_that_cannot_be_added_leaves_no_hook():
    model = net()
    tensors = {**state(), **state("conv")}
    with pytest.raises(ValueError, match="for Conv2d at conv"):
        LoraCommit(tensors, config=QUIET, mode="hook").apply(model)
    assert not any(m._forward_hooks for m in model.modules())
    commit = LoraCommit(state(), config=QUIET, mode="hook")
    commit.apply(model)
    with pytest.raises(ValueError, match="applied to this Net already"):
        commit.apply(model)
    commit.revert(model)
    assert not any(m._forward_hooks for m in model.modules())


# --- what pipelines save --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline_files(tmp_path_factory):
    """(parts of a pipeline without adapters, their weights fused by diffusers, its LoRA files)."""
    pytest.importorskip("diffusers")
    from diffusers import StableDiffusionPipeline
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    import tiny_diffusion

    folder = tmp_path_factory.mktemp("lora")
    parts = {"unet": tiny_diffusion._unet(0), "text_encoder": tiny_diffusion._text_parts(0)[0]}
    for part in parts.values():
        part.eval().requires_grad_(False)
    targets = {
        "unet": ["to_q", "to_out.0", "conv1", "proj_in", "time_emb_proj"],
        "text_encoder": ["q_proj", "fc1"],
    }
    layers, metadata, fused = {}, {}, {}
    torch.manual_seed(5)
    for name, part in parts.items():
        config = LoraConfig(r=2, lora_alpha=5, target_modules=targets[name])
        with_lora = copy.deepcopy(part)
        with_lora.add_adapter(config)
        for key, parameter in with_lora.named_parameters():
            if "lora_" in key:
                parameter.data = torch.randn_like(parameter) * 0.3
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(with_lora)
        metadata[f"{name}_lora_adapter_metadata"] = config.to_dict()
        fused[name] = {
            path: module.base_layer.weight + module.get_delta_weight("default")
            for path, module in with_lora.named_modules()
            if hasattr(module, "base_layer")
        }
    StableDiffusionPipeline.save_lora_weights(folder, **layers, **metadata)
    today = folder / "pytorch_lora_weights.safetensors"
    kohya = convert_state_dict_to_kohya(load_file(today))
    kohya = {k: v * 5 // 2 if "alpha" in k else v for k, v in kohya.items()}
    assert any(v.dtype == torch.int64 for v in kohya.values())  # as diffusers writes alpha
    save_file({k: v.contiguous() for k, v in kohya.items()}, folder / "kohya.safetensors")
    return parts, fused, {"diffusers": today, "kohya": folder / "kohya.safetensors"}


class Pipeline:
    def __init__(self, **parts):
        self.__dict__.update(parts)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_files_of_a_real_pipeline(pipeline_files, layout):
    parts, fused, files = pipeline_files
    found = LoraCommit(files[layout]).deltas(Pipeline(**parts))
    expected = {
        parts[part].get_submodule(path).weight: weight
        for part, weights in fused.items()
        for path, weight in weights.items()
    }
    assert len(expected) > 10
    assert {id(p) for p in found} == {id(p) for p in expected}
    for parameter, weight in expected.items():
        out = torch.empty_like(parameter)
        found[parameter](parameter.detach(), out)
        torch.testing.assert_close(out, weight)


def test_names_of_text_encoders_before_and_after_they_lost_a_level(pipeline_files):
    encoder = pipeline_files[0]["text_encoder"]
    tensors = {}
    for level in ("", "text_model."):
        for name, part in zip(("lora_A", "lora_B"), pair(16, 16), strict=True):
            tensors[f"text_encoder.{level}encoder.layers.0.self_attn.q_proj.{name}.weight"] = part
        found = LoraCommit(tensors, config=QUIET).deltas(encoder)
        assert list(found) == [encoder.get_submodule("encoder.layers.0.self_attn.q_proj").weight]
        tensors = {}


# --- anything at all ------------------------------------------------------------------------------

PARTS = (
    ("", "base_model.model.", "unet.", "lora_unet_", "lora_te_", "transformer."),
    ("head", "layers.0.q_proj", "layers_0_q_proj", "conv", "embed", "nothing", ""),
    (
        "lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_up.weight", "alpha",
        "lora_down.weight", "lora_mid.weight", "lora_B.bias", "lora_embedding_A", "weight",
        "lora_embedding_B", "modules_to_save.weight", "lora.down.weight", "to_q_lora.up.weight",
    ),
)  # fmt: skip
SHAPES = ((2, 8), (5, 2), (8, 2), (2, 3, 3, 3), (8, 2, 1, 1), (2, 13), (), (0, 8), (5,), (8, 8))
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.int64, torch.complex64, torch.bool)
SETTINGS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "modules_to_save", "bias", "unet.r")
VALUES = (None, 0, 1, True, "x", [], {"head": 2}, [1], math.nan, -1, {"(": 1}, 2.5)


def test_whatever_is_given_is_applied_or_refused_in_one_sentence():
    made, outcomes = random.Random(3), {"applied": 0, "refused": 0}
    model = net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for _ in range(250):
        tensors = {
            "base_model.model.head.lora_A.weight": torch.ones(2, 8),
            "base_model.model.head.lora_B.weight": torch.ones(made.choice((5, 5, 6)), 2),
        }
        for _ in range(made.choice((0, 1, 2))):
            prefix, module, role = (made.choice(part) for part in PARTS)
            tensor = torch.ones(made.choice(SHAPES)).to(made.choice(DTYPES))
            tensors[f"{prefix}{module}.{role}"] = tensor
        config = {made.choice(SETTINGS): made.choice(VALUES)} if made.random() < 0.5 else None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a missing alpha
                commit = LoraCommit(tensors, config=config, mode=made.choice(("weights", "hook")))
            commit.apply(model)
            commit.revert(model)
            outcomes["applied"] += 1
        except (ValueError, TypeError, LookupError) as error:
            outcomes["refused"] += 1
            text = str(error)
            assert text.startswith("expected ")
            assert "; " in text
            assert "\n" not in text
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        assert not any(m._forward_hooks for m in model.modules())
    assert min(outcomes.values()) > 10, outcomes

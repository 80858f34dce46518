"""LoRAs applied to models: the same Parameter objects, peft's outputs, the base back bit by bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from lora_models import close, computed, gpt2, inputs, merged, net, peft_model, saved, state
from opguard import pools
from opguard.pools.errors import PatchFailed
from opguard.pools.lora import LoraCommit
from opguard.pools.proxies import CommitObjectProxy

QUIET = {"r": 2, "lora_alpha": 2}
WIDTHS = [torch.float32, torch.float16, torch.bfloat16]
LINEARS = ["q_proj", "v_proj", "head"]


def bits(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def loras(count=3):
    """LoRAs that overlap in some modules."""
    paths = [("head", 5), ("layers.0.q_proj", 8), ("layers.1.v_proj", 8)]
    made = []
    for at in range(count):
        tensors = {}
        for path, outputs in (paths[at % 3], paths[(at + 1) % 3]):
            tensors.update(state(path, outputs, seed=10 + at))
        made.append(LoraCommit(tensors, scale=0.1 * (at + 1), config=QUIET, name=f"lora {at}"))
    return made


@pytest.mark.parametrize("dtype", WIDTHS)
def test_revert_gives_the_base_back_bit_by_bit(dtype):
    model = net(dtype)
    before, weight = bits(model), model.head.weight
    place = weight.data_ptr()
    (commit,) = loras(1)
    expected = computed(model, commit)
    for _ in range(3):
        commit.apply(model)
        assert model.head.weight is weight
        close(model.state_dict(), expected, rtol=0, atol=0)
        commit.revert(model)
        assert same(model, before)
        assert weight.data_ptr() == place


@pytest.mark.parametrize("kind", ["linear", "conv", "everything"])
def test_forward_under_the_patch_is_peft_s(kind, tmp_path):
    targets = {
        "linear": LINEARS,
        "conv": ["conv", "point", "line"],
        "everything": [*LINEARS, "conv", "point", "line", "embed"],
    }[kind]
    model = net()
    made = peft_model(model, r=3, lora_alpha=7, use_rslora=True, target_modules=targets)
    proxy = CommitObjectProxy(model).clone_and_add_commit(LoraCommit(saved(made, tmp_path)))
    plain = model(*inputs())
    with proxy as patched:
        torch.testing.assert_close(patched(*inputs()), made(*inputs()), rtol=1e-4, atol=1e-5)
        close(patched.state_dict(), merged(made))
    assert torch.equal(model(*inputs()), plain)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_a_stack_is_rounded_once_whatever_came_before(dtype):
    """All ways to come to a stack give the bits that it has when it is made from nothing."""
    commits = loras()
    fresh = {}
    for size in range(1, 4):
        for stack in itertools.permutations(commits, size):
            model = net(dtype)
            proxy = CommitObjectProxy(model)
            for commit in stack:
                proxy = proxy.clone_and_add_commit(commit)
            with proxy as patched:
                fresh[stack] = bits(patched)
            close(fresh[stack], computed(model, *stack), rtol=0, atol=0)
    model = net(dtype)
    before = bits(model)
    proxies = {}
    for stack in fresh:
        proxy = CommitObjectProxy(model)
        for commit in stack:
            proxy = proxy.clone_and_add_commit(commit)
        proxies[stack] = proxy
    for outer, inner in zip(fresh, list(fresh)[::-1], strict=True):
        with proxies[outer]:
            with proxies[inner] as patched:
                assert same(patched, fresh[inner])
            assert same(model, fresh[outer])
    assert same(model, before)


def test_order_of_reverts_does_not_matter():
    first, second, third = loras()
    expected = computed(net(torch.bfloat16), third)
    for order in itertools.permutations((first, second)):
        model = net(torch.bfloat16)
        before = bits(model)
        for commit in (first, second, third):
            commit.apply(model)
        for commit in order:
            commit.revert(model)
        close(model.state_dict(), expected, rtol=0, atol=0)
        third.revert(model)
        assert same(model, before)


@pytest.mark.parametrize("proxied", [False, True])
def test_a_lora_that_does_not_fit_changes_nothing(proxied):
    model = net()
    before, good = bits(model), loras(1)[0]
    bad = LoraCommit({**state(), **state("layers.9.q_proj")}, config=QUIET, name="other model's")
    if not proxied:
        with pytest.raises(LookupError, match=r"'layers\.9\.q_proj' in Net"):
            bad.apply(model)
        assert same(model, before)
        return
    proxy = CommitObjectProxy(model).clone_and_add_commit(good)
    with proxy:
        patched = bits(model)
        with pytest.raises(PatchFailed, match="other model's") as caught:
            proxy.clone_and_add_commit(bad).__enter__()
        assert caught.value.patch is bad
        assert same(model, patched)
    assert same(model, before)


def test_both_ends_of_a_tied_weight_have_the_delta(tmp_path):
    model = gpt2()
    made = peft_model(model, r=3, lora_alpha=5, target_modules=["wte", "c_attn"])
    commit = LoraCommit(saved(made, tmp_path), tied="add")
    before = bits(model)
    commit.apply(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    ours, theirs = dict(model.state_dict()), merged(made)
    close(ours, {name: theirs[name] for name in ours if name != "lm_head.weight"})
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    commit.revert(model)
    assert same(model, before)


def test_a_pipeline_of_models_is_patched_as_one():
    class Pipeline:
        def __init__(self):
            self.unet, self.text_encoder = net(), net(seed=1)

    pipeline = Pipeline()
    before = bits(pipeline.unet), bits(pipeline.text_encoder)
    tensors = {
        f"{part}.{key.removeprefix('base_model.model.')}": value
        for part in ("unet", "text_encoder")
        for key, value in state().items()
    }
    commit = LoraCommit(tensors, config=QUIET)
    commit.apply(pipeline)
    for part, old in zip((pipeline.unet, pipeline.text_encoder), before, strict=True):
        assert not torch.equal(part.head.weight, old["head.weight"])
    commit.revert(pipeline)
    assert same(pipeline.unet, before[0])
    assert same(pipeline.text_encoder, before[1])


def test_side_path_and_weights_on_one_stack():
    model = net()
    plain = model(*inputs())
    side = LoraCommit(state(seed=4), config=QUIET, mode="hook")
    weights = loras(1)[0]
    proxy = CommitObjectProxy(model)
    for commit in (side, weights):
        proxy = proxy.clone_and_add_commit(commit)
    both = LoraCommit(state(seed=4), config=QUIET)
    with CommitObjectProxy(model).clone_and_add_commit(both).clone_and_add_commit(weights):
        expected = model(*inputs())
    with proxy:
        torch.testing.assert_close(model(*inputs()), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(*inputs()), plain)


def test_caches_may_key_by_model_and_contents():
    model = net()
    keys = [CommitObjectProxy(model).clone_and_add_commit(loras(1)[0]).key for _ in range(2)]
    assert keys[0] == keys[1]


def test_evicting_a_patched_model_keeps_base_and_patch():
    model = net()
    before, (commit,) = bits(model), loras(1)
    expected = computed(model, commit)
    pools.setup_default_pools(budgets={"cpu": "1MiB"})
    handle = pools.manage(model)
    proxy = CommitObjectProxy(model).clone_and_add_commit(commit)
    try:
        with proxy:
            with pools.auto_manage(model):
                close(model.state_dict(), expected, rtol=0, atol=0)
            handle.offload()
            with pools.auto_manage(model):
                close(model.state_dict(), expected, rtol=0, atol=0)
        handle.offload()
        assert same(model, before)
    finally:
        pools.unmanage(model)
    assert same(model, before)

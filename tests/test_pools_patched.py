"""Parameters pointed at patched tensors and back: what is computed, and what is never lost."""

from __future__ import annotations

import gc
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from opguard.pools import _arenas, _parameters, _patched
from opguard.pools._patched import DeltaCommit, PatchedWeightsChanged
from opguard.pools.commits import CallableCommit, ForwardHookCommit
from opguard.pools.errors import PatchFailed
from opguard.pools.proxies import CommitObjectProxy


class LowRank:
    """What a LoRA adds; ``rows`` only where it is asked for."""

    def __init__(self, left, right, by_rows=False):
        self.left, self.right = left, right
        self.calls = 0
        if by_rows:
            self.rows = lambda start, stop: LowRank(left[start:stop], right)

    def __call__(self, source, out):
        self.calls += 1
        assert source.dtype == out.dtype
        assert not torch.is_grad_enabled()
        left, right = self.left.to(source), self.right.to(source)
        torch.addmm(source.view(len(left), -1), left, right, out=out.view(len(left), -1))


class Lora(DeltaCommit):
    """A rank-2 product for every weight of the layers named."""

    def __init__(self, seed, names=("0.weight", "2.weight"), by_rows=False):
        self.seed, self.names, self.by_rows = seed, names, by_rows

    def low_rank(self, shape):
        one = torch.Generator().manual_seed(self.seed)
        columns = shape[1:].numel()
        left = torch.randn(shape[0], 2, generator=one)
        return LowRank(left, torch.randn(2, columns, generator=one), self.by_rows)

    def deltas(self, obj):
        found = dict(obj.named_parameters())
        return {found[name]: self.low_rank(found[name].shape) for name in self.names}


class Fails(Lora):
    def low_rank(self, shape):
        def delta(source, out):
            out.fill_(7)
            raise ArithmeticError("delta")

        return delta


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).to(dtype).requires_grad_(False)
    )


def weights(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


@torch.no_grad()
def expected(base, loras):
    """What the stack must be: in fp32 or wider from the base, rounded once."""
    found = dict(base)
    for name, tensor in base.items():
        narrow = tensor.dtype in (torch.float16, torch.bfloat16)
        wide = tensor.to(torch.float32) if narrow else tensor.clone()
        for lora in loras:
            if name in lora.names:
                lora.low_rank(tensor.shape)(wide, wide)
        found[name] = wide.to(tensor.dtype)
    return found


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("by_rows", [False, True])
def test_a_stack_is_rounded_once_and_comes_off_bit_by_bit(dtype, by_rows):
    model = net(dtype)
    before, objects = weights(model), [id(p) for p in model.parameters()]
    addresses = [p.data_ptr() for p in model.parameters()]
    loras = [Lora(1, by_rows=by_rows), Lora(2, ("0.weight",)), Lora(3, by_rows=by_rows)]
    proxy = CommitObjectProxy(model, loras)
    with proxy:
        assert same(weights(model), expected(before, loras))
        assert not torch.equal(model[0].weight, before["0.weight"])
        assert [id(p) for p in model.parameters()] == objects
    assert same(weights(model), before)
    assert [p.data_ptr() for p in model.parameters()] == addresses


@pytest.mark.parametrize("rows", [1, 3, 4096])
def test_narrow_weights_are_computed_in_pieces(monkeypatch, rows):
    monkeypatch.setattr(_patched, "_TILE", rows * 8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 7, 2, bias=False)).to(torch.bfloat16)
    before = weights(model)
    loras = [Lora(seed, ("0.weight",), by_rows=True) for seed in (1, 2)]
    with CommitObjectProxy(model, loras):
        assert same(weights(model), expected(before, loras))
    assert same(weights(model), before)


def test_weights_that_do_not_fit_their_dtype_are_refused_and_what_was_infinite_stays_so():
    model = net(torch.float16)
    before = weights(model)

    class Huge(DeltaCommit):
        def deltas(self, obj):
            return {obj[0].weight: lambda source, out: torch.mul(source, 1e6, out=out)}

    with pytest.raises(PatchFailed, match=r"of shape \(5, 6\) to fit float16"):
        CommitObjectProxy(model, [Huge()]).__enter__()
    assert same(weights(model), before)
    model[0].weight[0, 0] = float("inf")
    with CommitObjectProxy(model, [Lora(1)]):
        assert model[0].weight[0, 0] == float("inf")


def test_what_lies_between_two_patches_does_not_change_what_they_compute():
    model = net(torch.bfloat16)
    before = weights(model)
    one, two = Lora(1), Lora(2)
    hook = ForwardHookCommit(lambda *_: None)
    with CommitObjectProxy(model, [one, hook, two]):
        assert same(weights(model), expected(before, [one, two]))
        with CommitObjectProxy(model, [one, hook]):
            assert same(weights(model), expected(before, [one]))
        assert same(weights(model), expected(before, [one, two]))
    assert same(weights(model), before)


def test_two_objects_that_share_a_parameter_are_patched_in_any_order():
    model = net(torch.float16)
    before = weights(model)
    whole, part = Lora(1, ("0.weight",)), Lora(2, ("weight",))
    outer = CommitObjectProxy(model, [whole])
    inner = CommitObjectProxy(model[0], [part])
    part_named = Lora(2, ("0.weight",))
    outer.__enter__()
    inner.__enter__()
    assert same(weights(model), expected(before, [whole, part_named]))
    outer.__exit__(None, None, None)
    assert same(weights(model), expected(before, [part_named]))
    inner.__exit__(None, None, None)
    assert same(weights(model), before)
    assert id(model[0].weight) not in _patched._states


stacks = st.lists(st.integers(0, 4), max_size=4, unique=True)


@settings(deadline=None, max_examples=60)
@given(st.lists(stacks, min_size=1, max_size=5), st.integers(0, 12), st.booleans())
def test_weights_are_always_the_stack_of_the_innermost_block(blocks, failing, narrow):
    model = net(torch.bfloat16 if narrow else torch.float32)
    before = weights(model)
    commits = [
        Lora(0),
        Lora(1, ("0.weight",)),
        Lora(2, ("2.weight",), by_rows=True),
        ForwardHookCommit(lambda *_: None),
        Fails(4, ("2.weight",)) if failing % 3 == 0 else Lora(4),
    ]

    def check(stack):
        loras = [commits[i] for i in stack if isinstance(commits[i], Lora)]
        assert same(weights(model), expected(before, loras))

    def nest(rest, around):
        check(around)
        if not rest:
            return
        proxy = CommitObjectProxy(model, [commits[i] for i in rest[0]])
        if 4 in rest[0] and isinstance(commits[4], Fails):
            with pytest.raises(PatchFailed, match="delta"):
                proxy.__enter__()
            check(around)
            nest(rest[1:], around)
            return
        with proxy:
            nest(rest[1:], rest[0])
            check(rest[0])
        check(around)

    nest(blocks, [])
    assert same(weights(model), before)
    assert id(model[0].weight) not in _patched._states


# --- tied weights, views --------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, by_parameter: bool):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        if by_parameter:
            self.head.weight = self.embed.weight
        else:
            self.head.weight = nn.Parameter(self.embed.weight.data)
        self.requires_grad_(False)


@pytest.mark.parametrize("by_parameter", [True, False])
def test_tied_weights_take_one_delta_and_stay_tied(by_parameter):
    model = Tied(by_parameter)
    before = weights(model)
    lora = Lora(1, ("embed.weight",))
    with CommitObjectProxy(model, [lora]):
        after = expected(before, [lora])["embed.weight"]
        assert torch.equal(model.embed.weight, after)
        assert torch.equal(model.head.weight, after)
        assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()
    assert same(weights(model), before)
    assert model.head.weight.data_ptr() == model.embed.weight.data_ptr()


def test_tied_weights_with_two_deltas_and_views_are_refused():
    model = Tied(by_parameter=False)
    before = weights(model)
    both = Lora(1, ("embed.weight", "head.weight"))
    with pytest.raises(PatchFailed, match="share memory and both have a delta"):
        CommitObjectProxy(model, [both]).__enter__()
    model.register_buffer("part", model.embed.weight.data[1:3])
    with pytest.raises(PatchFailed, match=r"embed.weight and part share memory in part"):
        CommitObjectProxy(model, [Lora(1, ("embed.weight",))]).__enter__()
    assert same(weights(model), {**before, "part": before["embed.weight"][1:3]})


def test_neighbours_in_one_storage_are_not_views_of_each_other():
    flat = torch.randn(20 + 30)
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(5, 6, bias=False))
    model.requires_grad_(False)
    model[0].weight.data = flat[:20].view(4, 5)
    model[1].weight.data = flat[20:].view(6, 5)
    before, lora = weights(model), Lora(1, ("0.weight",))
    with CommitObjectProxy(model, [lora]):
        assert same(weights(model), expected(before, [lora]))
    assert same(weights(model), before)


def test_transposed_weights_keep_their_strides():
    model = net()
    model[0].weight.data = torch.randn(6, 5).t()
    strides = model[0].weight.stride()
    before = weights(model)

    class Halved(DeltaCommit):
        def deltas(self, obj):
            return {obj[0].weight: lambda source, out: torch.mul(source, 0.5, out=out)}

    with CommitObjectProxy(model, [Halved()]):
        assert model[0].weight.stride() == strides
        assert torch.equal(model[0].weight, before["0.weight"] * 0.5)
    assert same(weights(model), before)


# --- refusals -------------------------------------------------------------------------------------


def test_what_cannot_be_pointed_is_refused_by_name_and_nothing_changes():
    class Quantized(torch.Tensor):
        pass

    class Any_(Lora):
        def low_rank(self, shape):
            return lambda source, out: out.copy_(source)

    inner = nn.Linear(3, 3)
    cases = [
        (nn.Linear(3, 3, device="meta"), "weight to be a plain tensor, got a meta tensor"),
        (inner, "weight to be a plain tensor, got Quantized"),
        (nn.Linear(3, 3), r"weight to be of a floating dtype, got torch\.int8"),
    ]
    inner.weight = nn.Parameter(torch.ones(3, 3).as_subclass(Quantized))
    cases[0][0].bias = nn.Parameter(torch.ones(3))
    ints = torch.ones(3, 3, dtype=torch.int8)
    cases[2][0].weight = nn.Parameter(ints, requires_grad=False)
    for model, message in cases:
        kept = model.weight
        with pytest.raises(PatchFailed, match=message) as failed:
            CommitObjectProxy(model, [Any_(1, ("bias", "weight"))]).__enter__()
        assert isinstance(failed.value.__cause__, TypeError)
        assert model.weight is kept
        assert id(model.bias) not in _patched._states


@pytest.mark.parametrize("trains", [True, False])
def test_a_live_graph_is_refused_and_once_it_is_gone_it_works(trains):
    model = net().requires_grad_(trains)
    before = weights(model)
    x = torch.randn(2, 6, requires_grad=True)
    y = model(x).sum()
    proxy = CommitObjectProxy(model, [Lora(1)])
    with pytest.raises(PatchFailed, match="live graph"):
        proxy.__enter__()
    y.backward()
    del y
    with proxy:
        pass
    assert same(weights(model), before)


def test_a_graph_made_under_the_patch_is_not_silently_run_with_the_base():
    model = net().requires_grad_(True)
    with CommitObjectProxy(model, [Lora(1)]):
        y = model(torch.randn(2, 6, requires_grad=True)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with CommitObjectProxy(net().requires_grad_(True), [Lora(1)]) as model:
        model(torch.randn(2, 6)).sum().backward()
    assert model[0].weight.grad is not None


def test_where_torch_does_not_tell_of_graphs_their_backward_raises(monkeypatch):
    monkeypatch.setattr(_parameters, "_use_count", None)
    model = net().requires_grad_(True)
    before = weights(model)
    y = model(torch.randn(2, 6, requires_grad=True)).sum()
    with CommitObjectProxy(model, [Lora(1)]), pytest.raises(RuntimeError, match="modified by"):
        y.backward()
    assert same(weights(model), before)


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_failing_at_any_parameter_leaves_every_one_where_it_was(monkeypatch, error):
    model = net()
    before = weights(model)
    point = _parameters._point
    first = Lora(1)
    outer, inner = (CommitObjectProxy(model, s) for s in ([first], [first, Lora(2)]))
    at = 0
    while True:
        count = 0

        def failing(parameter, where):
            nonlocal count
            count += 1
            if count - 1 == at:  # noqa: B023
                raise error("pointing")
            point(parameter, where)

        with outer:
            inside = weights(model)
            monkeypatch.setattr(_parameters, "_point", failing)
            entered = False
            try:
                with inner:
                    entered = True
            except (PatchFailed, KeyboardInterrupt) as failed:
                assert isinstance(failed, KeyboardInterrupt) == (error is KeyboardInterrupt)
                patched = expected(before, inner.commits) if entered else inside
                assert same(weights(model), patched)
            else:
                break
            finally:
                monkeypatch.undo()
        assert same(weights(model), before)
        at += 1
    assert at == 4  # two parameters pointed there, and two back
    assert id(model[0].weight) not in _patched._states


def test_the_commit_that_fails_in_a_squashed_stack_is_named():
    class Refuses(Lora):
        def deltas(self, obj):
            raise LookupError("no such layer")

    model, bad = net(), Refuses(2)
    with pytest.raises(PatchFailed, match="no such layer") as failed:
        CommitObjectProxy(model, [Lora(1), bad, Lora(3)]).__enter__()
    assert failed.value.patch is bad
    assert isinstance(failed.value.__cause__, LookupError)


# --- changes under the patch ----------------------------------------------------------------------


def test_what_is_written_to_patched_weights_is_told_of_and_kept_and_the_base_is_as_it_was():
    model = net()
    before = weights(model)
    proxy = CommitObjectProxy(model, [Lora(1)])
    proxy.__enter__()
    model[0].weight.add_(1)
    written = model[0].weight.clone()
    with pytest.warns(PatchedWeightsChanged, match=r"0\.weight changed") as told:
        proxy.__exit__(None, None, None)
    assert same(weights(model), before)
    assert set(told[0].message.tensors) == {"0.weight"}
    with CommitObjectProxy(model, [Lora(2)]):
        assert torch.equal(told[0].message.tensors["0.weight"], written)


def test_what_was_written_below_another_patch_is_told_of_too():
    model = net()
    before = weights(model)
    outer, inner = CommitObjectProxy(model, [Lora(1)]), CommitObjectProxy(model, [Lora(2)])
    stacked = outer.clone_and_add_commit(Lora(2))
    for one in (inner, stacked):
        outer.__enter__()
        model[0].weight.add_(1)
        if one is inner:
            with pytest.warns(PatchedWeightsChanged), one:
                pass
            outer.__exit__(None, None, None)
        else:
            with one:
                pass
            with pytest.warns(PatchedWeightsChanged):
                outer.__exit__(None, None, None)
        assert same(weights(model), before)


def test_told_of_as_an_error_it_is_raised_after_all_is_done():
    model = net()
    before = weights(model)
    proxy = CommitObjectProxy(model, [Lora(1)])
    with pytest.raises(PatchedWeightsChanged), proxy:
        model[0].weight.zero_()
    assert same(weights(model), before)
    assert proxy.applied == ()
    lora = Lora(1)
    lora.apply(model)
    model[0].weight.zero_()
    with pytest.raises(PatchedWeightsChanged):
        lora.revert(model)
    assert same(weights(model), before)


def test_weights_converted_under_the_patch_are_told_of_and_put_back():
    model = net()
    before = weights(model)
    proxy = CommitObjectProxy(model, [Lora(1)])
    proxy.__enter__()
    model.half()
    with pytest.raises(PatchFailed, match="moved or converted"):
        proxy.clone_and_add_commit(Lora(2)).__enter__()
    with pytest.warns(PatchedWeightsChanged):
        proxy.__exit__(None, None, None)
    assert {p.dtype for n, p in model.named_parameters() if n in Lora(1).names} == {torch.float32}
    assert torch.equal(model[0].weight, before["0.weight"])


def test_reading_weights_and_running_them_is_no_change():
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with CommitObjectProxy(model, [Lora(1)]):
            model(torch.randn(2, 6))
            model.state_dict()
            with torch.inference_mode():
                model(torch.randn(2, 6))


# --- inference mode, threads ----------------------------------------------------------------------


def test_in_inference_mode_and_with_weights_made_there():
    with torch.inference_mode():
        inside = net()
    for model in (inside, net()):
        before = weights(model)
        with torch.inference_mode():
            with CommitObjectProxy(model, [Lora(1)]):
                patched = weights(model)
            assert same(patched, expected(before, [Lora(1)]))
        assert same(weights(model), before)


def test_two_models_are_patched_by_two_threads_with_one_commit():
    lora, errors = Lora(1), []

    def work():
        try:
            model = net()
            before = weights(model)
            proxy = CommitObjectProxy(model, [lora])
            for _ in range(20):
                with proxy:
                    assert same(weights(model), expected(before, [lora]))
                assert same(weights(model), before)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors


# --- memory ---------------------------------------------------------------------------------------


def test_memory_stays_warm_while_a_proxy_lives_and_goes_with_the_last():
    model = net()
    proxy = CommitObjectProxy(model, [Lora(1)])
    other = CommitObjectProxy(model, [Lora(2)])
    places = set()
    for one in (proxy, other, proxy):
        with one:
            places.add(model[0].weight.data_ptr())
    assert len(places) == 1
    del proxy, other, one
    gc.collect()
    assert id(model) not in _arenas._free


def test_memory_that_somebody_keeps_is_not_used_again():
    model = net()
    proxy = CommitObjectProxy(model, [Lora(1)])
    with proxy:
        kept = model[0].weight.detach()
        copy = kept.clone()
    with CommitObjectProxy(model, [Lora(2)]):
        assert kept.data_ptr() != model[0].weight.data_ptr()
        assert torch.equal(kept, copy)


def test_patched_weights_take_only_their_own_bytes():
    model = net()
    with CommitObjectProxy(model, [Lora(1, ("0.weight",))]):
        chunks = _patched._states[id(model[0].weight)].levels[0].patch.chunks
        assert [c.nbytes for c in chunks.values()] == [_arenas.rounded(6 * 5 * 4)]


def test_a_commit_that_changes_weights_itself_goes_along():
    model = net()
    before = weights(model)

    def double(obj):
        old = obj[2].weight.data
        obj[2].weight.data = old * 2
        return lambda: setattr(obj[2].weight, "data", old)

    lora = Lora(1, ("2.weight",))
    with CommitObjectProxy(model, [CallableCommit(double), lora]):
        doubled = {**before, "2.weight": before["2.weight"] * 2}
        assert same(weights(model), expected(doubled, [lora]))
    assert same(weights(model), before)

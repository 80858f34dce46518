"""GuardedTensor and check_ops where somebody would look for a hole."""

import asyncio
import contextlib

import pytest
import torch
from torch import nn

from opguard.flags import check, check_ops, err, flag_nan_and_inf, flags, guard, push


def flagged(x, first=1):
    """``x`` guarded, row i with an error at the location first + i."""
    rows = [push(err.new_t(1), err.NAN, first + i) for i in range(x.shape[0])]
    return guard(x).with_flags(torch.cat(rows))


def locations(g):
    """Of each row the locations that its flags name."""
    rows = [flags.unpack(g.flags, i) for i in range(g.flags.shape[0])]
    return [sorted(error.location for error in row) for row in rows]


def bad_row(row=1):
    x = torch.ones(4, 8)
    x[row] = torch.nan
    return flag_nan_and_inf(guard(x), "input")


# --- memory that is seen otherwise ---------------------------------------------------------------


def test_half_of_a_row_written_through_another_dtype_keeps_its_flags():
    g = flagged(torch.randn(3, 2, dtype=torch.complex64))
    torch.view_as_real(g)[0, 0] = flagged(torch.randn(1, 2), 8)[0]
    assert locations(g) == [[1, 8], [2], [3]]


def test_a_row_written_whole_through_another_dtype_has_new_flags():
    g = flagged(torch.randn(3, 2))
    g.view(torch.int16)[0] = flagged(torch.randn(1, 2), 8).view(torch.int16)[0]
    assert locations(g) == [[8], [2], [3]]


def test_windows_that_overlap_are_no_whole_row():
    g = flagged(torch.randn(3, 4))
    windows = g.unfold(1, 2, 1)  # 6 elements of 4
    windows[0, :2].copy_(flagged(torch.randn(1, 2), 8).expand(2, 2))
    assert locations(g) == [[1, 8], [2], [3]]


# --- inference mode ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "view",
    [lambda g: g[1:], torch.t, torch.Tensor.detach, lambda g: g.chunk(2, 1)[0]],
    ids=["slice", "t", "detach", "chunk"],
)
def test_views_in_inference_mode_of_what_was_made_outside(view):
    g = bad_row()
    with torch.inference_mode():
        seen = view(g)
    assert not seen.is_inference()
    assert torch.equal(seen.flags, view(g).flags)
    seen.zero_()  # a normal view: it may be written into outside
    assert g.unwrap().isfinite().any(1).all()


# --- compiled functions whose graphs break -------------------------------------------------------


def test_between_two_graphs_a_guarded_tensor_is_made_whole():
    @torch.compile(backend="aot_eager")
    def good(g):
        return g.take_ok() * 2  # its size is data: the graph ends there

    assert good(bad_row()).shape == (3, 8)
    assert not good(bad_row(0)).has_err()


def test_compiled_autograd_takes_guarded_tensors():
    layer = nn.Linear(8, 2)
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda g: layer(g).sum().backward(), backend="aot_eager")(bad_row())
    assert type(layer.weight.grad) is torch.Tensor


# --- words ---------------------------------------------------------------------------------------


def test_a_guarded_number_is_formatted_as_one():
    assert f"loss {guard(torch.tensor([1.0, 0.5])).sum():.3f}" == "loss 1.500"
    assert f"{guard(torch.ones(1))}".startswith("GuardedTensor(")
    with pytest.raises(TypeError, match="format"):
        f"{guard(torch.ones(2)):.3f}"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: guard([1.0]), "expected a tensor"),
        (lambda: guard(torch.ones(2), 3), "ErrorConfig"),
        (lambda: bad_row().with_flags(None), "expected flags"),
        (lambda: check_ops("nan"), "checks="),
        (lambda: check_ops([torch.ones(2)]), "got list"),
    ],
)
def test_what_is_no_tensor_is_named(call, words):
    with pytest.raises(TypeError, match=words):
        call()


def test_recurrent_layers_say_which_state_to_pass_and_take_it():
    g = bad_row().unsqueeze(1).expand(4, 3, 8)
    layer = nn.GRU(8, 2, batch_first=True)
    with pytest.raises(NotImplementedError, match=r"guard\(h0\)"):
        layer(g)
    _, last = layer(g, guard(torch.zeros(1, 4, 2)))
    assert last.is_err().tolist() == [False, True, False, False]
    packed = nn.utils.rnn.pack_padded_sequence(g, torch.tensor([3, 2, 2, 1]), batch_first=True)
    state = guard(torch.zeros(1, 4, 2))
    _, (last, _) = nn.LSTM(8, 2, batch_first=True)(packed, (state, state))
    assert last.is_err().tolist() == [False, True, False, False]


# --- check_ops: casts, and an Inf that is put somewhere -----------------------------------------


def in_both(function, x):
    """The locations and the samples that check_ops finds, eager and compiled."""
    found = []
    for call in (function, torch.compile(function, backend="aot_eager")):
        with check_ops(x, backend="aot_eager") as c:
            call(x.clone())
        found.append((sorted(c.locations), err.is_err(c.flags).nonzero().flatten().tolist()))
        torch._dynamo.reset()
    eager, compiled = found
    assert eager == compiled
    return eager


def large(row=3):
    x = torch.ones(4, 8)
    x[row, 1] = 1e5
    return x


def test_a_cast_that_overflows_is_found():
    (name,), samples = in_both(lambda x: x.half() * 2, large())
    assert name.startswith("aten::_to_copy at test_flags_guarded_odd.py:")
    assert samples == [3]
    (name,), samples = in_both(lambda x: torch.zeros(4, 8).half().copy_(x), large())
    assert name.startswith("aten::copy_ at ")
    assert samples == [3]
    assert in_both(lambda x: x.half(), torch.tensor([[1], [70_000]]))[1] == [1]


def test_autocast_overflows_at_the_cast():
    def function(x):
        with torch.autocast("cpu", torch.float16):
            return nn.functional.linear(x, torch.ones(2, 8))

    (name,), samples = in_both(function, large())
    assert name.startswith("aten::_to_copy at ")
    assert samples == [3]


def test_a_cast_that_makes_nothing_is_quiet():
    lowest = torch.finfo(torch.float32).min  # what masks have: -inf in bfloat16
    assert in_both(lambda x: x.bfloat16() * 2, large()) == ([], [])
    assert in_both(lambda x: x.double(), large()) == ([], [])
    mask = torch.zeros(4, 8).index_fill(1, torch.tensor([2]), lowest)
    assert in_both(lambda x: (x.bfloat16() + mask.bfloat16()).softmax(-1), large()) == ([], [])


def test_a_number_that_is_put_somewhere_is_meant():
    at = torch.tensor([[1], [2], [3], [4]])
    assert in_both(lambda x: x.scatter(1, at, -torch.inf).softmax(-1), large()) == ([], [])
    assert in_both(lambda x: x.index_fill(1, at[0], -torch.inf), large()) == ([], [])
    assert in_both(lambda x: x * torch.inf, large()) == ([], [])


def test_a_block_in_compiled_code_is_refused_and_leaves_nothing():
    def function(x):
        with check_ops(x):
            return x.log()

    with pytest.raises(RuntimeError, match="outside of compiled code"):
        torch.compile(function, backend="aot_eager")(torch.ones(2))
    with check_ops(large(), backend="aot_eager"):
        pass
    assert torch._dynamo.eval_frame._stance.backend is None


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", [(4, 8), (4, 2, 8)])
def test_an_inf_weight_is_found_at_the_layer_that_used_it(mode, shape):
    layer = nn.Linear(8, 2)
    with torch.no_grad():
        layer.weight[0, 0] = torch.inf
    with mode(), check_ops(x := torch.ones(shape)) as c:
        layer(x).sigmoid()
    assert len(c.locations) == 1
    assert err.is_err(c.flags).all()


# --- tasks of one thread -------------------------------------------------------------------------


def negative_row(row):
    x = torch.ones(4, 8)
    x[row] = -1
    return x


async def logarithm(x):
    await asyncio.sleep(0)
    return x.log()


async def checked(row):
    with check_ops(x := negative_row(row)) as c:
        await asyncio.sleep(0)
        check(x[:, 0] > 0, "negative")
        await asyncio.gather(logarithm(x), logarithm(x))  # begun in the block: seen in it
    return len(c.locations), err.is_err(c.flags).nonzero().flatten().tolist()


def test_tasks_see_their_own_ops_and_those_of_tasks_they_begin():
    async def together():
        return await asyncio.gather(*(checked(row) for row in range(3)), logarithm(negative_row(3)))

    *found, _ = asyncio.run(together())
    assert found == [(2, [0]), (2, [1]), (2, [2])]


def test_a_block_around_a_loop_sees_its_tasks():
    with check_ops(x := negative_row(2)) as c:
        asyncio.run(logarithm(x))
    assert err.is_err(c.flags).tolist() == [False, False, True, False]


# --- interrupts ----------------------------------------------------------------------------------


def assert_nothing_is_left():
    assert torch._C._len_torch_dispatch_stack() == 0
    assert torch._dynamo.eval_frame._stance.backend is None
    with check_ops(x := negative_row(1)) as c:
        x.log()
    assert err.is_err(c.flags).tolist() == [False, True, False, False]
    assert torch._dynamo.eval_frame._stance.backend is None


def once_interrupted(function):
    calls = []

    def call(*args):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return function(*args)

    return call


@pytest.mark.parametrize("name", ["push_modes", "_set_stance"])
def test_a_block_that_is_interrupted_while_it_begins(name, monkeypatch):
    from torch._dynamo import eval_frame

    from opguard.flags import _opchecks_eager

    module = _opchecks_eager if name == "push_modes" else eval_frame
    stack = contextlib.ExitStack()
    monkeypatch.setattr(module, name, once_interrupted(getattr(module, name)))
    with pytest.raises(KeyboardInterrupt):
        stack.enter_context(check_ops())
    assert_nothing_is_left()


@pytest.mark.parametrize("name", ["pop_modes", "_set_stance"])
def test_a_block_that_is_interrupted_while_it_ends(name, monkeypatch):
    from torch._dynamo import eval_frame

    from opguard.flags import _opchecks_eager

    module = _opchecks_eager if name == "pop_modes" else eval_frame
    stack = contextlib.ExitStack()
    block = stack.enter_context(check_ops())
    monkeypatch.setattr(module, name, once_interrupted(getattr(module, name)))
    with pytest.raises(KeyboardInterrupt):
        stack.close()
    assert_nothing_is_left()
    with block:  # it may be entered again
        pass


def test_an_interrupt_while_a_block_looks_does_not_blind_the_next():
    from opguard.flags._opchecks_eager import HERE

    HERE.busy = True  # what is left when one arrives as the look ends
    assert_nothing_is_left()

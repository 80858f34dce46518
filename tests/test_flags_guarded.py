"""GuardedTensor in eager code: whose flags, over which memory, kept and copied how."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from opguard import flags as F
from opguard.flags import GuardedTensor, guard

NAN = float("nan")


def made(n, bad, *shape, location="here"):
    """Ones (n, *shape), the samples ``bad`` of which have an error."""
    seen = torch.zeros(n, 1)
    seen[bad] = NAN
    return GuardedTensor(torch.ones(n, *shape), F.flag_nan(seen, location))


def bad(g):
    """The rows that have errors."""
    return F.err.is_err(g.flags).nonzero().flatten().tolist()


@pytest.fixture
def g():
    return made(3, [1], 4)


# --- what it is ---------------------------------------------------------------------------------


def test_flags_follow_what_is_computed(g):
    x = torch.randn(3, 4)
    y = torch.relu(GuardedTensor(x, g.flags) * 2) + guard(torch.ones(3, 4))
    assert type(y) is GuardedTensor
    assert (bad(y), y.batch_dims) == ([1], (0,))
    assert torch.equal(y.unwrap(), torch.relu(x * 2) + 1)
    assert type(y.unwrap()) is torch.Tensor


def test_without_a_batch_there_is_one_row(g):
    assert g.sum(0).flags.shape[0] == 1
    assert g.sum(0).batch_dims == ()
    assert bad(g.sum(0)) == [0]
    assert bad(g[0]) == []
    assert bad(g[1]) == [0]


def test_a_batch_of_one_broadcasts(g):
    y = guard(torch.ones(1, 4)) + g
    assert bad(y) == [1]


def test_fewer_slots_later_cut_nothing(g):
    before = F.get_config()
    F.set_config(F.ErrorConfig(num_slots=4))
    try:
        narrow = made(3, [0], 4, location="there")
    finally:
        F.set_config(before)
    y = g + narrow
    assert bad(y) == [0, 1]
    assert y.flags.shape[1] * 4 == before.num_slots


def test_refuses_flags_of_another_batch(g):
    with pytest.raises(F.BatchMismatchError, match="expected flags of the 2 samples in data"):
        GuardedTensor(torch.ones(2, 1), g.flags)
    with pytest.raises(F.FlagsLayoutError):
        GuardedTensor(torch.ones(3, 1), torch.ones(3))
    with pytest.raises(F.FlagsError, match="without dimensions"):
        guard(torch.tensor(1.0))
    with pytest.raises(F.FlagsError, match="expected lost to be"):
        guard(torch.ones(2), lost="ignore")
    with pytest.raises(TypeError, match="plain tensor"):
        GuardedTensor(g, g.flags)
    with pytest.raises(F.BatchMismatchError, match="of the 3 rows"):
        g.with_flags(g.flags[:2])


def test_an_op_without_a_rule_is_refused_or_merged_by_choice(g):
    with pytest.raises(NotImplementedError, match=r"guard\(x, lost=.merge.\)"):
        g.to_sparse()
    merging = GuardedTensor(torch.ones(3, 4), g.flags, lost="merge")
    (y,) = torch._foreach_add([merging * 2], 1.0)
    assert (bad(y), y.batch_dims) == ([0], ())
    assert torch.equal(y.unwrap(), torch.full((3, 4), 3.0))


def test_numbers_come_out_of_it_and_arrays_do_not(g):
    assert g.sum().item() == 12.0
    assert bool(g[0, 0] > 0)
    assert g.tolist() == [[1.0] * 4] * 3
    assert "1 of 3 rows with errors" in repr(g)
    arrays = (g.numpy, g.__array__, lambda: torch.from_dlpack(g))
    for refused in (*arrays, lambda: g.apply_(abs), lambda: g.map_(g, max)):
        with pytest.raises(TypeError, match=r"\.unwrap\(\)"):
            refused()


# --- the data is never touched ------------------------------------------------------------------


def test_the_data_is_shared_and_untouched(g):
    x = torch.tensor([[-0.0], [NAN], [1.0]])
    h = GuardedTensor(x, g.flags)
    assert guard(h) is h
    for same in (h, guard(x), h.with_flags(g.flags), F.flag_nan(h, "again"), h.detach()):
        assert same.unwrap().data_ptr() == x.data_ptr()
        assert torch.signbit(same.unwrap())[0].item()
    assert bad(F.flag_nan(guard(x), "again")) == [1]


def allocated(work):
    """Bytes that torch takes while ``work`` runs."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(profile_memory=True, activities=[cpu]) as profile:
        kept = work()
    del kept
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())


def test_guarding_and_recording_allocate_flags_only():
    x = torch.ones(4, 100_000)
    flags = F.flag_nan(x[:, :1], "here")

    def work():
        h = GuardedTensor(x, flags)
        return guard(x), F.flag_nan(h, "there"), h.with_flags(flags).unwrap(), h[1:], h.t()

    assert allocated(work) < x.nbytes / 100
    assert allocated(lambda: x + 0) >= x.nbytes
    assert x.nbytes <= allocated(lambda: GuardedTensor(x, flags) + 0) < x.nbytes * 1.01


def test_an_op_runs_once_and_on_the_data_alone(g):
    big = GuardedTensor(torch.ones(3, 100_000), g.flags)
    with Counting() as ops:
        big.relu()
    assert ops.big == ["relu"]
    with Counting() as ops:
        big.mul_(2)
    assert ops.big == ["mul_"]


class Counting(TorchDispatchMode):
    """The names of ops whose results are large."""

    def __init__(self):
        super().__init__()
        self.big = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind is GuardedTensor for kind in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() > 1000:
            self.big.append(func._opname)
        return out


# --- gradients ----------------------------------------------------------------------------------


def test_gradients_are_plain_and_those_of_the_data(g):
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.GELU())
    x = torch.randn(3, 4, requires_grad=True)
    net(x).square().sum().backward()
    expected = [x.grad, *(p.grad for p in net.parameters())]
    x.grad = None
    net.zero_grad()
    y = net(GuardedTensor(x, g.flags)).square()
    assert bad(y) == [1]
    y.sum().backward()
    for ours, theirs in zip([x.grad, *(p.grad for p in net.parameters())], expected, strict=True):
        assert type(ours) is torch.Tensor
        assert torch.equal(ours, theirs)


def test_a_leaf_gets_a_plain_gradient_and_hooks_see_plain_ones(g):
    leaf = g.requires_grad_()
    y = leaf * 3
    seen = []
    y.register_hook(lambda grad: seen.append(type(grad)))
    y.backward(guard(torch.ones(3, 4)))
    assert type(leaf.grad) is torch.Tensor
    assert torch.equal(leaf.grad, torch.full((3, 4), 3.0))
    assert seen == [torch.Tensor]


def test_gradients_of_gradients(g):
    x = torch.ones(3, 4, requires_grad=True)
    (first,) = torch.autograd.grad((GuardedTensor(x, g.flags) ** 3).sum(), x, create_graph=True)
    first.sum().backward()
    assert type(x.grad) is torch.Tensor
    assert torch.equal(x.grad, torch.full((3, 4), 6.0))


def test_checkpointing_computes_flags_again(g):
    layer = torch.nn.Linear(4, 4)
    seen = []

    def block(h):
        y = layer(h).tanh()
        seen.append(bad(y))
        return (y * 2).exp()

    x = torch.ones(3, 4, requires_grad=True)
    checkpoint(block, GuardedTensor(x, g.flags), use_reentrant=False).sum().backward()
    assert seen == [[1], [1]]
    assert type(x.grad) is torch.Tensor


# --- writes -------------------------------------------------------------------------------------


def test_what_is_written_brings_its_flags(g):
    clean = guard(torch.ones(3, 4))
    clean[2] = g[1]
    assert bad(clean) == [2]
    clean[2] = 0.0
    assert bad(clean) == []
    clean.add_(g)
    assert bad(clean) == [1]
    clean[1, 0] = 0.0
    assert bad(clean) == [1]  # the other elements of the row are as they were
    clean.copy_(guard(torch.zeros(3, 4)))
    assert bad(clean) == []


def test_all_views_of_a_memory_know_of_a_write(g):
    base = guard(torch.ones(3, 4))
    row, rows, turned, split = base[1], base[1:], base.t(), base.view(3, 2, 2)
    first, second, _ = base.unbind(0)
    base[1] = g[1]
    assert (bad(row), bad(rows), bad(turned), bad(split)) == ([0], [0], [1], [1])
    assert (bad(first), bad(second)) == ([], [0])
    turned.mul_(made(3, [2], 4).t())
    assert (bad(base), bad(rows)) == ([1, 2], [0, 1])
    rows[0].zero_()
    assert (bad(base), bad(row), bad(second)) == ([2], [], [])
    base.view(3, 2, 2)[2, 0].zero_()  # half of the row
    assert bad(base) == [2]
    base.detach()[2] = 0
    assert bad(base) == []


def test_other_flags_over_one_memory_learn_of_writes_on_either_side(g):
    base = guard(torch.ones(3, 4))
    flagged = base.with_flags(g.flags)
    flagged[0].add_(made(1, [0], 4)[0])
    assert (bad(flagged), bad(base)) == ([0, 1], [0, 1])
    base[2] = made(1, [0], 4)[0]
    assert bad(flagged) == [0, 1, 2]


def test_strides_of_any_kind_are_followed(g):
    base = made(4, [1], 4)
    assert bad(base.as_strided((2, 4), (8, 1))) == []
    assert bad(base.as_strided((2, 4), (8, 1), 4)) == [0]
    assert bad(base.as_strided((4,), (5,))) == [1]
    odd = base.as_strided((3, 2, 2), (4, 2, 1), 2)  # rows that straddle two samples
    assert odd.batch_dims == (0, 1)
    assert bad(odd) == [1, 2]


def test_out_takes_the_flags_and_the_size(g):
    out = guard(torch.zeros(3, 4))
    assert torch.add(g, 1, out=out) is out
    assert bad(out) == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = guard(torch.zeros(0))
        torch.add(g, 1, out=small)
    assert (bad(small), small.shape) == ([1], (3, 4))


def test_a_tensor_without_flags_takes_none(g):
    plain = torch.zeros(3, 4)
    with pytest.raises(NotImplementedError, match=r"expected self of .*copy_.* GuardedTensor"):
        plain[0] = g[0]
    with pytest.raises(NotImplementedError, match="expected out of"):
        torch.add(g, 1, out=plain)
    with pytest.raises(NotImplementedError, match="_foreach_add_"):
        torch._foreach_add_([g], [made(3, [0], 4)])
    with pytest.raises(NotImplementedError):
        g.resize_(2, 2)
    assert not plain.any()
    assert (g.tolist(), bad(g)) == ([[1.0] * 4] * 3, [1])


def test_the_data_is_not_exchanged(g):
    with pytest.raises(TypeError, match=r"GuardedTensor\(data, flags\)"):
        g.data = torch.zeros(3, 4)
    assert bad(g.data) == [1]
    assert g.data.data_ptr() == g.unwrap().data_ptr()


def test_in_place_ops_that_change_the_shape(g):
    g.t_()
    assert (g.shape, g.batch_dims, bad(g + 1)) == ((4, 3), (1,), [1])
    row, turned = g[:, 2], g.t()
    g.unsqueeze_(0)
    assert (g.shape, g.batch_dims, bad(g)) == ((1, 4, 3), (2,), [1])
    g[0, :, 2] = made(1, [0], 4)[0]
    assert (bad(g), bad(row), bad(turned)) == ([1, 2], [0], [1, 2])
    turned[1].zero_()
    assert (bad(g), bad(g * 2), bad(turned)) == ([2], [2], [2])


def test_writes_and_gradients():
    x = torch.ones(3, 4, requires_grad=True)
    y = guard(x) * 1
    y[1] = made(3, [2], 4)[2]
    y[0].mul_(5)
    assert bad(y) == [1]
    y.sum().backward()
    assert x.grad.tolist() == [[5.0] * 4, [0.0] * 4, [1.0] * 4]


def test_batch_norm_keeps_plain_statistics(g):
    norm = torch.nn.BatchNorm1d(4)
    assert bad(norm(g)) == [0, 1, 2]
    assert type(norm.running_mean) is torch.Tensor
    assert norm.running_mean.tolist() == pytest.approx([0.1] * 4)
    assert bad(norm.eval()(g)) == [1]


def test_conjugates_are_computed_at_once(g):
    z = GuardedTensor(torch.full((3, 4), 1 + 2j), g.flags)
    assert bad(z.conj()) == [1]
    assert z.conj().imag.tolist() == [[-2.0] * 4] * 3
    with pytest.raises(NotImplementedError, match="to share its memory"):
        z.conj().mul_(2)
    assert z.tolist() == [[1 + 2j] * 4] * 3
    with pytest.raises(TypeError, match=r"resolve_conj\(\)"):
        guard(torch.full((3, 4), 1 + 2j).conj())


# --- modes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_modes(mode):
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.GELU())
    attend = torch.nn.functional.scaled_dot_product_attention
    q = made(3, [2], 2, 4, 8)
    with mode():
        y = net(made(3, [1], 4))
        assert bad(y) == [1]
        assert bad(attend(q, q, q)) == [2]
        assert bad(torch.einsum("bi,bj->bij", y, y)) == [1]
        y = y * 1
        y.add_(made(3, [0], 8))
        assert bad(y) == [0, 1]


def test_vmap_follows_the_rows_beneath_it(g):
    assert bad(torch.vmap(lambda row: row.sum() * 2)(g)) == [1]
    turned = torch.vmap(lambda column: column * 2, in_dims=1)(g)
    assert turned.batch_dims == (1,)
    assert bad(turned) == [1]
    (grads, y) = torch.func.grad_and_value(lambda h: (h * h).sum())(g)
    assert torch.equal(torch.as_tensor(grads), torch.full((3, 4), 2.0))
    assert bad(y) == [0]


def test_training_steps_leave_parameters_plain(g):
    net = torch.nn.Linear(4, 4)
    optimizer = torch.optim.Adam(net.parameters())
    net(g).sum().backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    assert type(net.weight) is torch.nn.Parameter
    assert type(net.weight.grad) is torch.Tensor


def test_a_checked_model_looks_at_the_data(g):
    net = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with F.check_model(net) as check:
        assert bad(net(g)) == [1]
        assert not F.err.any_err(check.flags)
        y = net(GuardedTensor(torch.full((3, 4), NAN), g.flags))
        assert bad(y) == [1]
        assert F.err.is_err(check.flags).all()
        assert type(check.flags) is torch.Tensor


# --- keeping and copying ------------------------------------------------------------------------


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    "again",
    [lambda g: pickle.loads(pickle.dumps(g)), copy.copy, copy.deepcopy, saved],
    ids=["pickle", "copy", "deepcopy", "save"],
)
def test_copies_keep_everything(again, g):
    leaf = GuardedTensor(torch.ones(3, 4), g.flags, lost="merge").requires_grad_()
    for one in (g, g.t(), g.sum(0), g.view(3, 2, 2), leaf):
        other = again(one)
        assert type(other) is GuardedTensor
        assert torch.equal(other.unwrap(), one.unwrap())
        assert torch.equal(other.flags, one.flags)
        assert (other.batch_dims, other.stride()) == (one.batch_dims, one.stride())
        assert (other.requires_grad, other._merges) == (one.requires_grad, one._merges)
    other = again(g)
    assert (other.unwrap().data_ptr() == g.unwrap().data_ptr()) == (again is copy.copy)


def test_deepcopy_is_of_leaves_only(g):
    made_by_autograd = g.requires_grad_() * 2
    with pytest.raises(RuntimeError, match=r"copy g\.detach\(\)"):
        copy.deepcopy(made_by_autograd)
    both = copy.deepcopy([g, g])
    assert both[0] is both[1]


def test_cells_keep_no_graph_and_make_no_cycles(g):
    leaf = g.requires_grad_()
    made_by_autograd = leaf * 2
    gone = weakref.ref(made_by_autograd)
    kept = made_by_autograd.detach(), made_by_autograd[0].detach()
    gc.disable()
    try:
        del made_by_autograd
        assert gone() is None
    finally:
        gc.enable()
    assert bad(kept[0]) == [1]


def test_the_same_op_on_the_same_shapes_with_other_flags():
    a, b = made(3, [0], 4), made(3, [2], 4)
    for _ in range(2):
        assert bad(a + a) == bad(a * 2) == [0]
        assert bad(a + b) == bad(b + a) == [0, 2]
        assert bad(torch.where(a > 0, b, b)) == [0, 2]
        assert bad(torch.cat([a, b], 1)) == [0, 2]
        assert (bad(a.softmax(0)), bad(a.softmax(1))) == ([0, 1, 2], [0])
        assert (bad(a.sum(0)), bad(a.sum(1))) == ([0], [0])
        merging = GuardedTensor(torch.ones(3, 4), b.flags, lost="merge")
        assert not (a + b)._merges
        assert (a + merging)._merges
        assert (merging * 2)._merges


def test_moves_take_the_flags_along(g):
    assert bad(g.double()) == [1]
    assert g.to("cpu") is g
    there = g.to("meta")
    assert (there.flags.device.type, there.unwrap().device.type) == ("meta", "meta")
    assert bad(g.t().contiguous().clone()) == [1]


class Samples(torch.utils.data.Dataset):
    def __init__(self, g):
        self.g = g

    def __len__(self):
        return len(self.g)

    def __getitem__(self, i):
        return {"x": self.g[i], "n": i}


@pytest.mark.parametrize("workers", [0, 1])
def test_collation_gives_the_batch_back(g, workers):
    loader = torch.utils.data.DataLoader(Samples(g), batch_size=2, num_workers=workers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fork, in a process with threads
        batches = list(loader)
    assert [bad(batch["x"]) for batch in batches] == [[1], []]
    assert batches[0]["x"].batch_dims == (0,)
    whole = torch.utils.data.default_collate([g[i] for i in range(3)])
    assert torch.equal(whole.flags, g.flags)
    assert torch.equal(whole.unwrap(), g.unwrap())


def test_shared_memory(g):
    assert g.share_memory_() is g
    assert g.is_shared()
    assert bad(g) == [1]


# --- writes against elements --------------------------------------------------------------------

VIEWS = {
    "row": lambda t: t[1],
    "rows": lambda t: t[1:],
    "steps": lambda t: t[::2],
    "columns": lambda t: t[:, 1:3],
    "turned": lambda t: t.t(),
    "split": lambda t: t.view(2, 2, 4),
    "halves": lambda t: t.view(4, 2, 2)[:, 1],
    "flat": lambda t: t.view(-1),
    "diagonal": lambda t: t.diagonal(),
    "chunk": lambda t: t.chunk(2)[1],
    "detached": lambda t: t.detach(),
    "strided": lambda t: t.as_strided((2, 3), (5, 2), 1),
    "grown": lambda t: t.unsqueeze(0).transpose(0, 2),
}
SPLITS = ("split", "halves", "flat")
WRITES = ("add_", "copy_", "zero_", "mul_")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(VIEWS)), st.booleans()), min_size=1, max_size=4),
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from(WRITES), st.integers(0, 2**6)),
        min_size=1,
        max_size=5,
    ),
)
def test_rows_of_all_views_hold_what_was_written_into_their_elements(views, writes):
    """A row with a bad element is flagged; one that never had any is not."""
    base, now, ever = guard(torch.ones(4, 4)), torch.zeros(4, 4), torch.zeros(4, 4)
    tensors = [(base, now, ever)]
    for name, from_last in views:
        last = tensors[-1]
        fits = last[1].shape == (4, 4) and (last[1].is_contiguous() or name not in SPLITS)
        parents = last if from_last and fits else tensors[0]
        tensors.append(tuple(VIEWS[name](t) for t in parents))
    for which, op, seed in writes:
        g, now, ever = tensors[which % len(tensors)]
        rows = torch.arange(g.shape[0])
        hit = (seed >> rows % 6) % 2 == 1
        mark = hit.float().reshape(-1, *[1] * (g.dim() - 1)).expand(g.shape)
        source = GuardedTensor(
            torch.ones(g.shape), F.flag_nan(torch.where(hit, NAN, 0.0)[:, None], "written")
        )
        with torch.no_grad():
            if op == "zero_":
                g.zero_()
                now.zero_()
                continue
            getattr(g, op)(source)
            now.copy_(mark) if op == "copy_" else now.copy_(torch.maximum(now, mark))
            ever.copy_(torch.maximum(ever, mark))
    for g, now, ever in tensors:
        for elements, least in ((now, True), (ever, False)):
            dims = [d for d in range(g.dim()) if d not in g.batch_dims]
            found = elements.permute(*g.batch_dims, *dims).reshape(g.flags.shape[0], -1)
            seen = F.err.is_err(g.flags)
            if least:
                assert bool((seen | ~found.any(1)).all())
            elif g is base:
                assert bool((~seen | found.any(1)).all())

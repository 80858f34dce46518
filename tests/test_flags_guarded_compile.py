"""GuardedTensor in compiled code: whole graphs, their gradients, their inputs and outputs."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from opguard import flags as F
from opguard.flags import GuardedTensor, guard

NAN = float("nan")

# Dynamo looks at .grad of every input, and hides this warning where warnings are no errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(n, bad, *shape):
    """Ones (n, *shape), the samples ``bad`` of which have an error."""
    seen = torch.zeros(n, 1)
    seen[bad] = NAN
    return GuardedTensor(torch.ones(n, *shape), F.flag_nan(seen, "here"))


def bad(g):
    """The rows that have errors."""
    return F.err.is_err(g.flags).nonzero().flatten().tolist()


def whole(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.GELU(), torch.nn.Linear(8, 4)
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_network_forward_and_backward(backend):
    net, g = network(), made(3, [1], 4)
    net = net if backend == "aot_eager" else net[:1]  # Inductor's time goes with its kernels
    x = torch.randn(3, 4, requires_grad=True)
    y = net(x)
    y.square().sum().backward()
    expected = [x.grad, *(p.grad for p in net.parameters())]
    x.grad = None
    net.zero_grad()
    compiled = whole(net, backend)
    ours = compiled(GuardedTensor(x, g.flags))
    assert type(ours) is GuardedTensor
    assert (bad(ours), ours.batch_dims) == ([1], (0,))
    torch.testing.assert_close(ours.unwrap(), y)
    ours.square().sum().backward()
    for mine, theirs in zip([x.grad, *(p.grad for p in net.parameters())], expected, strict=True):
        assert type(mine) is torch.Tensor
        torch.testing.assert_close(mine, theirs)


def test_flags_unwrap_and_guard_inside():
    def inside(x, flags):
        y = guard(x) * 2 + GuardedTensor(x, flags)
        y = F.flag_nan(y, "inside")
        return y.unwrap(), y.flags, y.batch_dims, y.with_flags(flags)

    g = made(3, [1], 4)
    x = torch.ones(3, 4)
    x[2, 0] = NAN
    x.requires_grad_()
    data, flags, dims, other = whole(inside)(x, g.flags)
    assert (type(data), type(flags), dims) == (torch.Tensor, torch.Tensor, (0,))
    assert F.err.is_err(flags).tolist() == [False, True, True]
    assert bad(other) == [1]
    data.sum().backward()
    assert torch.equal(x.grad, torch.full((3, 4), 3.0))


def test_one_compiled_function_after_another():
    first, second = whole(network()), whole(lambda g: (g * 2).tanh())
    x = torch.randn(3, 4, requires_grad=True)
    y = second(first(GuardedTensor(x, made(3, [1], 4).flags)))
    assert bad(y) == [1]
    torch.autograd.backward([y], [torch.ones(3, 4)])
    ours, x.grad = x.grad, None
    (network()(x) * 2).tanh().sum().backward()
    torch.testing.assert_close(ours, x.grad)


def test_outputs_without_a_gradient_and_gradients_of_any_strides():
    both = whole(lambda g: (g * 2, g.t() * 3))
    x = torch.ones(3, 4, requires_grad=True)
    used, _ = both(GuardedTensor(x, made(3, [1], 4).flags))
    used.sum().backward()  # its gradient is expanded, that of the other is none
    assert torch.equal(x.grad, torch.full((3, 4), 2.0))
    _, used = both(GuardedTensor(x, made(3, [1], 4).flags))
    used.backward(torch.ones(3, 4).t())
    assert torch.equal(x.grad, torch.full((3, 4), 5.0))


def test_flags_wider_than_the_configuration():
    x = torch.ones(3, 4, requires_grad=True)
    y = whole(lambda g: g * 2)(guard(x, F.ErrorConfig(num_slots=64)))
    assert y.flags.shape == (3, 16)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3, 4), 2.0))


def test_a_leaf_gets_a_plain_gradient():
    leaf = made(3, [1], 4).requires_grad_()
    whole(lambda g: g * 3)(leaf).sum().backward()
    assert type(leaf.grad) is torch.Tensor
    assert torch.equal(leaf.grad, torch.full((3, 4), 3.0))


def moves(g):
    return (
        g.sum(0),
        g[1],
        g[1:],
        g[[2, 0]],
        g.flip(0),
        g.roll(1, 0),
        g.t() * 2,
        g.reshape(-1),
        g.view(3, 2, 2) + 1,
        g.repeat_interleave(2, 0),
        torch.cat([g, g * 2]),
        torch.stack([g, g]),
        g.sort(0)[0],
        g @ g.t(),
        torch.nn.functional.softmax(g, 1),
    )


def test_rows_go_where_they_go_in_eager_code():
    g = made(3, [1], 4)
    for ours, eager in zip(whole(moves)(g), moves(g), strict=True):
        assert (bad(ours), ours.batch_dims) == (bad(eager), eager.batch_dims)
        assert torch.equal(ours.flags, eager.flags)
        assert torch.equal(ours.unwrap(), eager.unwrap())


def counted(function, **options):
    """The function compiled, and a list with an entry for each graph compiled for it."""
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph

    return whole(function, aot_autograd(fw_compiler=compiler), **options), graphs


def test_nothing_is_compiled_twice():
    function, graphs = counted(lambda g: (g * 2).relu())
    for where in ([1], [], [0, 2]):
        assert bad(function(made(3, where, 4))) == where
    function(made(3, [1], 4) + 1)
    assert len(graphs) == 1


@pytest.mark.parametrize("how", ["dynamic", "marked"])
def test_one_graph_for_all_batch_sizes(how):
    function, graphs = counted(
        lambda g: torch.cat([g, g.flip(0)]).relu(), dynamic=True if how == "dynamic" else None
    )
    for n in (3, 5, 8):
        g = made(n, [1], 4)
        if how == "marked":
            torch._dynamo.mark_dynamic(g, 0)
        y = function(g)
        assert bad(y) == [1, 2 * n - 2]
    assert len(graphs) == 1


def test_backward_with_symbolic_sizes():
    function = whole(network(), dynamic=True)
    for n in (3, 6):
        x = torch.randn(n, 4, requires_grad=True)
        y = function(GuardedTensor(x, made(n, [1], 4).flags))
        assert bad(y) == [1]
        y.sum().backward()
        assert x.grad.shape == (n, 4)


def test_writes_inside():
    def inside(g, h):
        g = g * 1
        row, turned = g[1], g.t()
        g[1] = h[0]
        turned.add_(1)
        return g, row, turned, row.flags

    clean, h = made(3, [], 4), made(3, [0], 4)
    base, row, turned, flags = whole(inside)(clean, h)
    assert (bad(base), bad(row), bad(turned)) == ([1], [0], [1])
    assert F.err.is_err(flags).tolist() == [True]
    assert base.tolist() == inside(clean, h)[0].tolist()
    assert bad(clean) == []


def test_writes_that_would_change_the_flags_of_an_input_are_refused():
    def inside(g, h):
        g[1] = h[0]
        return g * 2

    clean = made(3, [], 4)
    with pytest.raises(Exception, match="expected a compiled region to leave the flags of what"):
        whole(inside)(clean, made(3, [0], 4))
    assert (bad(clean), clean.tolist()) == ([], [[1.0] * 4] * 3)


def test_writes_that_leave_the_flags_of_an_input_as_they_are():
    g = made(3, [1], 4)
    whole(lambda g: g.mul_(3))(g)
    assert (bad(g), g.tolist()) == ([1], [[3.0] * 4] * 3)
    whole(lambda g: g[1].mul_(3) * 2)(g)
    assert (bad(g), g[1].tolist()) == ([1], [9.0] * 4)


def test_views_of_inputs_stay_views():
    g = made(3, [1], 4)
    turned, row, split = whole(lambda g: (g.t(), g[1], g.view(3, 2, 2)))(g)
    assert (bad(turned), bad(row), bad(split)) == ([1], [0], [1])
    assert turned.unwrap().data_ptr() == g.unwrap().data_ptr()
    row.zero_()
    assert (bad(g), bad(turned), bad(split)) == ([], [], [])
    assert g[1].tolist() == [0.0] * 4


def test_an_input_that_comes_out_is_itself():
    g = made(3, [1], 4)
    assert whole(lambda g: g)(g) is g


def test_modes():
    g = made(3, [1], 4)
    with torch.inference_mode():
        assert bad(whole(network())(g)) == [1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = whole(torch.nn.Linear(4, 2))(g)
    assert (bad(y), y.dtype) == ([1], torch.bfloat16)


def test_lost_rows_merge_by_choice_inside():
    y = whole(lambda x: guard(x, lost="merge") * 2)(torch.ones(3, 4))
    assert y._merges


def test_export():
    net = network()
    program = torch.export.export(net, (made(3, [1], 4),))
    y = program.module()(made(3, [2], 4))
    assert bad(y) == [2]
    torch.testing.assert_close(y.unwrap(), net(torch.ones(3, 4)))


def test_two_contexts_are_two_graphs_in_a_cache():
    g = made(3, [1], 4)
    names = {h._stable_hash_for_caching() for h in (g, g.t(), g.sum(0), guard(g.unwrap()))}
    assert len(names) == 3

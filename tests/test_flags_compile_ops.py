"""The flag ops where torch is not plain eager: compiled, exported, traced, batched, faked."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch.library import opcheck

import flags_model as model
import opguard  # noqa: F401  (registers the ops)
from flags_model import CRITICAL, NAN, Policy, slot_of

OPS = torch.ops.opguard
KEY = Policy().key
nan, inf = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- opcheck --------------------------------------------------------------------------------------


def xs() -> dict[str, torch.Tensor]:
    return {
        "float32": torch.tensor([[0.0, nan], [inf, 1.0], [2.0, 3.0]]),
        "requires grad": torch.randn(3, 2, requires_grad=True),
        "bfloat16, turned": torch.randn(4, 2, 3).bfloat16().transpose(0, 2),
        "no samples": torch.randn(0, 3),
        "integers": torch.arange(3),
        "complex, conjugated": torch.randn(3, 2, dtype=torch.complex64).conj(),
        "0-d": torch.tensor(nan),
    }


def arguments(x: torch.Tensor, key: int) -> dict[str, tuple[Any, ...]]:
    f = OPS.flags_check_new(x.detach(), 5, 7, key)
    n = f.shape[0]
    mask = torch.arange(n) % 2 == 0
    codes = torch.arange(n, dtype=torch.int32) % 16
    ids = torch.arange(n * 2).reshape(n, 2) - 1
    return {
        "flags_check": (f, x, 1, 7, key),
        "flags_check_": (f, x, 1, 7, key),
        "flags_check_new": (x, 1, 7, key),
        "flags_index": (f, ids, 3, 1, key),
        "flags_index_new": (ids.int(), 3, 1, key),
        "flags_index_clamp": (f, ids.t().contiguous().t(), 3, 1, key),
        "flags_push": (f, mask, 7, key),
        "flags_push_": (f, mask, 7, key),
        "flags_push_all": (f, 7, key),
        "flags_push_all_": (f, 7, key),
        "flags_push_codes": (f, codes, 1, -1, 2, key),
        "flags_merge": ([f, f.clone(), f.clone()], key),
        "flags_merge_": (f, f.clone(), key),
        "flags_gather": (f, ids % n if n else ids, key),
        "flags_find": (f, 0x3C, 4),
        "flags_ok": (f,),
        "flags_err": (f,),
        "flags_count": (f,),
        "flags_max_severity": (f,),
        "flags_clear": (f, 1),
        "row_findings": (x,),
    }


def every_op() -> set[str]:
    """Those of csrc: what opguard.flags defines in Python has no kernel for the CPU alone."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("opguard::")]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    kernels = {name.removeprefix("opguard::") for name in names if has_kernel(name, "CPU")}
    return kernels - {"pack", "add_low_rank"}  # the ops that are of no flags


def test_every_op_has_samples():
    assert set(arguments(xs()["float32"], KEY)) == every_op()


@pytest.mark.parametrize("name", xs())
def test_opcheck(name):
    """torch's own test of an op: schema, autograd, fake kernel, and AOT with dynamic shapes."""
    carrier = 3 if name == "requires grad" else 0
    for op, args in arguments(xs()[name], Policy(carrier=carrier).key).items():
        if name in {"float32", "no samples"} or "check" in op or "row" in op:
            opcheck(getattr(OPS, op).default, args)


def test_opcheck_of_pack_and_unpack():
    leaves = [torch.randn(3, 4).t(), torch.zeros(7, dtype=torch.uint8)]
    opcheck(OPS.pack.default, (leaves,))
    opcheck(OPS.unpack.default, (OPS.pack(leaves), leaves))


@pytest.mark.parametrize("op", sorted(arguments(torch.zeros(3, 2), KEY)))
def test_fake_results_are_like_real_ones(op):
    """Shape, strides, dtype and device on meta tensors, for every carrier."""
    for carrier in range(4):
        args = arguments(xs()["float32"], Policy(carrier=carrier).key)[op]
        real = getattr(OPS, op)(*args)
        fake = getattr(OPS, op)(*torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t.to("meta"), args))  # fmt: skip
        pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
        for ours, theirs in pairs:
            if ours is not None:
                assert theirs.is_meta
                assert (ours.shape, ours.stride(), ours.dtype) == (
                    theirs.shape, theirs.stride(), theirs.dtype)  # fmt: skip


@pytest.mark.parametrize(("call", "words"), [
    (lambda f, x: OPS.flags_check(f, x[:2], 1, 7, KEY), "3 samples"),
    (lambda f, x: OPS.flags_check_(f[0], x, 1, 7, KEY), "(N, W)"),
    (lambda f, x: OPS.flags_ok(f.half()), "int64, int32"),
    (lambda f, x: OPS.flags_merge([f, f[:2]], KEY), "3 samples"),
    (lambda f, x: OPS.flags_merge([f, f[:, :2]], KEY), "16 and 8"),
    (lambda f, x: OPS.flags_gather(f, x, KEY), "int64 or int32"),
    (lambda f, x: OPS.flags_gather(f, f[0, 0], KEY), "(M,) or (M, K)"),
])  # fmt: skip
def test_shapes_that_do_not_fit_are_said_before_anything_runs(call, words):
    f = torch.zeros(3, 4, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="expected") as caught:
        call(f, torch.zeros(3, 5, device="meta"))
    assert words in str(caught.value)


# --- torch.compile --------------------------------------------------------------------------------


class Flagged(torch.nn.Module):
    """Checks after every layer, a push, a merge, a clear, and what was found."""

    def __init__(self, key: int = KEY) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.key = key

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        f = OPS.flags_check_new(x, 1, 7, self.key)
        for i, layer in enumerate(self.layers):
            x = torch.relu(layer(x))
            f = OPS.flags_check(f, x, 2 + i, 7, self.key)
        side = OPS.flags_push(torch.zeros_like(f), x.sum(1) > 2, slot_of(9, 9, 1), self.key)
        f = OPS.flags_merge([f, side], self.key)
        last = torch.arange(f.shape[0]) - 1  # every row with the one before it, the first alone
        f = OPS.flags_gather(f, torch.stack([last, last + 1], 1), self.key)
        return x, f, OPS.flags_err(f), OPS.flags_count(f), OPS.flags_find(f, 0x3C, NAN << 2)


def batch(samples: int = 5) -> torch.Tensor:
    x = torch.randn(samples, 8)
    x[1, 3] = nan
    x[samples - 1, 0] = inf
    return x


def assert_same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        assert not a.requires_grad


@pytest.mark.parametrize("carrier", range(4))
def test_compiled_equals_eager(carrier):
    net, x = Flagged(Policy(carrier=carrier).key), batch()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert_same(compiled(x), net(x))
    with torch.no_grad():
        assert_same(compiled(x), net(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
def test_inductor_equals_eager():
    net, x = Flagged(), batch()
    assert_same(torch.compile(net, fullgraph=True)(x), net(x))


def test_another_inductor_lowers_the_ops_as_any_others(monkeypatch):
    from torch._inductor import ir, lowering

    from opguard import _flag_lowering

    before = dict(lowering.lowerings)
    monkeypatch.setattr(ir, "ExternKernelOut", lambda layout, inputs: None)
    with pytest.raises(
        TypeError, match=r"to take \['constant_args', "
    ):  # who registers takes these
        _flag_lowering.register()
    monkeypatch.delattr(ir, "convert_shape_to_inductor")
    with pytest.raises((AttributeError, TypeError)):
        _flag_lowering.register()
    assert lowering.lowerings == before


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_for_every_batch_size(backend):
    net = Flagged()
    compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=True)
    compiled(batch(5))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for samples in (2, 7, 64):
            x = batch(samples)
            assert_same(compiled(x), net(x))


def test_a_marked_dimension_stays_dynamic():
    x = batch()
    torch._dynamo.mark_dynamic(x, 0)
    compiled = torch.compile(Flagged(), backend="aot_eager", fullgraph=True)
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert compiled(batch(9))[1].shape == (9, 4)


def test_ops_that_write_into_flags_are_compiled():
    def run(f: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        OPS.flags_check_(f, x, 1, 7, KEY)
        OPS.flags_push_(f, x[:, 0] > 0, slot_of(2, 9, 1), KEY)
        OPS.flags_push_all_(f, slot_of(3, 9, 1), KEY)
        OPS.flags_merge_(f, OPS.flags_check_new(x * inf, 4, 7, KEY), KEY)
        return OPS.flags_count(f)

    x = batch()
    eager, compiled = torch.zeros(2, 5, 4, dtype=torch.int64)
    expected = run(eager, x)
    out = torch.compile(run, backend="aot_eager", fullgraph=True)(compiled, x)
    assert torch.equal(out, expected)
    assert torch.equal(compiled, eager)


def test_bad_ids_are_clamped_in_the_graph():
    table = torch.nn.Embedding(10, 3)

    def run(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        f = OPS.flags_index_new(ids, 10, 1, KEY)
        f, safe = OPS.flags_index_clamp(f, ids, 10, 2, KEY)
        return table(safe), f

    ids = torch.tensor([[1, 2], [-1, 3], [4, 10]])
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for ours, theirs in zip(compiled(ids), run(ids), strict=True):
        assert torch.equal(ours, theirs)
    assert OPS.flags_count(compiled(ids)[1]).tolist() == [0, 2, 2]


# --- gradients ------------------------------------------------------------------------------------


class Plain(Flagged):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return (x,)


@pytest.mark.parametrize("carrier", [0, 2])
@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_gradients_are_those_of_the_model_without_flags(how, carrier):
    net = Flagged(Policy(carrier=carrier).key)
    plain = Plain()
    plain.load_state_dict(net.state_dict())
    x, y = torch.randn(2, 5, 8).unbind()
    y.copy_(x)
    run = torch.compile(net, backend="aot_eager", fullgraph=True) if how == "compiled" else net
    run(x.requires_grad_())[0].pow(2).sum().backward()
    plain(y.requires_grad_())[0].pow(2).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=0)
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


def test_a_gradient_can_be_flagged_in_backward():
    seen = []
    x = torch.tensor([[0.0], [1.0]], requires_grad=True)
    y = x * 1
    y.register_hook(lambda grad: seen.append(OPS.flags_check_new(grad, 7, 7, KEY)))
    y.sqrt().sum().backward()
    assert OPS.flags_err(seen[0]).tolist() == [True, False]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
def test_functional_transforms():
    def loss(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x * x).sum(), OPS.flags_check_new(x * x, 1, 7, KEY)

    x = batch()
    grad, f = torch.func.grad(loss, has_aux=True)(x)
    torch.testing.assert_close(grad, 2 * x, equal_nan=True)
    assert torch.equal(f, loss(x)[1])
    (_, f), (_, tangent) = torch.func.jvp(loss, (x,), (torch.ones_like(x),))
    assert torch.equal(f, loss(x)[1])
    assert not tangent.any()
    each, f = torch.vmap(torch.func.grad(loss, has_aux=True))(x.reshape(5, 2, 4))
    assert each.shape == (5, 2, 4)
    finite = x.reshape(10, 4).isfinite().all(1)
    assert torch.equal(OPS.flags_ok(f.flatten(0, 1)), finite)


# --- vmap -----------------------------------------------------------------------------------------


def split(value: Any, dims: Any, i: int) -> Any:
    if isinstance(value, list):
        return [split(one, dim, i) for one, dim in zip(value, dims, strict=True)]
    return value if dims is None else value.select(dims, i)


@pytest.mark.parametrize("op", sorted(n for n in arguments(torch.zeros(3, 2), KEY)
                                      if not n.endswith("_")))  # fmt: skip
def test_vmap_is_every_batch_on_its_own(op):
    """Each batch of a stack, the batch dimension in front, at the end, or none for one argument."""
    stack = [arguments(torch.randn(3, 2) * nan ** (i % 2), KEY)[op] for i in range(4)]
    places = [[0, 0], [-1, 0], [0, None], [None, -1]]
    for place in places:
        left = iter(place * 3)
        dims = [next(left) if isinstance(a, torch.Tensor) else [0, None, -1]
                if isinstance(a, list) else None for a in stack[0]]  # fmt: skip
        if all(d is None for d in dims):
            continue

        def pile(values: list[Any], dim: Any) -> Any:
            if isinstance(values[0], list):
                turned = zip(*values, strict=True)
                return [pile(list(v), d) for v, d in zip(turned, dim, strict=True)]
            return values[0] if dim is None else torch.stack(values, dim)

        args = [pile([one[i] for one in stack], dim) for i, dim in enumerate(dims)]
        function = getattr(OPS, op)
        out = torch.vmap(function, in_dims=tuple(dims))(*args)
        alone = [function(*(split(a, d, i) for a, d in zip(args, dims, strict=True)))
                 for i in range(4)]  # fmt: skip
        many = out if isinstance(out, tuple) else (out,)
        for k, ours in enumerate(many):
            theirs = torch.stack([one[k] if isinstance(out, tuple) else one for one in alone])
            assert torch.equal(ours, theirs)


def test_vmap_over_single_samples_and_in_vmap():
    x = batch()
    one = torch.vmap(lambda v: OPS.flags_check_new(v, 1, 7, KEY))(x[:, 3])
    assert one.shape == (5, 1, 4)
    assert torch.equal(one[:, 0], OPS.flags_check_new(x[:, 3], 1, 7, KEY))
    ids = torch.tensor([[0, 3], [2, 9], [5, 5]])
    f = torch.zeros(1, 4, dtype=torch.int64)
    call = torch.vmap(torch.vmap(lambda i: OPS.flags_index_clamp(f, i, 3, 1, KEY)))
    flags, clamped = call(ids)
    assert flags.shape == (3, 2, 1, 4)
    assert torch.equal(clamped, ids.clamp(max=2))
    assert torch.equal(OPS.flags_err(flags.reshape(6, 4)), (ids >= 3).flatten())


@pytest.mark.parametrize("op", sorted(n for n in arguments(torch.zeros(3, 2), KEY)
                                      if n.endswith("_")))  # fmt: skip
def test_vmap_refuses_what_writes_into_flags(op):
    args = [a.expand(2, *a.shape) if isinstance(a, torch.Tensor) else a
            for a in arguments(torch.zeros(3, 2), KEY)[op]]  # fmt: skip
    dims = tuple(0 if isinstance(a, torch.Tensor) else None for a in args)
    with pytest.raises(RuntimeError, match="outside of vmap") as caught:
        torch.vmap(getattr(OPS, op), in_dims=dims)(*args)
    assert f"opguard::{op[:-1]}," in str(caught.value)


def test_another_torchs_vmap_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "opguard._flag_vmap", None)
    with pytest.raises(RuntimeError, match=r"opguard::flags_ok: .*; call it outside of vmap$"):
        torch.vmap(OPS.flags_ok)(torch.zeros((2, 3, 4), dtype=torch.int64))


# --- export ---------------------------------------------------------------------------------------

RELOAD = """
    import sys, torch, opguard
    x, expected = torch.load(sys.argv[1])
    program = torch.export.load(sys.argv[2])
    for ours, theirs in zip(program.module()(x), expected, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    assert not any(name.startswith("opguard.flags") for name in sys.modules)
"""


def in_a_new_process(program: str, *args: object) -> None:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, args)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


def test_an_exported_program_loads_with_import_opguard_alone(tmp_path):
    net, x = Flagged(), batch()
    samples = torch.export.Dim("samples", min=2)
    program = torch.export.export(net, (batch(4),), dynamic_shapes=({0: samples},))
    assert_same(program.module()(x), net(x))
    torch.export.save(program, tmp_path / "net.pt2")
    with torch.no_grad():
        torch.save((x, net(x)), tmp_path / "expected.pt")
    in_a_new_process(RELOAD, tmp_path / "expected.pt", tmp_path / "net.pt2")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_aotinductor_package_runs(tmp_path):
    net, x = Flagged().eval(), batch()
    with torch.no_grad():
        program = torch.export.export(net, (batch(5),))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "net.pt2")
        )
        torch.save((x, net(x)), tmp_path / "expected.pt")
    in_a_new_process(
        """
        import sys, torch, opguard
        x, expected = torch.load(sys.argv[1])
        out = torch._inductor.aoti_load_package(sys.argv[2])(x)
        torch.testing.assert_close(out[0], expected[0], equal_nan=True)
        for ours, theirs in zip(out[1:], expected[1:], strict=True):
            assert torch.equal(ours, theirs)
        """,
        tmp_path / "expected.pt",
        package,
    )


# --- modes, tracing, parallel ---------------------------------------------------------------------


def test_make_fx_keeps_the_ops():
    from torch.fx.experimental.proxy_tensor import make_fx

    def run(x: torch.Tensor) -> torch.Tensor:
        return OPS.flags_check(OPS.flags_check_new(x, 1, 7, KEY), x * 2, 2, 7, KEY)

    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(run, tracing_mode=mode)(batch())
        called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        assert [name for name in called if "opguard" in name] == [
            "opguard.flags_check_new.default", "opguard.flags_check.default"]  # fmt: skip
        x = batch()
        assert torch.equal(graph(x), run(x))


def test_fake_tensors_leave_nothing_behind():
    """Real calls after fake ones are as before (torchguard's caches were poisoned)."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    x = batch()
    expected = {name: getattr(OPS, name)(*args) for name, args in arguments(x, KEY).items()}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for name, args in arguments(x, KEY).items():
            faked = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
            out = getattr(OPS, name)(*faked)
            many = out if isinstance(out, tuple) else (out,)
            assert all(t is None or isinstance(t, FakeTensor) for t in many)
    for name, args in arguments(x, KEY).items():
        out = getattr(OPS, name)(*args)
        many = out if isinstance(out, tuple) else (out,)
        before = expected[name] if isinstance(out, tuple) else (expected[name],)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(many, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_flag(dtype):
    """An overflow to Inf that only the lower precision has is found; flags are not cast."""
    layer = torch.nn.Linear(8, 8)
    x = torch.full((3, 8), 1e5)
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        y = layer(x * 1e3) if dtype == torch.float16 else layer(x)
        f = OPS.flags_check_new(y, 1, 7, KEY)
        g = OPS.flags_check(torch.zeros(3, 8, dtype=torch.float32), y, 1, 7, Policy(carrier=3).key)
    assert f.dtype == torch.int64
    assert g.dtype == torch.float32
    assert OPS.flags_err(f).tolist() == (~y.isfinite().all(1)).tolist()


def test_data_parallel_and_copies():
    import copy
    import pickle

    net, x = Flagged(), batch()
    expected = net(x)
    assert_same(torch.nn.DataParallel(net)(x), expected)
    assert_same(copy.deepcopy(net)(x), expected)
    f = expected[1]
    assert torch.equal(pickle.loads(pickle.dumps(f)), f)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_distributed_data_parallel(tmp_path):
    import torch.distributed as dist

    store = f"file://{tmp_path / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        net = Flagged()
        parallel = torch.nn.parallel.DistributedDataParallel(net)
        x = torch.randn(5, 8)
        out = parallel(x)
        assert_same(out, net(x))
        out[0].sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    finally:
        dist.destroy_process_group()


def test_a_dispatch_mode_sees_the_ops():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Log() as log:
        f = OPS.flags_check_new(batch(), 1, 7, KEY)
    assert log.seen[-1] == "opguard.flags_check_new.default"
    assert model.to_rows(f)[1][0] == slot_of(1, NAN, CRITICAL)

"""check_ops beside what else is at work: modes, tracers, transforms; lost rows, limits."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._dynamo import eval_frame
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from opguard import flags
from opguard.flags import check, check_ops


def found(c) -> dict[int, list[str]]:
    """sample -> its errors as "CODE@op"."""
    return {
        i: [f"{each.code_name}@{each.location_name.partition(' at ')[0]}" for each in errors]
        for i, errors in enumerate(flags.ErrorFlags.unpack_all(c.flags))
        if errors
    }


class Log(nn.Module):
    def forward(self, x):
        return x.log()


class Scaled(nn.Module):
    def __init__(self, samples: int) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(samples, 2))

    def forward(self, x):
        return (x * self.scale).log()


def zero_at(sample: int, samples: int = 3) -> torch.Tensor:
    x = torch.ones(samples, 2)
    x[sample] = 0
    return x


@pytest.fixture(scope="module")
def shuffle():
    """An op that no rule follows: row i of its result is row (i - 1) % 3."""
    library = torch.library.Library("opguard_tests_others", "FRAGMENT")
    library.define("shuffle(Tensor x) -> Tensor")
    library.impl("shuffle", lambda x: x[[2, 0, 1]], "CPU")
    yield torch.ops.opguard_tests_others.shuffle
    library._destroy()


# --- whose samples they are ---------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False])
def test_rows_that_were_lost_are_not_found_again_by_their_shape(shuffle, given):
    x, first, second = zero_at(2), nn.ReLU(), Scaled(3)
    with check_ops(*([x] if given else [])) as c:
        second(shuffle(first(x)))
    assert found(c) == {i: ["INF@aten::log"] for i in range(3)}  # the bad row is 2, not 0


def test_a_batch_that_is_given_is_all_of_it():
    x, table = torch.ones(3, 2), torch.tensor([[1.0], [0.0], [1.0]])

    class Looked(nn.Module):
        def forward(self, x, table):
            return x + table.flip(0)[:1].log() + table[1:2].log()

    with check_ops(x) as c:
        Looked()(x, table)
    assert sorted(found(c)) == [0, 1, 2]


def test_a_parameter_among_the_arguments_is_no_batch():
    class Looked(nn.Module):
        def forward(self, x, weight):
            return x * weight[torch.tensor([1, 1, 1])].log()

    with check_ops() as c:
        Looked()(torch.ones(3, 2), nn.Parameter(zero_at(1)))
    assert found(c) == {i: ["INF@aten::log"] for i in range(3)}


@pytest.mark.parametrize("cast", [torch.Tensor.float, torch.Tensor.double])
def test_batches_that_are_made_in_the_block(cast):
    with check_ops() as c:
        for i in (0, 2):
            Log()(cast(zero_at(i)))
    assert sorted(found(c)) == [0, 2]


# --- other modes, tracers, transforms -----------------------------------------------------------


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("inside", [True, False])
def test_another_mode_sees_what_it_sees_without_the_block(inside):
    x, ids = zero_at(1), torch.tensor([1, 7, 0])
    with Seen() as alone:
        (x * 1e20).log().div(x)
        x[ids.clamp(max=2)]
    seen = Seen()
    with check_ops(x) if inside else seen, seen if inside else check_ops(x):
        (x * 1e20).log().div(x)
        x[ids.clamp(max=2)]
        check(x > 0, "positive")
    assert [each for each in seen.ops if each != "aten.gt.Scalar"] == alone.ops


def test_flops_are_counted_as_without_it():
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    with FlopCounterMode(display=False) as alone:
        model(x)
    with FlopCounterMode(display=False) as counter, check_ops() as c:
        model(x.log())
    assert counter.get_total_flops() == alone.get_total_flops()
    assert found(c)


class Checking(nn.Module):
    def forward(self, x):
        check((x > 0).all(1), "positive, got {x} of {n}", x=x, n=x.shape[0])
        return x.log() + 1


def test_what_is_traced_in_a_block_holds_nothing_of_it():
    x = torch.rand(3, 2)
    outside = make_fx(Log())(x)
    with check_ops() as c:
        inside = make_fx(Log())(x)
    assert inside.code == outside.code
    assert found(c) == {}


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_holds_no_checks(strict):
    x = zero_at(1)
    with check_ops() as c:
        program = torch.export.export(Checking(), (x,), strict=strict)
    assert not [node for node in program.graph.nodes if "opguard" in str(node.target)]
    assert found(c) == {}
    with check_ops(x) as c:
        program.module()(x)
    assert found(c) == {1: ["INF@aten::log"]}


def test_fake_tensors_are_passed_by(caplog):
    with check_ops() as c, FakeTensorMode():
        Checking()(torch.ones(3, 2))
    assert found(c) == {}
    with FakeTensorMode(), check_ops() as c:
        nn.Linear(2, 2)(Checking()(torch.ones(3, 2)))
    assert found(c) == {}
    assert not caplog.messages


def test_a_default_device_is_not_that_of_what_looks(caplog):
    x = zero_at(2, samples=37)  # of a size that nothing was looked at before
    with check_ops(x) as c, torch.device("meta"):
        1 / x
        torch.ones(37, dtype=torch.long, device="cpu") // 2
    assert sorted(found(c)) == [2]
    assert not caplog.messages


def test_checks_of_users_under_transforms():
    x = torch.tensor([[1.0], [-2.0], [3.0]])

    def f(row):
        check(row[0] > 0, "positive, got {row}", row=row)
        return row.sum()

    with check_ops(x) as c:
        torch.vmap(torch.func.grad(f))(x)
    assert sorted(found(c)) == [1]
    assert "UNKNOWN at positive, got -2.0 at " in str(flags.first_failure(c))


# --- ids ----------------------------------------------------------------------------------------


def test_bad_ids_are_told_to_every_block_around():
    table, ids = nn.Embedding(5, 2), torch.tensor([1, 9, 2])
    with check_ops(ids) as outer, check_ops(ids) as inner:
        y = table(ids)
    assert torch.equal(y[1], table.weight[4])
    assert found(inner) == found(outer) == {1: ["OUT_OF_BOUNDS@aten::embedding"]}


def test_bad_ids_are_told_once_and_not_again_by_their_gradients():
    x, ids = torch.ones(3, 4, requires_grad=True), torch.tensor([[1], [9], [2]])
    with check_ops(x, ids) as c:
        x.gather(1, ids).sum().backward()
    assert found(c) == {1: ["OUT_OF_BOUNDS@aten::gather"]}
    assert x.grad.sum(1).tolist() == [1, 1, 1]
    with check_ops(x) as c:
        x[:, torch.tensor([9])].sum().backward()
    assert found(c)[0] == ["OUT_OF_BOUNDS@aten::index"]


# --- what makes a NaN out of no number ----------------------------------------------------------


def test_of_bits_and_of_complex_numbers():
    x = torch.tensor([[0], [-1]], dtype=torch.int32)
    with check_ops(x) as c:
        x.view(torch.float32)
    assert found(c)[1] == ["NAN@aten::view"]
    x = torch.tensor([1 + 1j, 3e38 + 3e38j])
    with check_ops(x) as c:
        x.abs()
    assert found(c) == {1: ["INF@aten::abs"]}


def test_memory_that_nothing_was_written_to_is_no_finding():
    torch.use_deterministic_algorithms(True)  # then it is full of NaNs
    try:
        with check_ops() as c:
            torch.empty_permuted((3, 2), (1, 0))
            torch.empty(0).resize_as_(torch.ones(3, 2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert found(c) == {}


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_what_attention_keeps_for_its_gradients_is_not_looked_at(backend):
    library = torch.library.Library("aten", "FRAGMENT")  # as on a GPU: padding that holds Infs
    library.define("_scaled_dot_product_padded(Tensor q) -> (Tensor, Tensor)")
    padded = lambda q: (q + 1, q.new_full((3, 32), float("inf")))
    library.impl("_scaled_dot_product_padded", padded, "CompositeExplicitAutograd")
    try:
        attention = torch.ops.aten._scaled_dot_product_padded.default
        call = attention if backend is None else torch.compile(attention, backend=backend)
        with check_ops(checks=["nan", "inf"], backend="aot_eager") as c:
            call(torch.ones(3, 2))
        assert found(c) == {}
        with check_ops(checks=["nan", "inf"], backend="aot_eager") as c:
            call(torch.full((3, 2), float("nan")))
        assert found(c) == {0: ["NAN@aten::_scaled_dot_product_padded"]}
    finally:
        library._destroy()


# --- torch.compile ------------------------------------------------------------------------------


@pytest.fixture
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.set_stance("default")


@pytest.mark.usefixtures("_fresh")
def test_a_stance_that_is_set_in_the_block_stays():
    with check_ops():
        torch.compiler.set_stance("force_eager")
    assert eval_frame._stance.stance == "force_eager"


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("kinds", [True, False])
def test_blocks_use_up_none_of_what_may_be_compiled(kinds):
    compiles = torch._dynamo.testing.CompileCounterWithBackend("eager")
    fast = torch.compile(Log(), backend=compiles, dynamic=False)
    limit = dynamo_config.recompile_limit
    categories = ["nan", "inf", "user", "index", "div"]
    for i in range(limit + 2):
        checks = [categories[i % 5], categories[i // 5]] if kinds else categories
        with check_ops(checks=checks, backend="eager"):
            fast(zero_at(1, samples=3 if kinds else 3 + i))
    assert dynamo_config.recompile_limit == limit
    before = compiles.frame_count
    fast(torch.ones(50, 2))
    assert compiles.frame_count == before + 1


@pytest.mark.usefixtures("_fresh")
def test_numbers_in_a_message_may_be_symbols():
    def f(x, scale):
        check((x > 0).all(1), "got {n} x {scale} = {f:.1f}", n=x.shape[0], scale=scale, f=scale / 2)
        return x * scale

    fast = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    x = -torch.ones(3, 2)
    for scale in (3, 5):
        with check_ops(x, backend="aot_eager") as c:
            fast(x, scale)
        said = str(flags.first_failure(c))
        assert f"UNKNOWN at got 3 x {scale} = {scale / 2:.1f} at " in said


def test_a_torch_without_stances_is_told_of_and_eager_code_is_checked(monkeypatch, caplog):
    monkeypatch.delattr(eval_frame, "_set_stance")
    x = zero_at(1)
    with check_ops(x) as c:
        x.log()
    assert sorted(found(c)) == [1]
    assert "code under torch.compile is not looked at" in caplog.text

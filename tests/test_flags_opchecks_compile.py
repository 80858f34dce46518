"""check_ops and torch.compile: the checks are in the graph, and gone when the block ends."""

from __future__ import annotations

import threading

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch._dynamo import eval_frame

from opchecks_model import INF, NAN, Head, Model, at, found
from opguard import flags
from opguard.flags import check, check_ops


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    assert eval_frame._stance == eval_frame.DynamoStance()
    assert torch._C._len_torch_dispatch_stack() == 0


def bad(samples: int = 5, where: int = 3) -> torch.Tensor:
    x = torch.randn(samples, 4)
    x[where, 1] = 1e7
    return x


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
@pytest.mark.parametrize("backend", ["inductor", "eager"])
def test_compiled_before_the_block(backend):
    model, x = Model(), bad()
    fast = torch.compile(model, fullgraph=True, backend=backend)
    outside = fast(x)
    with check_ops(backend=backend) as c:
        inside = fast(x)
    assert torch.equal(outside, inside)
    assert found(c) == {3: [f"INF@{at('log', Head.forward, 'log')}"]}


def test_compiled_inside_the_block():
    model, x = Model(), bad()
    with check_ops(backend="aot_eager") as c:
        torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert found(c) == {3: [f"INF@{at('log', Head.forward, 'log')}"]}


def test_a_compiled_function_that_calls_modules():
    model, x = Model(), bad()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def f(x):
        return model(x) * 2

    with check_ops(backend="aot_eager") as c:
        f(x)
    assert found(c) == {3: [f"INF@{at('log', Head.forward, 'log')}"]}


def test_a_compiled_function_and_a_batch_that_is_given():
    def f(x, table):
        y = x - 2
        return torch.sqrt(y) + table  # sqrt

    x = torch.full((4, 3), 3.0)
    x[1, 2] = 0
    fast = torch.compile(f, backend="aot_eager", fullgraph=True)
    with check_ops(x, backend="aot_eager") as c:
        fast(x, torch.ones(4, 3))
    assert found(c) == {1: [f"NAN@{at('sqrt', f, 'sqrt')}"]}
    with check_ops(backend="aot_eager") as c:  # no batch: one row
        fast(x, torch.ones(4, 3))
    assert c.flags.shape[0] == 1
    assert found(c) == {0: [f"NAN@{at('sqrt', f, 'sqrt')}"]}


def test_a_second_block_compiles_nothing_and_leaving_restores_what_was():
    compiles = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model, x = Model(), bad()
    fast = torch.compile(model, backend=compiles)
    fast(x)
    inner = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for _ in range(3):
        with check_ops(backend=inner) as c:
            fast(x)
            fast(torch.randn(5, 4))
        assert sorted(found(c)) == [3]
        fast(x)
    assert compiles.frame_count == 1
    assert inner.frame_count == 1


def test_backward():
    model, x = Model(), torch.randn(5, 4)
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    fast(x).sum().backward()
    outside = [each.grad.clone() for each in model.parameters()]
    model.zero_grad()
    with check_ops(backend="aot_eager") as c:
        fast(x).sum().backward()
    assert all(map(torch.equal, outside, [each.grad for each in model.parameters()]))
    assert found(c) == {}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_a_nan_that_only_the_backward_pass_makes(backend):
    def f(x):
        return torch.sqrt(x).sum()

    x = torch.tensor([[1.0], [0.0], [4.0]], requires_grad=True)
    fast = torch.compile(f, backend=backend, fullgraph=True)
    with check_ops(x, backend=backend) as c:
        fast(x).backward()
    assert found(c)
    assert all("backward" in each.lower() for errors in found(c).values() for each in errors)


def test_batches_of_any_size():
    model = Model()
    inner = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(model, backend="aot_eager", dynamic=True)
    for samples in (5, 8, 13):
        with check_ops(backend=inner) as c:
            fast(bad(samples))
        assert c.flags.shape[0] == samples
        assert found(c) == {3: [f"INF@{at('log', Head.forward, 'log')}"]}
    assert inner.frame_count == 1


def test_graph_breaks_keep_the_samples():
    class Broken(nn.Module):
        def forward(self, x):
            y = (x + 1).t()
            torch._dynamo.graph_break()
            return torch.log(y).sum(0)  # log

    x = torch.ones(4, 3)
    x[2] = -1
    fast = torch.compile(Broken(), backend="aot_eager")
    with check_ops(backend="aot_eager") as c:
        fast(x)
    assert found(c) == {2: [f"INF@{at('log', Broken.forward, 'log')}"]}


def test_eager_and_compiled_code_in_one_block():
    model, head = Model(), Head()
    fast = torch.compile(model, backend="aot_eager")

    def f(x):
        y = fast(x)
        return torch.sqrt(y - 100)  # sqrt

    x = bad()
    with check_ops(x, backend="aot_eager") as c:
        f(x)
        head(x)
    errors = found(c)
    assert errors[3] == [
        f"INF@{at('log', Head.forward, 'log')}",
        f"NAN@{at('sqrt', f, 'sqrt')}",
    ]
    assert errors[0] == [f"NAN@{at('sqrt', f, 'sqrt')}"]


def test_a_line_of_a_model_without_code_of_its_own():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[0] = NAN
    fast = torch.compile(model, backend="aot_eager")

    def f(x):
        return fast(x)  # call

    with check_ops(backend="aot_eager") as c:
        f(torch.randn(2, 4))
    assert found(c)[0] == [f"NAN@{at('addmm', f, 'call')}"]


def test_meant_infs_mixes_and_ids():
    table = nn.Embedding(5, 4)

    class Net(nn.Module):
        def forward(self, ids, x):
            scores = x @ x.transpose(1, 2) + torch.full((2, 2), -INF).triu(1)
            scores = scores.masked_fill(torch.eye(2, dtype=torch.bool), -INF)
            scores = torch.where(scores[:, :, :1] > -INF, scores, 0.0)
            y = torch.softmax(scores, -1) @ (x + table(ids))
            return y + torch.arange(4.0)[ids][:, :, None] / x.mean(0)

    ids, x = torch.tensor([[1, 2], [3, 9], [0, 0]]), torch.rand(3, 2, 4) + 1
    net = Net()
    for model in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        with check_ops(backend="aot_eager") as c:
            model(ids, x)
        errors = found(c)
        assert sorted(errors) == [1]
        assert {each.partition(" at ")[0] for each in errors[1]} == {
            "OUT_OF_BOUNDS@aten::embedding",
            "OUT_OF_BOUNDS@aten::index",
        }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
@pytest.mark.parametrize("backend", ["inductor", "aot_eager", None])
def test_gradients_of_bad_ids_go_to_the_right_rows(backend):
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def forward(self, ids):
            return self.table(ids).sum()  # embedding

    model, ids = Lookup(), torch.tensor([[1, 9], [2, -3], [0, 0]])
    fast = model if backend is None else torch.compile(model, backend=backend)
    with check_ops(backend=backend or "inductor") as c:
        fast(ids).backward()
    assert model.table.weight.grad.sum(1).tolist() == [9.0, 3.0, 3.0, 0.0, 3.0]
    where = at("embedding", Lookup.forward, "embedding")
    assert found(c) == {i: [f"OUT_OF_BOUNDS@{where}"] for i in (0, 1)}


def test_mixes_of_bad_samples_accuse_nobody_else():
    def f(x):
        y = x.log()
        return y.mean(0) * 2 + 1 / y.sum(1).mean()

    x = torch.ones(4, 2) * 2
    x[1] = -1
    fast = torch.compile(f, backend="aot_eager", fullgraph=True)
    with check_ops(x, backend="aot_eager") as c:
        fast(x)
    assert sorted(found(c)) == [1]
    x[1] = 1e38
    g = torch.compile(lambda x: x.sum(0) * 10, backend="aot_eager", fullgraph=True)
    with check_ops(x, backend="aot_eager") as c:
        g(x)
    assert sorted(found(c)) == [0, 1, 2, 3]


def test_divisions_and_users_checks():
    def f(x, y):
        check((x > 0).all(1), "x must be positive, got {x} (at most {most})", x=x[:, 0], most=9)
        return x / y  # div

    x, y = torch.ones(3, 2), torch.ones(3, 2)
    y[1, 1] = 0
    x[2] = -2.5
    outside = torch.compile(f, backend="aot_eager", fullgraph=True)
    assert torch.equal(outside(x, y), x / y)
    with check_ops(x, y, backend="aot_eager") as c:
        inside = outside(x, y)
    assert torch.equal(inside, x / y)
    errors = found(c)
    where = at("div", f, "div")
    assert sorted(errors[1]) == [f"INF@{where}", f"NEGATIVE_IDX@zero divisor of {where}"]
    assert errors[2][0].startswith('UNKNOWN@check "x must be positive, got {x}')
    said = "x must be positive, got -2.5 (at most 9) at test_flags_opchecks_compile.py:"
    assert said in str(flags.report(c))
    assert sorted(errors) == [1, 2]


def test_a_stance_of_the_users_own():
    model, x = Model(), bad()
    fast = torch.compile(model, backend="aot_eager")
    with torch.compiler.set_stance("force_eager"):
        before = eval_frame._stance
        with check_ops() as c:
            fast(x)
        assert eval_frame._stance == before
    assert sorted(found(c)) == [3]
    mine = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    with torch.compiler.set_stance("default", force_backend=mine), check_ops() as c:
        fast(x)
    assert sorted(found(c)) == [3]
    assert mine.frame_count == 1


def test_blocks_in_blocks_and_exceptions():
    model, x = Model(), bad()
    fast = torch.compile(model, backend="aot_eager")
    with pytest.raises(KeyError), check_ops(backend="aot_eager") as outer:  # noqa: PT012
        with check_ops(backend="aot_eager", checks="nan") as inner:
            fast(x)
        fast(x)
        raise KeyError
    assert found(inner) == {}
    assert sorted(found(outer)) == [3]


def test_threads_without_a_block_are_left_alone():
    model, x = Model(), bad()
    fast = torch.compile(model, backend="aot_eager")
    outside, got = fast(x), []
    with check_ops(backend="aot_eager") as c:
        thread = threading.Thread(target=lambda: got.append(fast(x)))
        thread.start()
        thread.join()
    assert torch.equal(got[0], outside)
    assert found(c) == {}


def test_a_transformer_compiled():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=9,
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(0, 9, (4, 6))
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[1, 3:] = 0
    fast = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        with check_ops(backend="aot_eager") as c:
            inside = fast(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.equal(model(input_ids=ids, attention_mask=mask).last_hidden_state, inside)
        assert found(c) == {}
        model.encoder.layer[0].intermediate.dense.weight.fill_(3e38)
        with check_ops(backend="aot_eager") as c:
            fast(input_ids=ids, attention_mask=mask)
    first = flags.first_failure(c)
    assert first is not None
    assert first.location_name.startswith("aten::addmm at modeling_bert.py:")
    assert first.location_name.endswith("in BertIntermediate.forward")

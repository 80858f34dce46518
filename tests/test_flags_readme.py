"""Programs written for TorchGuard's README, with the import changed, do what it documents."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import opguard.flags as tg
from opguard.flags import (
    AccumulationConfig,
    Dedupe,
    Err,
    ErrorConfig,
    ErrorDomain,
    ErrorLocation,
    Ok,
    Order,
    Priority,
    as_exception,
    as_result,
    err,
    find,
    fix,
    flag_inf,
    flag_nan,
    flag_nan_and_inf,
    flag_oob_indices,
    flags,
    get_config,
    has_err,
    push,
    set_config,
    tracked,
    unwrap,
)

NAN = float("nan")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    before = get_config()
    set_config(ErrorConfig())
    ErrorLocation.reset()
    torch._dynamo.reset()
    yield
    set_config(before)
    ErrorLocation.reset()


def compiled(fn):
    return torch.compile(fn, fullgraph=True, backend="aot_eager")


@tracked
class MyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Linear(8, 6)
        self.layer2 = nn.Linear(6, 4)

    def forward(self, x):
        f = err.new(x)
        x = self.layer1(x)
        f = flag_nan(x, self.layer1, f)
        x = self.layer2(x)
        f = flag_nan(x, self.layer2, f)
        return x, f


@pytest.mark.parametrize("wrap", [lambda model: model, compiled], ids=["eager", "compiled"])
def test_quick_start(wrap):
    module = MyModel()
    model = wrap(module)
    x = torch.randn(32, 8)
    out, f = model(x)
    assert not has_err(f)
    assert flags.repr(f) == "ErrorFlags(32 samples, no errors)"
    with torch.no_grad():
        module.layer2.weight[0, 0] = NAN
    out, f = model(x)
    assert (f.shape, f.dtype) == ((32, 4), torch.int64)
    assert has_err(f)
    assert flags.repr(f) == "ErrorFlags(32 samples, 32 errors: 32xNAN @ layer2)"
    assert out.isnan().any(1).all()


def test_common_patterns(caplog):
    head = nn.Linear(3, 3)
    head._fx_path = "head"
    logits, targets = torch.randn(5, 3), torch.arange(5)
    logits[1, 0], logits[4, 2] = NAN, NAN
    f = flag_nan(logits, head)

    clean_logits, clean_targets = err.take_ok(f, logits), err.take_ok(f, targets)
    assert torch.nn.functional.mse_loss(clean_logits, clean_logits).item() == 0
    assert clean_targets.tolist() == [0, 2, 3]
    assert err.take_ok_p(f, logits, fill=0.0).isfinite().all()

    fixed, g = fix(logits, f, head, fallback=0.0)
    assert fixed[[1, 4]].count_nonzero() == 0
    assert torch.equal(fixed[[0, 2, 3]], logits[[0, 2, 3]])
    assert err.has_fallback(g).tolist() == [False, True, False, False, True]

    if has_err(f):
        logging.getLogger(__name__).warning("Bad samples: %s", flags.summary(f))
    assert "Bad samples: {'head': {'NAN': 2}}" in caplog.text

    ok_out, err_out = err.partition(f, logits)
    assert (ok_out.shape, err_out.shape) == ((3, 3), (2, 3))
    assert torch.nonzero(err.is_err(f)).squeeze(-1).tolist() == [1, 4]
    found = [(e.code_name, e.location_name) for e in flags.unpack(f, sample_idx=1)]
    assert found == [("NAN", "head")]


def test_core_concepts():
    f = err.push(err.new_t(2), err.OVERFLOW, 3, where=torch.tensor([True, False]))
    f = err.push(f, err.FALLBACK_VALUE, 4)
    assert err.has_domain(f, ErrorDomain.NUMERIC).tolist() == [True, False]
    assert err.has_domain(f, ErrorDomain.RUNTIME).tolist() == [True, True]
    assert [err.has_domain(f, d).tolist() for d in range(4)] == [
        [True, False],
        [False, False],
        [False, False],
        [True, True],
    ]
    assert (err.NAN, err.INF, err.OVERFLOW, err.OOB, err.CRITICAL, err.ERROR) == (1, 2, 3, 5, 3, 2)
    assert err.max_severity(err.push(err.new_t(1), err.NAN, 1, severity=err.WARN)).tolist() == [1]
    g = err.push(err.new_t(1), err.NAN, 1)
    assert err.get_first_severity(g).tolist() == [err.CRITICAL]
    assert err.get_first_code(err.clear(f, err.OVERFLOW)).tolist() == [13, 13]
    numpy_like = err.count_errors(f)
    assert (numpy_like.dtype, err.max_severity(f).dtype) == (torch.int32, torch.int64)


def test_dynamic_shapes_behind_the_option_the_readme_names():
    model = nn.Identity()

    def forward(x):
        f = err.new(x)
        f = err.push(f, err.NAN, 1, where=x.isnan().any(-1))
        out = model(x)
        return err.take_ok(f, out)

    x = torch.randn(4, 3)
    x[2, 0] = NAN
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert torch.equal(compiled(forward)(x), x[[0, 1, 3]])


@tracked
class Helped(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.embed = nn.Embedding(10, 4)

    def forward(self, x, ids):
        f = err.new(x)
        out = self.layer(x)
        f = flag_nan(out, self.layer, f)
        f = flag_inf(out, self.layer, f)
        bad = (out.abs() > 1e6).any(dim=-1)
        f = push(f, err.OVERFLOW, self.layer, where=bad)
        f = flag_oob_indices(ids, 10, self.embed, f)
        out, f = fix(out, f, self.layer, fallback=0.0)
        return out, f


def test_helper_functions():
    torch.manual_seed(0)
    model = Helped()
    x = torch.randn(5, 4)
    x[1, 0], x[2, 1], x[3] = NAN, float("inf"), 1e8
    ids = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1], [3, 10]])
    with torch.no_grad():
        model.layer.weight.copy_(torch.eye(4))
    expected = model(x, ids)
    for out, f in (expected, compiled(model)(x, ids)):
        assert torch.equal(out[0], x[0])
        assert out[1:].count_nonzero() == 0
        assert torch.equal(f, expected[1])
        assert find(err.NAN, f)[1].item()
        assert find(err.OOB, f).tolist() == [False, False, False, False, True]
        assert find(err.OVERFLOW, f).tolist()[3]
        assert err.has_fallback(f).tolist() == [False, True, True, True, True]
        assert flags.summary(f)["embed"] == {"OUT_OF_BOUNDS": 1}
    f = flag_nan_and_inf(x, model.layer)
    assert torch.equal(f, flag_inf(x, model.layer, flag_nan(x, model.layer)))


def test_combinators_section():
    h = torch.tensor([[3.0, 4.0], [NAN, 1.0], [0.0, 2.0]])
    f = flag_nan(h, 7)
    normed = err.map_ok(f, h, lambda z: z / z.norm(dim=-1, keepdim=True))
    assert normed[0].tolist() == pytest.approx([0.6, 0.8])
    zeroed = err.map_err(f, normed, torch.zeros_like)
    assert zeroed[1].tolist() == [0.0, 0.0]
    assert err.replace(h, value=0.0, targets=[err.NAN, err.INF])[1].tolist() == [0.0, 1.0]
    assert err.replace(h, value=0.0, targets=[err.NAN])[1].tolist() == [0.0, 1.0]
    h[0, 0], h[0, 1] = 999, float("inf")
    assert err.replace(h, value=-1.0, targets=[999, float("inf")])[0].tolist() == [-1.0, -1.0]

    def add_context(flags):
        return err.push(flags, err.SATURATED, location=99, severity=err.WARN)

    updated_flags = err.map_err_flags(f, add_context)
    assert err.has_code(updated_flags, err.SATURATED).tolist() == [False, True, False]
    manual = push(f, err.NAN, location=42, where=torch.isnan(h).any(dim=-1))
    assert [e.location for e in flags.unpack(manual, 1)] == [7, 42]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_control_flow_section(dtype):
    from opguard.flags.experimental import IF, IS, OR, err

    tg.CONFIG.flag_dtype = dtype

    def handle(z, f, value):
        return torch.full_like(z, value), f.clone()

    def simple(z, f):
        return IF(IS(err.NAN, f), lambda: (torch.zeros_like(z), f.clone())).ELSE(
            lambda: (z.clone(), f.clone())
        )

    def several(z, f):
        return (
            IF(IS(err.NAN, f), lambda: handle(z, f, 1.0))
            .ELIF(IS(err.INF, f), lambda: handle(z, f, 2.0))
            .ELSE(lambda: (z.clone(), f.clone()))
        )

    def compound(z, f):
        return IF(
            OR(IS(err.NAN, f), IS(err.INF, f)), lambda: (torch.zeros_like(z), f.clone())
        ).ELSE(lambda: (z.clone(), f.clone()))

    z = torch.full((2, 2), 5.0)
    clean = err.new_t(2)
    cases = {None: (5.0, 5.0, 5.0), err.NAN: (0.0, 1.0, 0.0), err.INF: (5.0, 2.0, 0.0)}
    for fn, column in ((simple, 0), (several, 1), (compound, 2)):
        torch._dynamo.reset()
        run = compiled(fn)
        for code, values in cases.items():
            f = clean if code is None else err.push(clean, code, 3)
            for out, g in (fn(z, f), run(z, f)):
                assert torch.equal(out, torch.full((2, 2), values[column]))
                assert flags.unpack_all(g) == flags.unpack_all(f)


@tracked
class TransformerBlock(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, num_heads)
        self.ffn = nn.Sequential(nn.Linear(dim, dim * 4), nn.GELU(), nn.Linear(dim * 4, dim))


def test_location_tracking_section():
    block = TransformerBlock(8, 2)
    assert block.attention._fx_path == "attention"
    assert block.ffn._fx_path == "ffn"
    assert block.ffn[0]._fx_path == "ffn.0"
    assert block.ffn[2]._fx_path == "ffn.2"
    assert not hasattr(block.ffn[1], "_fx_path")
    f = flag_nan(torch.tensor([[NAN]]), block.ffn[2])
    assert flags.summary(f) == {"ffn.2": {"NAN": 1}}


def test_weighted_tree_section():
    from opguard.flags import WeightedLocationTree

    tree = WeightedLocationTree(max_locations=1024)
    tree.set_weight("head.*", 10.0)
    tree.set_weight("encoder.layer*", 1.0)


def test_tensorcheck_section():
    from opguard.flags import tensorcheck
    from opguard.flags.experimental import err as exp_err

    @tracked
    class SafeModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        @tensorcheck
        def forward(self, x):
            f = err.new(x)
            out = self.layer(x)
            return out, f

        @tensorcheck(auto_detect={err.NAN})
        def forward_nan_only(self, x):
            return self.layer(x) * float("inf"), err.new(x)

        @tensorcheck(auto_detect=False)
        def forward_no_detect(self, x):
            return self.layer(x), err.new(x)

    @tracked
    class ExperimentalModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        @tensorcheck
        def forward(self, x):
            f = exp_err.new(x)
            return self.layer(x), f

    x = torch.ones(2, 3)
    x[1, 0] = NAN
    model = SafeModel()
    for run in (model, compiled(model)):
        assert err.has_nan(run(x)[1]).tolist() == [False, True]
    assert not err.has_inf(model.forward_nan_only(x)[1]).any()
    assert not has_err(model.forward_no_detect(x)[1])
    _, f = ExperimentalModel()(x)
    assert f.dtype is torch.float32
    assert err.has_nan(f).tolist() == [False, True]


def test_typing_section():
    from opguard.flags import DimensionMismatchError, DTypeMismatchError, tensorcheck
    from opguard.flags.typing import (
        Broadcast,
        Dim,
        Tensor,
        error_t,
        float32_t,
        int64_t,
        type_cast,
    )

    # Annotations that are evaluated, as in a module without `from __future__ import annotations`.
    def forward(self, x):
        f = err.new(x)
        out = self.linear(x)
        f = flag_nan(out, self.linear, f)
        return out, f

    forward.__annotations__ = {
        "x": Tensor[float32_t, ("batch", Dim.in_features)],
        "return": tuple[
            Tensor[float32_t, ("batch", Dim.out_features)],  # noqa: F821
            Tensor[error_t, ("batch", "num_words")],  # noqa: F821
        ],
    }

    @tracked
    class Typed(nn.Module):
        def __init__(self, in_features: int, out_features: int):
            super().__init__()
            self.in_features = in_features
            self.out_features = out_features
            self.linear = nn.Linear(in_features, out_features)

    Typed.forward = tensorcheck(forward)
    model = Typed(4, 2)
    out, f = model(torch.zeros(3, 4))
    assert (out.shape, f.shape) == ((3, 2), (3, 4))
    with pytest.raises(DimensionMismatchError):
        model(torch.zeros(3, 5))
    with pytest.raises(DTypeMismatchError):
        model(torch.zeros(3, 4, dtype=torch.float64))

    def encode(self, x, bias):
        return x + bias

    encode.__annotations__ = {
        "x": Tensor[float32_t, ("batch", "seq", Dim.hidden_size)],
        "bias": Tensor[float32_t, (Broadcast, Dim.hidden_size)],
        "return": Tensor[float32_t, ("batch", "seq", Dim.hidden_size)],
    }

    class Encoder:
        hidden_size = 6
        forward = tensorcheck(encode)

    assert Encoder().forward(torch.zeros(2, 3, 6), torch.zeros(1, 6)).shape == (2, 3, 6)
    result = type_cast[float32_t](torch.arange(3))
    assert result.is_ok()
    assert result.unwrap().dtype is torch.float32
    assert type_cast[int64_t](torch.ones(1)).unwrap().tolist() == [1]


def test_result_section():
    @as_result
    def might_fail(x):
        if x < 0:
            raise ValueError("Negative input")
        return x * 2

    assert might_fail(10) == Ok(20)
    failed = might_fail(-5)
    assert failed.is_err()
    assert str(failed.unwrap_err()) == "Negative input"

    @as_result
    def safe_divide(a, b):
        if b == 0:
            raise ZeroDivisionError("Division by zero")
        return a / b

    def process(x, y):
        result = safe_divide(x, y)
        if result.is_err():
            return result
        return Ok(result.unwrap() + 1)

    assert process(4, 2) == Ok(3.0)
    assert isinstance(process(4, 0), Err)
    assert as_exception(process)(4, 2) == unwrap(process)(4, 2) == 3.0
    with pytest.raises(ZeroDivisionError):
        unwrap(process)(4, 0)


def test_configuration_section():
    assert (tg.CONFIG.flag_dtype, tg.CONFIG.num_slots) == (torch.int64, 16)
    tg.CONFIG.flag_dtype = torch.float32
    tg.CONFIG.num_slots = 32
    x = torch.randn(4, 8)
    assert (tg.err.new(x).dtype, tg.err.new(x).shape) == (torch.float32, (4, 16))
    original = get_config()
    set_config(ErrorConfig(flag_dtype=torch.float32, num_slots=64))
    try:
        assert tg.err.new(x).shape == (4, 32)
    finally:
        set_config(original)
    assert tg.CONFIG.num_slots == 32
    custom = tg.ErrorConfig(flag_dtype=torch.float64, num_slots=8)
    f = tg.err.new_t(5, config=custom)
    assert (f.dtype, f.shape) == (torch.float64, (5, 2))
    f = tg.err.push(f, tg.ErrorCode.NAN, location=1)
    assert tg.err.has_nan(f).all()
    tg.CONFIG.use_transposed_layout = True
    tg.CONFIG.transpose_threshold = 10000
    assert tg.CONFIG.should_transpose(batch_size=15000)


def test_why_the_oldest_stay_by_default():
    """A NaN of the first of 20 layers: its record stays with FIRST, and is gone with LAST."""
    for order, first, last in ((Order.FIRST, 1, 16), (Order.LAST, 20, 5)):
        tg.CONFIG.accumulation = AccumulationConfig(
            priority=Priority.CHRONO, order=order, dedupe=Dedupe.UNIQUE
        )
        f = err.new_t(1)
        for layer in range(1, 21):
            f = err.push(f, err.NAN, layer)
        kept = [e.location for e in flags.unpack(f)]
        assert (kept[0], kept[-1], len(kept)) == (first, last, 16)


def test_experimental_quick_start():
    from opguard.flags.experimental import IF, IS, err

    def forward(x):
        f = err.new(x)
        f = err.push(f, err.NAN, location=42, where=torch.isnan(x).any(dim=-1))
        out, f = IF(IS(err.NAN, f), lambda: (torch.zeros_like(x), f.clone())).ELSE(
            lambda: (x.clone(), f.clone())
        )
        return out, f

    run = compiled(forward)
    x = torch.randn(3, 4)
    assert torch.equal(run(x)[0], x)
    x[1, 1] = NAN
    out, f = run(x)
    assert out.count_nonzero() == 0
    assert f.dtype is torch.float32
    assert [e.location for e in flags.unpack(f, 1)] == [42]


class SafeModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 16)

    def forward(self, x):
        from opguard.flags.experimental import IF, IS, err

        f = err.new(x)
        out = self.linear(x)
        f = err.push(f, err.NAN, location=1, where=torch.isnan(out).any(dim=-1))
        out, f = IF(IS(err.NAN, f), lambda: (torch.zeros_like(out), f.clone())).ELSE(
            lambda: (out.clone(), f.clone())
        )
        return out, f


def test_experimental_training_example():
    model = SafeModel()
    run = compiled(model)
    x = torch.randn(8, 32, requires_grad=True)
    out, f = run(x)
    assert f.dtype is torch.float32
    assert not f.requires_grad
    out.sum().backward()
    torch.testing.assert_close(x.grad, model.linear.weight.sum(0).expand(8, 32))
    torch.testing.assert_close(model.linear.bias.grad, torch.full((16,), 8.0))


def test_inside_and_outside_the_compiled_region():
    """Static shapes inside, Python values and dynamic shapes after it."""

    def forward(x):
        f = err.new(x)
        f = flag_nan(x, "input", f)
        ok_out = err.take_ok_p(f, x, fill=0.0)
        err_out = err.take_err_p(f, x, fill=0.0)
        return ok_out, err_out, f

    x = torch.ones(3, 2)
    x[0, 0] = NAN
    ok_out, err_out, f = compiled(forward)(x)
    assert ok_out.tolist() == [[0, 0], [1, 1], [1, 1]]
    assert err_out[1:].count_nonzero() == 0
    assert flags.summary(f) == {"input": {"NAN": 1}}
    assert err.take_ok(f, x).shape == (2, 2)
    assert [len(errors) for errors in flags.unpack_all(f)] == [1, 0, 0]

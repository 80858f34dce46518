"""Which memory a module's weights lie in, whatever shares it, and what is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from opguard.pools._homes import Home
from opguard.pools._spill import SpillFolder
from opguard.pools._storages import leaves_of, refuse, storages_of
from opguard.pools.errors import Unmanageable

PAGE = 4096


@pytest.fixture
def folder(tmp_path):
    made = SpillFolder(tmp_path)
    yield made
    made.close()


def holding(**tensors: Tensor) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor, persistent=name != "hidden")
    return module


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor's elements; of its memory where no op knows the dtype."""
    flat = torch.empty(0, dtype=torch.uint8)
    first = tensor.storage_offset() * tensor.element_size()
    count = tensor.numel() * tensor.element_size()
    return bytes(flat.set_(tensor.untyped_storage(), first, (count,), (1,)).tolist())


# --- kinds ----------------------------------------------------------------------------------------

DTYPES = sorted(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    - {torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4},
    key=str,
)


def test_every_dtype_comes_back_bit_for_bit(folder):
    """Half, bfloat16, complex, bool, 8-bit floats, 4-bit: bytes are bytes."""
    assert {torch.float8_e4m3fn, torch.complex64, torch.uint4, torch.bool} <= set(DTYPES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's word on complex32
        tensors = {}
        for dtype in DTYPES:
            memory = torch.randint(0, 256, (160,), dtype=torch.uint8).untyped_storage()
            name = str(dtype).replace("torch.", "of_")
            tensors[name] = torch.empty(0, dtype=dtype).set_(memory, 0, (2, 5), (5, 1))
    before = {name: raw(tensor) for name, tensor in tensors.items()}
    module = holding(**tensors)
    home = Home.adopt(module, folder, "dtypes")
    home.bring_in()
    home.give_back()
    for name, tensor in tensors.items():
        assert getattr(module, name) is tensor
        assert raw(tensor) == before[name], name
        assert tensor.shape == (2, 5)


def test_odd_shapes(folder):
    odd = holding(
        none=torch.empty(0, 3),
        one=torch.tensor(2.5),
        turned=torch.randn(3, 5).t(),
        wide=torch.randn(4, 1).expand(4, 7),
        every_second=torch.randn(20)[1::2],
        conjugate=torch.randn(3, dtype=torch.complex64).conj(),
        negative=torch.randn(3, dtype=torch.complex64).conj().imag,
    )
    before = {name: (t.clone(), t.stride()) for name, t in odd.named_buffers()}
    home = Home.adopt(odd, folder, "odd")
    home.give_back()
    for name, tensor in odd.named_buffers():
        assert torch.equal(tensor, before[name][0]), name
        assert tensor.stride() == before[name][1]
    assert odd.conjugate.is_conj()
    assert odd.negative.is_neg()
    empty = Home.adopt(nn.ReLU(), folder, "empty")
    empty.bring_in()
    assert (empty.nbytes, empty.resident(), empty.give_back()) == (0, 0, 0)


# --- sharing --------------------------------------------------------------------------------------


def test_what_shares_memory_still_does(folder):
    weight = nn.Parameter(torch.randn(32, 16))
    model = nn.Module()
    model.one = nn.Linear(16, 32, bias=False)
    model.two = nn.Linear(16, 32, bias=False)
    model.one.weight = model.two.weight = weight
    model.register_buffer("turned", weight.detach().t(), persistent=False)
    model.register_buffer("row", weight.detach()[3])
    model.register_buffer("wide", weight.detach()[5, :1].expand(9), persistent=False)
    model.kept = weight.detach()[1:3]
    model.other = torch.randn(4)
    storages = storages_of(leaves_of(model))
    assert [one.nbytes for one in storages] == [weight.nbytes]
    home = Home.adopt(model, folder, "shared")
    assert home.nbytes == PAGE
    with torch.no_grad():
        model.two.weight[3] = 7
        model.kept[0] = 8
        weight.data[5, 0] = 9
    home.give_back()
    assert model.one.weight is weight
    assert torch.equal(model.turned, weight.t())
    assert (model.row == 7).all()
    assert (weight[1] == 8).all()
    assert (model.wide == 9).all()


def test_parts_of_one_storage_are_taken_alone():
    """Two small tensors of a large buffer are not a reason to write all of it."""
    flat = torch.randn(1_000_000)
    parts = holding(a=flat[10:20], b=flat[500_000:500_010], c=flat[15:30], d=flat[40:41])
    found = storages_of(leaves_of(parts))
    assert sum(one.nbytes for one in found) < 400
    assert [[leaf.name for leaf in one.leaves] for one in found] == [["a", "c"], ["b"], ["d"]]


def test_gradients_and_hidden_buffers(folder):
    model = nn.Linear(3, 3)
    model(torch.ones(3)).sum().backward()
    model.register_buffer("hidden", torch.ones(5), persistent=False)
    grads = [p.grad.data_ptr() for p in model.parameters()]
    names = [leaf.name for leaf in leaves_of(model)]
    assert names == ["weight", "bias", "hidden"]
    Home.adopt(model, folder, "grads")
    assert grads == [p.grad.data_ptr() for p in model.parameters()]
    assert (model.hidden == 1).all()


def test_recurrent_weights(folder):
    """torch keeps a list of its own of them, and one flat buffer."""
    model, x = nn.LSTM(8, 8, num_layers=2), torch.randn(3, 2, 8)
    with torch.no_grad():
        before = model(x)[0]
        home = Home.adopt(model, folder, "lstm")
        home.give_back()
        assert torch.equal(model(x)[0], before)
    assert home.astray() == []


def test_subclasses_by_their_inner_tensors(folder):
    """torchao's weights: the outer tensor stays the same object and computes the same."""
    pytest.importorskip("torchao")
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    for config in (Int8WeightOnlyConfig(), Float8WeightOnlyConfig()):
        model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(2, 64)
        quantize_(model, config)
        objects, before = [id(p) for p in model.parameters()], model(x)
        home = Home.adopt(model, folder, "quantized")
        assert home.nbytes < 64 * 64 * 4
        home.give_back()
        assert home.resident() == 0
        assert torch.equal(model(x), before)
        assert objects == [id(p) for p in model.parameters()]
        inner = model[0].weight.qdata
        with torch.no_grad():
            inner.zero_()
        assert home.give_back() == PAGE
        assert not model[0].weight.dequantize().any()
        assert any("::qdata" in member.name for member in home.members)
        assert home.base(inner).data_ptr() == inner.data_ptr()
        assert home.astray() == []


class Plain(Tensor):
    pass


def test_a_subclass_with_memory_of_its_own(folder):
    model = holding(w=nn.Parameter(torch.randn(3).as_subclass(Plain)))
    before = model.w.detach().clone()
    home = Home.adopt(model, folder, "plain")
    assert isinstance(model.w, nn.Parameter)
    assert torch.equal(model.w, before)
    assert home.astray() == []


def test_inference_tensors_stay_such(folder):
    with torch.inference_mode():
        model = nn.Linear(4, 4)
    x = torch.ones(4)
    with torch.no_grad():
        before = model(x)
        home = Home.adopt(model, folder, "inference")
        assert model.weight.is_inference()
        home.give_back()
        assert torch.equal(model(x), before)
    with torch.inference_mode():
        trained = nn.Linear(4, 4)
        with torch.inference_mode(False):
            trained = nn.Linear(4, 4)
        Home.adopt(trained, folder, "trained")
    trained(x).sum().backward()
    assert trained.weight.grad is not None


# --- refusals -------------------------------------------------------------------------------------


def freed() -> nn.Module:
    model = nn.Linear(2, 2)
    model.weight.untyped_storage().resize_(0)
    return model


def fake() -> nn.Module:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return nn.Linear(2, 2)


class Opaque(Tensor):
    """A wrapper that does not say what it wraps."""

    @staticmethod
    def __new__(cls):
        return Tensor._make_wrapper_subclass(cls, (3,))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return NotImplemented


def frozen() -> nn.Module:
    return torch.jit.freeze(torch.jit.script(nn.Linear(2, 2).eval()))


def quantized() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


REFUSED = {
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "on the meta device"),
    "lazy": (lambda: nn.LazyLinear(2), "run the model once first"),
    "sparse": (lambda: holding(b=torch.eye(3).to_sparse()), "only dense tensors"),
    "rows": (lambda: holding(b=torch.eye(3).to_sparse_csr()), "only dense tensors"),
    "blocked": (lambda: holding(b=torch.eye(3).to_mkldnn()), "only dense tensors"),
    "nested": (lambda: holding(b=nested()), "a nested tensor"),
    "quantized": (lambda: holding(b=quantized()), "old quantized kind"),
    "graph": (lambda: holding(b=torch.ones(3, requires_grad=True) * 2), "computed by autograd"),
    "freed": (freed, "its memory was freed"),
    "fake": (fake, "no __tensor_flatten__"),
    "opaque": (lambda: holding(b=Opaque()), "no __tensor_flatten__"),
    "frozen": (frozen, "constants of its graph"),
    "number": (lambda: 3, "expected a torch.nn.Module, got int"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_the_reason(kind, folder):
    make, reason = REFUSED[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's words on these kinds
        module = make()
    with pytest.raises(Unmanageable, match=reason):
        Home.adopt(module, folder, kind)
    assert folder.used == 0


def test_weights_that_inductor_may_have_folded():
    import torch._inductor.config as inductor

    model = torch.compile(nn.Linear(2, 2), backend="eager")
    in_place = nn.Linear(2, 2)
    in_place.compile(backend="eager")
    refuse(model)
    with inductor.patch(freezing=True):  # monkeypatch would leave no such setting behind
        with pytest.raises(Unmanageable, match="freezing folds its weights"):
            refuse(model)
        refuse(nn.Linear(2, 2))
        with pytest.raises(Unmanageable, match="freezing"):
            refuse(nn.Sequential(in_place))
    assert not inductor.freezing


def test_a_script_that_is_not_frozen(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = torch.jit.script(nn.Linear(2, 2))
    before = model(torch.ones(2))
    home = Home.adopt(model, folder, "script")
    home.give_back()
    assert torch.equal(model(torch.ones(2)), before)
    assert home.astray() == []
    assert len(home.tensors()) == 2

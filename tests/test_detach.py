"""detach_to_cpu with torch: one test for each way the outputs of OpGuard went wrong, and more."""

from __future__ import annotations

import collections
import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch import nn

from opguard import _C
from opguard.detaching import detach_to_cpu, register_detach


def history(*shape: int) -> torch.Tensor:
    """A tensor with grad history that fills its storage and is no view."""
    return torch.ones(*(shape or (3,)), requires_grad=True) * 2


def is_ordinary(tensor: torch.Tensor) -> bool:
    return not tensor.requires_grad and tensor.grad_fn is None and not tensor.is_inference()


def shares(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == two.untyped_storage().data_ptr()


# --- the copy rule ------------------------------------------------------------------------------


def test_a_plain_tensor_is_returned_itself():
    for tensor in (torch.ones(3), torch.tensor(1.0), torch.empty(0), torch.ones(2, 3).mT.clone()):
        assert detach_to_cpu(tensor) is tensor


def test_grad_history_is_detached_and_shares_memory():
    tensor = history()
    out = detach_to_cpu(tensor)
    assert is_ordinary(out)
    assert shares(out, tensor)
    assert tensor.requires_grad
    leaf = torch.ones(3, requires_grad=True)
    assert shares(detach_to_cpu(leaf), leaf)


def test_views_are_copied_compactly():
    big = torch.zeros(1 << 20)
    for view in (big[:1], big[5], big.view(1024, 1024), big.detach()[3:7], big.expand(2, 1 << 20)):
        out = detach_to_cpu(view)
        assert not shares(out, big)
        assert out.untyped_storage().nbytes() == out.nbytes
        assert torch.equal(out, view)


def test_copy_copies_all():
    tensor, plain = history(), torch.ones(3)
    out = detach_to_cpu([tensor, plain], copy=True)
    assert not shares(out[0], tensor)
    assert not shares(out[1], plain)
    assert all(map(is_ordinary, out))
    assert torch.equal(out[0], tensor)


def test_parameter_stays_a_parameter():
    weight = nn.Parameter(torch.ones(3))
    out = detach_to_cpu({"w": weight})["w"]
    assert type(out) is nn.Parameter
    assert is_ordinary(out)
    assert not shares(out, weight)
    assert weight.requires_grad

    class Special(nn.Parameter):
        pass

    special = Special(torch.ones(2))
    special.note = "n"
    out = detach_to_cpu(special)
    assert type(out) is Special
    assert out.note == "n"
    assert is_ordinary(out)


def test_output_does_not_alias_model_memory():
    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.register_buffer("table", torch.ones(4))

        def forward(self) -> list[torch.Tensor]:
            weight = self.inner.weight
            parts = [weight, weight.data, weight.detach(), weight.view(-1), weight[0], self.table]
            return [*parts, self.table.data, self.table.view(2, 2)]

    model = Leaky()
    before = copy.deepcopy(model.state_dict())
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            outs = detach_to_cpu(model(), models=model)
        for out in outs:
            out.data.zero_()
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    fresh = torch.ones(3)
    assert detach_to_cpu([fresh], models=[model])[0] is fresh


def test_models_must_be_modules():
    with pytest.raises(TypeError, match="models to be modules"):
        detach_to_cpu(torch.ones(2), models=(3,))
    with pytest.raises(TypeError, match="expected models to be a module or several, got int"):
        detach_to_cpu(torch.ones(2), models=3)


def test_results_are_ordinary_tensors_inside_inference_mode():
    outside, grad = torch.ones(3), history()
    with torch.inference_mode():
        made = torch.ones(3)
        asked = torch.ones(3, requires_grad=True)
        outs = detach_to_cpu([made, asked, outside, grad, nn.Parameter(made), made.view(3, 1)])
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
    assert all(map(is_ordinary, outs))
    weight = torch.ones(3, requires_grad=True)
    (outs[0] * weight).sum().backward()
    outs[0].add_(1)
    with torch.no_grad():
        detach_to_cpu([made])
        assert not torch.is_grad_enabled()
    detach_to_cpu([made])
    assert torch.is_grad_enabled()


def test_modes_come_back_when_something_fails():
    class Breaks(torch.Tensor):
        def detach(self):
            raise ZeroDivisionError

    bad = torch.ones(2).as_subclass(Breaks)
    with torch.inference_mode():
        made = torch.ones(2)
        with pytest.raises(ZeroDivisionError):
            detach_to_cpu([made, bad])
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_meta_tensor():
    out = detach_to_cpu([torch.ones(3, device="meta", requires_grad=True)])[0]
    assert out.device.type == "meta"
    assert not out.requires_grad


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_layouts_and_dtypes():
    dense = torch.eye(3)
    tensors = [
        dense.to_sparse(),
        dense.to_sparse_csr(),
        dense.to(torch.bfloat16),
        torch.complex(dense, dense),
        dense.bool(),
        torch.tensor(3),
        torch.empty(0, 3),
        torch.complex(dense, dense).conj(),
        torch.arange(5)[::2],
    ]
    for tensor in tensors:
        for copying in (False, True):
            out = detach_to_cpu([tensor], copy=copying)[0]
            assert out.dtype == tensor.dtype
            assert out.layout == tensor.layout
            assert torch.equal(out.to_dense(), tensor.to_dense())
            assert is_ordinary(out)
    sparse = (dense.to_sparse().requires_grad_() * 2).coalesce()
    assert is_ordinary(detach_to_cpu(sparse))


@pytest.mark.filterwarnings("ignore")
def test_quantized_tensor():
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    out = detach_to_cpu([quantized], copy=True)[0]
    assert out.is_quantized
    assert torch.equal(out.int_repr(), quantized.int_repr())


def test_subclass_keeps_class_and_attributes():
    class Named(torch.Tensor):
        pass

    tensor = history().as_subclass(Named)
    tensor.names = ["a", history()]
    out = detach_to_cpu([tensor])[0]
    assert type(out) is Named
    assert out.names[0] == "a"
    assert is_ordinary(out)
    assert is_ordinary(out.names[1])
    assert tensor.names[1].requires_grad
    plain = torch.Tensor._make_subclass(Named, torch.ones(2))
    assert detach_to_cpu(plain) is plain


def test_wrapper_subclass():
    from torch.testing._internal.two_tensor import TwoTensor

    tensor = TwoTensor(torch.ones(2), torch.zeros(2)).requires_grad_() * 2
    out = detach_to_cpu([tensor])[0]
    assert type(out) is TwoTensor
    assert is_ordinary(out)
    assert torch.equal(out.a, torch.full((2,), 2.0))


def test_fake_tensors_pass():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        tensor = torch.ones(3, requires_grad=True) * 2
        out = detach_to_cpu([tensor])[0]
    assert type(out) is type(tensor)
    assert not out.requires_grad


def test_functorch_tensors_pass():
    assert torch.equal(
        torch.vmap(lambda t: detach_to_cpu([t])[0] * 2)(torch.ones(3, 2)), torch.full((3, 2), 2.0)
    )
    grad = torch.func.grad(lambda t: (detach_to_cpu([t])[0] * t).sum())(torch.ones(3))
    assert torch.equal(grad, torch.ones(3))


def test_compiled_function_traces_it():
    @torch.compile(backend="eager", fullgraph=True)
    def step(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return detach_to_cpu({"a": tensor * 2, "b": tensor})

    out = step(torch.ones(3, requires_grad=True))
    assert set(out) == {"a", "b"}
    assert is_ordinary(out["a"])


# --- containers: a row of the table of faults each ----------------------------------------------


def test_model_output():
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    hidden = history(2, 3)
    value = BaseModelOutputWithPooling(last_hidden_state=hidden, hidden_states=(hidden, hidden))
    out = detach_to_cpu(value)
    assert type(out) is type(value)
    assert out.last_hidden_state is out["last_hidden_state"] is out[0]
    assert out.hidden_states[0] is out.last_hidden_state
    assert list(out.keys()) == list(value.keys())
    assert out.pooler_output is None
    assert is_ordinary(out.last_hidden_state)
    assert value.last_hidden_state is hidden


def test_diffusers_output():
    from diffusers.models.autoencoders.vae import DecoderOutput

    value = DecoderOutput(sample=history())
    out = detach_to_cpu([value])[0]
    assert type(out) is DecoderOutput
    assert out.sample is out["sample"]
    assert is_ordinary(out.sample)


def test_dynamic_cache():
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(history(1, 2, 3, 4), history(1, 2, 3, 4), 0)
    out = detach_to_cpu({"past": cache})["past"]
    assert type(out) is DynamicCache
    assert out is not cache
    assert out.get_seq_length() == 3
    assert is_ordinary(out.layers[0].keys)
    assert cache.layers[0].keys.requires_grad
    out.update(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), 0)
    assert cache.get_seq_length() == 3


def test_batch_encoding():
    from transformers import BatchEncoding

    value = BatchEncoding({"input_ids": history()})
    out = detach_to_cpu(value)
    assert type(out) is BatchEncoding
    assert is_ordinary(out.input_ids)
    assert value["input_ids"].requires_grad


Point = collections.namedtuple("Point", "x y")


def test_namedtuple_return_type_size():
    tensor = history(2, 3)
    out = detach_to_cpu(Point(tensor, 1))
    assert type(out) is Point
    assert is_ordinary(out.x)
    maximum = torch.max(tensor, 1)
    out = detach_to_cpu([maximum])[0]
    assert type(out) is torch.return_types.max
    assert is_ordinary(out.values)
    size = tensor.shape
    assert detach_to_cpu([size])[0] is size


def test_packed_sequence():
    from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

    packed = pack_sequence([history(3), history(2)])
    out = detach_to_cpu(packed)
    assert type(out) is PackedSequence
    assert is_ordinary(out.data)
    assert torch.equal(pad_packed_sequence(out)[0], pad_packed_sequence(packed)[0])


def test_ordered_and_default_dict():
    tensor = history()
    ordered = collections.OrderedDict(b=tensor, a=1)
    ordered.move_to_end("b")
    out = detach_to_cpu(ordered)
    assert type(out) is collections.OrderedDict
    assert list(out) == ["a", "b"]
    out.move_to_end("a")
    assert list(out) == ["b", "a"]
    out = detach_to_cpu(collections.defaultdict(list, a=tensor))
    assert type(out) is collections.defaultdict
    assert out["new"] == []
    assert is_ordinary(out["a"])


def test_list_subclass_with_arguments_loses_nothing():
    class Rows(list):
        def __init__(self, count, rows):
            super().__init__(rows)
            self.count = count

    out = detach_to_cpu(Rows(2, [history(), history()]))
    assert type(out) is Rows
    assert len(out) == out.count == 2
    assert is_ordinary(out[1])


@dataclasses.dataclass
class Result:
    boxes: torch.Tensor
    scores: list[torch.Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenResult:
    boxes: torch.Tensor


def test_dataclass_and_namespace():
    out = detach_to_cpu(Result(history(), [history()]))
    assert type(out) is Result
    assert is_ordinary(out.boxes)
    assert is_ordinary(out.scores[0])
    out = detach_to_cpu(FrozenResult(history()))
    assert type(out) is FrozenResult
    assert is_ordinary(out.boxes)
    value = SimpleNamespace(a=history())
    out = detach_to_cpu(value)
    assert is_ordinary(out.a)
    assert value.a.requires_grad


def test_set_frozenset_deque_mappingproxy_keys():
    tensor = history()
    out = detach_to_cpu(
        [
            {tensor},
            frozenset([tensor]),
            collections.deque([tensor], maxlen=2),
            MappingProxyType({"a": tensor}),
            {tensor: 1},
        ]
    )
    found = [*out[0], *out[1], *out[2], out[3]["a"], *out[4]]
    assert len({id(one) for one in found}) == 1
    assert is_ordinary(found[0])
    assert [type(one) for one in out] == [
        set,
        frozenset,
        collections.deque,
        MappingProxyType,
        dict,
    ]


def test_numpy_object_array():
    numpy = pytest.importorskip("numpy")
    tensor = history()
    array = numpy.empty((2, 2), dtype=object)
    array[0, 0], array[0, 1], array[1, 0], array[1, 1] = tensor, [tensor], 3, array
    out = detach_to_cpu(array)
    assert out.shape == (2, 2)
    assert is_ordinary(out[0, 0])
    assert out[0, 1][0] is out[0, 0]
    assert out[1, 1] is out
    assert array[0, 0] is tensor
    fortran = numpy.asfortranarray(array)
    assert detach_to_cpu(fortran)[0, 1][0] is not tensor
    turned = detach_to_cpu(array.T)
    assert turned[1, 0][0] is turned[0, 0]
    numbers = numpy.ones(3)
    assert detach_to_cpu(numbers) is numbers


def test_distribution():
    from torch import distributions as d

    mean = history()
    value = d.Independent(d.Normal(mean, torch.ones(3)), 1)
    out = detach_to_cpu(value)
    assert type(out) is d.Independent
    assert is_ordinary(out.base_dist.loc)
    assert out.sample().shape == (3,)
    assert torch.allclose(out.log_prob(torch.ones(3)), value.log_prob(torch.ones(3)))
    moved = d.TransformedDistribution(value.base_dist, [d.transforms.AffineTransform(mean, 2.0)])
    out = detach_to_cpu(moved)
    assert is_ordinary(out.transforms[0].loc)
    assert is_ordinary(detach_to_cpu(d.Categorical(logits=mean)).logits)


def test_attrs_classes():
    attrs = pytest.importorskip("attrs")

    @attrs.define
    class Slotted:
        a: object
        b: int = 2

    @attrs.frozen
    class Frozen:
        a: object

    @attrs.define(slots=False)
    class Loose:
        a: object

    for kind in (Slotted, Frozen, Loose):
        value = kind(history())
        out = detach_to_cpu([value])[0]
        assert type(out) is kind
        assert is_ordinary(out.a)
        assert value.a.requires_grad


def test_pytree_registered_type():
    from torch.utils import _pytree as pytree

    class Pair:
        def __init__(self, one, two):
            self.parts = (one, two)

    tensor = history()
    assert detach_to_cpu([Pair(tensor, 1)])[0].parts[0] is tensor
    pytree.register_pytree_node(
        Pair, lambda pair: (list(pair.parts), None), lambda parts, context: Pair(*parts)
    )
    try:
        out = detach_to_cpu([Pair(tensor, [tensor])])[0]
        assert is_ordinary(out.parts[0])
        assert out.parts[1][0] is out.parts[0]
    finally:
        pytree._deregister_pytree_node(Pair)


def test_register_detach():
    class Holder:
        def __init__(self, tensor):
            self.tensor = tensor

    register_detach(Holder, lambda value, detach: Holder(detach(value.tensor)))
    try:
        tensor = history()
        out = detach_to_cpu((Holder(tensor), tensor))
        assert out[0].tensor is out[1]
        assert is_ordinary(out[1])
    finally:
        register_detach(Holder, None)


def test_identity_rings_and_depth():
    tensor = history()
    value: list = [tensor, {"again": tensor}]
    value.append((value,))
    out = detach_to_cpu(value)
    assert out[0] is out[1]["again"]
    assert out[2][0] is out
    deep: object = tensor
    for _ in range(100_000):
        deep = [deep]
    out = detach_to_cpu(deep)
    for _ in range(100_000):
        out = out[0]
    assert is_ordinary(out)


def test_input_is_not_changed():
    tensor, inner = history(), [torch.ones(2)]
    value = {"a": [tensor, inner], "b": Result(tensor, inner), "c": (inner,)}
    out = detach_to_cpu(value)
    assert value["a"][0] is tensor
    assert tensor.requires_grad
    assert vars(value["b"]) == {"boxes": tensor, "scores": inner}
    out["a"][1].append(1)
    assert inner == [inner[0]]
    assert out["a"][1] is out["b"].scores is out["c"][0]


def test_modules_and_other_objects_are_returned_themselves():
    @dataclasses.dataclass(eq=False)
    class Net(nn.Module):
        size: int = 3

        def __post_init__(self):
            super().__init__()

    net = Net()
    generator = (i for i in range(3))
    value = [net, nn.Linear(1, 1), generator, torch.float32, torch.device("cpu"), nn.Linear]
    assert all(one is two for one, two in zip(value, detach_to_cpu(value), strict=True))


def test_failure_says_where():
    class Breaks(torch.Tensor):
        def detach(self):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        detach_to_cpu(Result(torch.ones(1), [torch.ones(2).as_subclass(Breaks)]))
    assert caught.value.__notes__ == ["while detaching value.scores[0]"]


# --- the accelerator's road, on host memory ------------------------------------------------------


def far(value, copying=False):
    return _C.detach(value, copying, (), True)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_accelerator_road_values():
    tensors = [
        history(3),
        torch.ones(2, 3, dtype=torch.bfloat16),
        torch.arange(12).view(3, 4).mT,
        torch.arange(12)[::2],
        torch.ones(3).expand(2, 3),
        torch.tensor(True),
        torch.empty(0, 2),
        torch.complex(torch.ones(2), torch.ones(2)).conj(),
        torch.eye(2).to_sparse(),
        torch.ones(1 << 19),
    ]
    with torch.inference_mode():
        tensors.append(torch.ones(5))
    outs = far({"all": tensors})["all"]
    for tensor, out in zip(tensors, outs, strict=True):
        assert is_ordinary(out)
        assert out.dtype == tensor.dtype
        assert torch.equal(out.to_dense(), tensor.to_dense())
        if tensor.layout is torch.strided and tensor.numel():
            assert not shares(out, tensor)
            assert out.untyped_storage().nbytes() == out.nbytes


def test_accelerator_road_containers():
    tensor, weight = history(), nn.Parameter(torch.ones(2))
    ring: list = [tensor]
    ring.append((ring, {tensor}, Point(weight, tensor)))
    out = far([ring, tensor, FrozenResult(tensor)])
    assert out[0][0] is out[1] is out[2].boxes
    assert out[0][1][0] is out[0]
    assert out[0][1][1] == {out[1]}
    assert type(out[0][1][2].x) is nn.Parameter
    assert not out[0][1][2].x.requires_grad


def test_accelerator_road_packs_once(monkeypatch):
    from opguard import _ops

    calls = []
    real = _ops.pack
    monkeypatch.setattr(_ops, "pack", lambda leaves: calls.append(len(leaves)) or real(leaves))
    outs = far([torch.full((4,), float(i)) for i in range(1000)])
    assert calls == [1000]
    assert [int(one[0]) for one in outs] == list(range(1000))


def test_ops_pass_opcheck():
    from opguard import _ops

    leaves = [torch.ones(3), torch.arange(4).view(2, 2), torch.ones(2, 3).mT]
    torch.library.opcheck(torch.ops.opguard.pack.default, (leaves,))
    packed = _ops.pack(leaves)
    torch.library.opcheck(torch.ops.opguard.unpack.default, (packed, leaves))
    assert all(map(torch.equal, _ops.unpack(packed, leaves), leaves))


# --- leaks --------------------------------------------------------------------------------------


def test_no_leak():
    script = Path(__file__).parent / "isolated" / "leak_detach.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_heavy_is_imported():
    code = (
        "import sys, torch; from opguard.detaching import detach_to_cpu;"
        "detach_to_cpu([torch.ones(2, requires_grad=True) * 2, {}]);"
        "heavy = {'transformers', 'diffusers', 'rich', 'pydantic', 'torch._dynamo'};"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_views_of_one_object_array_share_what_is_in_them():
    numpy = pytest.importorskip("numpy")
    array = numpy.empty(1, dtype=object)
    array[0] = torch.ones(2, requires_grad=True) * 2
    first, second = detach_to_cpu([array, array.view()])
    assert first[0] is second[0]


def test_what_a_dict_and_its_proxy_hold_stays_one():
    inner = {"a": torch.ones(2, requires_grad=True) * 2}
    plain, proxy = detach_to_cpu([inner, MappingProxyType(inner)])
    assert plain["a"] is proxy["a"]


def test_the_place_of_the_impl_follows_the_tensor():
    """Learned by the first list; what is swapped or set afterwards is read as it is then."""
    detach_to_cpu([torch.ones(2) for _ in range(200)])
    one, two = torch.ones(2), torch.zeros(6)[:3]
    torch.utils.swap_tensors(one, two)
    three = torch.ones(2)
    three.data = torch.zeros(4)[:2]
    swapped, whole, replaced = detach_to_cpu([one, two, three])
    assert swapped.shape == (3,)
    assert swapped.untyped_storage().nbytes() == swapped.nbytes
    assert whole is two
    assert replaced.untyped_storage().nbytes() == replaced.nbytes


def test_models_whose_parameters_change_while_they_are_read():
    model = torch.nn.Linear(2, 2)

    class Hostile(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, kinds, args=(), kwargs=None):
            with torch._C.DisableTorchFunctionSubclass():
                model._parameters = {}
                model._buffers.clear()
                return func(*args, **(kwargs or {}))

    for i in range(20):
        model._buffers[f"b{i}"] = torch.ones(1).as_subclass(Hostile)
    assert torch.equal(detach_to_cpu(torch.ones(2), models=model), torch.ones(2))

"""What a commit does to an object, and that taking it back leaves nothing."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from opguard.pools.commits import AttributeCommit, CallableCommit, CommitABC, ForwardHookCommit
from opguard.pools.errors import PatchFailed
from opguard.pools.proxies import CommitObjectProxy


class Slotted:
    __slots__ = ("there", "unset")

    def __init__(self) -> None:
        self.there = 1


class WithProperty:
    kind = "class"

    def __init__(self) -> None:
        self._scale = 1.0

    @property
    def scale(self) -> float:
        return self._scale

    @scale.setter
    def scale(self, value: float) -> None:
        self._scale = value


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))


# --- identity -------------------------------------------------------------------------------------


def test_every_commit_is_itself_and_a_copy_is_another():
    one, two = AttributeCommit("a", 1), AttributeCommit("a", 1)
    known = one.uuid
    assert known == one.uuid != two.uuid
    assert copy.deepcopy(one).uuid != known
    assert copy.copy(one).uuid != known
    assert pickle.loads(pickle.dumps(one)).uuid != known


def test_a_commit_whose_author_calls_no_init_has_an_identity():
    class Bare(CommitABC):
        def __init__(self) -> None:
            pass

        def apply(self, obj):
            obj.on = True

        def revert(self, obj):
            del obj.on

    commit, obj = Bare(), SimpleNamespace()
    assert commit.uuid == commit.uuid
    with CommitObjectProxy(obj, [commit]):
        assert obj.on
    assert not hasattr(obj, "on")


def test_a_commit_is_an_abstract_class_of_two_methods():
    with pytest.raises(TypeError, match=r"apply.*revert"):
        CommitABC()


def test_get_revert_callable_takes_back():
    obj, commit = SimpleNamespace(a=1), AttributeCommit("a", 2)
    commit.apply(obj)
    commit.get_revert_callable(obj)()
    assert obj.a == 1


def test_one_commit_is_on_several_objects_at_a_time_and_once_on_each():
    one, two = SimpleNamespace(a=1), SimpleNamespace(a=10)
    for commit in (AttributeCommit("a", 5), CallableCommit(add("a"))):
        commit.apply(one)
        commit.apply(two)
        with pytest.raises(ValueError, match="applied to this SimpleNamespace already"):
            commit.apply(one)
        commit.revert(one)
        assert (one.a, two.a) != (1, 10)
        commit.revert(two)
        assert (one.a, two.a) == (1, 10)
        with pytest.raises(ValueError, match="is not applied"):
            commit.revert(two)


def add(name):
    def apply(obj):
        before = getattr(obj, name)
        setattr(obj, name, before + 1)
        return lambda: setattr(obj, name, before)

    return apply


# --- functions ------------------------------------------------------------------------------------


def test_a_function_that_returns_no_reverter_is_undone_and_named():
    def forgetful(obj):
        obj.a = 2
        obj.items.append(3)

    obj = SimpleNamespace(a=1, items=[1, 2])
    items = obj.items
    with (
        pytest.raises(PatchFailed, match=r"forgetful.*must return a callable"),
        CommitObjectProxy(obj, [CallableCommit(forgetful)]),
    ):
        pass
    assert obj.a == 1
    assert obj.items is items
    assert items == [1, 2]


def test_a_function_that_raises_half_way_in_a_module_is_undone():
    model = net()
    first, hooks = model[0], model[2]._forward_hooks

    def half(module):
        module[0] = nn.Identity()
        module[2].register_forward_hook(lambda *_: None)
        module[2].extra = 1
        del module[2]._parameters["bias"]
        raise KeyError("half way")

    bias = model[2].bias
    with (
        pytest.raises(PatchFailed) as caught,
        CommitObjectProxy(model).clone_and_add_callable_commit(half),
    ):
        pass
    assert isinstance(caught.value.__cause__, KeyError)
    assert model[0] is first
    assert model[2]._forward_hooks is hooks
    assert not hooks
    assert not hasattr(model[2], "extra")
    assert model[2].bias is bias
    assert [name for name, _ in model.named_parameters()] == [
        "0.weight", "0.bias", "2.weight", "2.bias",
    ]  # fmt: skip


def test_a_reverter_that_raises_half_way_leaves_the_commit_applied_and_can_be_tried_again():
    tries = []

    def patch(obj):
        obj.a, obj.b = 2, 2

        def revert():
            obj.a = 1
            tries.append(1)
            if len(tries) == 1:
                raise OSError("not now")
            obj.b = 1

        return revert

    obj = SimpleNamespace(a=1, b=1)
    proxy = CommitObjectProxy(obj).clone_and_add_callable_commit(patch)
    with pytest.raises(PatchFailed, match="not now"), proxy:
        pass
    assert (obj.a, obj.b) == (2, 2)
    assert proxy.applied == proxy.commits
    with proxy:
        assert (obj.a, obj.b) == (2, 2)
    assert (obj.a, obj.b) == (1, 1)
    assert proxy.applied == ()


@pytest.mark.parametrize(
    "obj",
    [{"a": 1, "b": [1]}, [1, 2], {1, 2}, bytearray(b"ab"), Slotted(), WithProperty, net()],
    ids=lambda obj: getattr(obj, "__name__", type(obj).__name__),
)
def test_failures_are_undone_on_any_kind_of_object(obj):
    def spoil(obj):
        if isinstance(obj, dict):
            obj.pop("a")
            obj["c"] = 1
        elif isinstance(obj, (list, bytearray)):
            obj[:] = obj[:1]
        elif isinstance(obj, set):
            obj.clear()
        elif isinstance(obj, Slotted):
            obj.unset, obj.there = 1, 2
        else:
            obj.kind, obj.new = "spoilt", 1
        raise RuntimeError("spoilt")

    before = state(obj)
    with (
        pytest.raises(PatchFailed, match="spoilt"),
        CommitObjectProxy(obj, [CallableCommit(spoil)]),
    ):
        pass
    assert state(obj) == before


def state(obj):
    if isinstance(obj, Slotted):
        return obj.there, hasattr(obj, "unset")
    if isinstance(obj, (type, nn.Module)):
        return list(vars(obj)), getattr(obj, "kind", None)
    return copy.copy(obj)


# --- attributes -----------------------------------------------------------------------------------


def test_an_attribute_is_put_back_and_one_that_was_not_there_is_removed():
    obj = SimpleNamespace(inner=SimpleNamespace(a=1))
    with CommitObjectProxy(obj, [AttributeCommit("inner.a", 2), AttributeCommit("new", 3)]):
        assert (obj.inner.a, obj.new) == (2, 3)
        obj.new = 4
    assert obj.inner.a == 1
    assert not hasattr(obj, "new")


def test_an_attribute_of_the_class_shows_again():
    obj = WithProperty()
    with CommitObjectProxy(obj, [AttributeCommit("kind", "own"), AttributeCommit("scale", 2.0)]):
        assert (obj.kind, obj.scale) == ("own", 2.0)
    assert obj.kind == "class"
    assert vars(obj) == {"_scale": 1.0}


def test_slots_and_classes_are_objects_too():
    obj = Slotted()
    stack = [AttributeCommit("there", 2), AttributeCommit("unset", 3)]
    with CommitObjectProxy(obj, stack):
        assert (obj.there, obj.unset) == (2, 3)
    assert obj.there == 1
    assert not hasattr(obj, "unset")

    class Sub(WithProperty):
        pass

    with CommitObjectProxy(Sub, [AttributeCommit("kind", "patched")]):
        assert Sub().kind == "patched"
    assert "kind" not in vars(Sub)
    with CommitObjectProxy(WithProperty, [AttributeCommit("kind", "patched")]):
        assert Sub().kind == "patched"
    assert WithProperty.kind == "class"


def test_submodules_parameters_and_buffers_keep_their_place():
    model = net()
    model.register_buffer("table", torch.ones(2))
    before = [(name, id(m)) for name, m in model.named_modules()]
    keys = list(model.state_dict())
    x = torch.ones(1, 3)
    y = model(x)
    stack = [
        AttributeCommit("0", nn.Identity()),
        AttributeCommit("2.bias", None),
        AttributeCommit("table", torch.zeros(2)),
        AttributeCommit("training", False),
        AttributeCommit("note", nn.ReLU()),
        AttributeCommit("0.plain", 1),
    ]
    with CommitObjectProxy(model, stack):
        assert model[2].bias is None
        assert not torch.equal(model(x), y)
        assert "note" in dict(model.named_children())
    assert [(name, id(m)) for name, m in model.named_modules()] == before
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), y)
    assert model.training


def test_a_plain_attribute_that_became_a_module_is_plain_again():
    model = net()
    model.note = "text"
    with CommitObjectProxy(model, [AttributeCommit("note", nn.ReLU())]):
        assert "note" in model._modules
    assert model.note == "text"
    assert "note" not in model._modules


def test_what_cannot_be_set_changes_nothing_and_is_named():
    model = net()
    first = model[0]
    for name, value in (("0", "no module"), ("0.weight", torch.ones(3)), ("9.x", 1)):
        stack = [AttributeCommit("training", False), AttributeCommit(name, value)]
        proxy = CommitObjectProxy(model, stack)
        with pytest.raises(PatchFailed, match=f"AttributeCommit {name}"), proxy:
            pass
        assert model[0] is first
        assert model.training


# --- hooks ----------------------------------------------------------------------------------------


def test_hooks_run_in_the_order_of_the_stack_and_go():
    model, order = net(), []

    def noting(name):
        return lambda *args: order.append(name)

    model.register_forward_hook(noting("own"))
    stack = [
        ForwardHookCommit(noting("a")),
        ForwardHookCommit(noting("b")),
        ForwardHookCommit(noting("first"), prepend=True),
        ForwardHookCommit(noting("inner"), path="2"),
        ForwardHookCommit(noting("pre"), pre=True),
    ]
    proxy = CommitObjectProxy(model, stack)
    with proxy:
        model(torch.ones(1, 3))
        assert order == ["pre", "inner", "first", "own", "a", "b"]
        order.clear()
        swapped = CommitObjectProxy(model, [stack[0], stack[3], stack[1]])
        with swapped:
            model(torch.ones(1, 3))
        assert order == ["inner", "own", "a", "b"]
        order.clear()
        model(torch.ones(1, 3))
        assert order == ["pre", "inner", "first", "own", "a", "b"]
    order.clear()
    model(torch.ones(1, 3))
    assert order == ["own"]
    assert not model._forward_pre_hooks
    assert not model[2]._forward_hooks


def test_a_hook_that_is_always_called_sees_a_forward_that_raised():
    class Failing(nn.Module):
        def forward(self, x):
            raise ArithmeticError("forward")

    model, seen = Failing(), []
    hook = ForwardHookCommit(
        lambda module, args, kwargs, result: seen.append((len(args), set(kwargs), result)),
        always_call=True,
        with_kwargs=True,
    )
    proxy = CommitObjectProxy(model, [hook])
    with pytest.raises(ArithmeticError, match="forward"), proxy:
        model(torch.ones(1))
    assert seen == [(1, set(), None)]
    for name, value in vars(model).items():
        if "hook" in name and hasattr(value, "__len__"):
            assert not value, name
    with pytest.raises(ArithmeticError):
        model(torch.ones(1))
    assert len(seen) == 1


def test_a_hook_replaces_results_and_a_wrong_target_is_named():
    model = net()
    x = torch.ones(1, 3)
    plain = model(x)
    doubled = CommitObjectProxy(model, [ForwardHookCommit(lambda m, a, result: result * 2)])
    assert torch.equal(doubled(x), plain * 2)
    assert torch.equal(model(x), plain)
    with (
        pytest.raises(PatchFailed, match=r"expected a module.*SimpleNamespace"),
        CommitObjectProxy(SimpleNamespace(), [ForwardHookCommit(print)]),
    ):
        pass
    with pytest.raises(ValueError, match="always_call is for hooks after forward"):
        ForwardHookCommit(print, pre=True, always_call=True)
    with pytest.raises(TypeError, match="hook to call"):
        ForwardHookCommit(3)

"""The container walk with fake leaves: types, identity, rings, depth, and hostile containers."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import gc
import sys
import types
from types import MappingProxyType, ModuleType, SimpleNamespace

import pytest
from fakes import FakeParameter, FakeTensor


@pytest.fixture(scope="module", autouse=True)
def _bound(C: ModuleType) -> None:
    C.bind_types(FakeTensor, FakeParameter)


def leaf(*shape: int) -> FakeTensor:
    """A tensor that must become another one."""
    return FakeTensor(*(shape or (2,)), requires_grad=True)


class ListWithArguments(list):
    def __init__(self, count, items):
        super().__init__(list(items)[:count])
        self.count_wanted = count


class DictWithArguments(dict):
    def __init__(self, first, /, *, second):
        super().__init__(first)
        self.second = second


class TupleWithArguments(tuple):
    def __new__(cls, one, two):
        made = super().__new__(cls, (one, two))
        made.label = [one]
        return made


class SlottedList(list):
    __slots__ = ("extra",)


Point = collections.namedtuple("Point", "x y")


class PointAndMore(Point):
    pass


@dataclasses.dataclass
class Plain:
    a: object
    b: object = 1


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: object


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenSlotted:
    a: object
    b: object = dataclasses.field(init=False, default=3)


@dataclasses.dataclass
class Refusing:
    """Cannot be made again by its constructor."""

    a: object

    def __post_init__(self):
        if type(self.a) is not list:
            raise ValueError("made by hand only")


def check(old: FakeTensor, new: FakeTensor) -> None:
    assert new is not old
    assert new.origin is old
    assert not new.requires_grad


def test_leaf_rules(C):
    plain = FakeTensor(3)
    assert C.detach(plain) is plain
    grad = leaf(3)
    new = C.detach(grad)
    assert new.origin is grad
    assert grad.calls == ["detach"]
    for copied in (
        FakeTensor(3, view=True),
        FakeTensor(3, inference=True),
        FakeTensor(3, storage=4096),
        FakeParameter(FakeTensor(3)),
    ):
        out = C.detach(copied)
        assert type(out) is type(copied)
        assert not out.requires_grad
        assert out is not copied
    assert C.detach(plain, True).origin.origin is plain
    far = FakeTensor(3, device="cuda:0")
    assert C.detach([far])[0].device == "cpu"
    meta = FakeTensor(3, device="meta")
    assert C.detach(meta) is meta
    assert C.detach(FakeTensor(3, device="meta", requires_grad=True)).device == "meta"


def test_atoms_and_unknown_objects_are_returned_themselves(C):
    class Other:
        pass

    class Colour(enum.Enum):
        RED = 1

    def function():
        pass

    for value in (None, 1, 1.5, "x", b"y", True, ..., Other(), Colour.RED, function, Other, int):
        assert C.detach(value) is value
    values = [None, 3, "x", Colour.RED]
    assert C.detach(values) == values
    assert C.detach(values) is not values


@pytest.mark.parametrize(
    "make",
    [
        lambda t: [t],
        lambda t: (t,),
        lambda t: {"k": t},
        lambda t: {t: 1},
        lambda t: {t},
        lambda t: frozenset([t]),
        lambda t: collections.OrderedDict(k=t),
        lambda t: collections.defaultdict(list, k=t),
        lambda t: collections.deque([t], maxlen=7),
        lambda t: MappingProxyType({"k": t}),
        lambda t: SimpleNamespace(k=t),
        lambda t: Point(t, 1),
        lambda t: PointAndMore(t, 1),
        lambda t: collections.UserDict(k=t),
        lambda t: collections.ChainMap({"k": t}),
        lambda t: collections.Counter({t: 2}),
        lambda t: ListWithArguments(1, [t]),
        lambda t: DictWithArguments({"k": t}, second=t),
        lambda t: TupleWithArguments(t, 2),
        Plain,
        Frozen,
        FrozenSlotted,
    ],
)
def test_type_is_kept_and_input_is_not_changed(C, make):
    tensor = leaf()
    value = make(tensor)
    out = C.detach(value)
    assert type(out) is type(value)
    assert out is not value
    assert tensor.calls == ["detach"]
    again = C.detach(value)
    assert tensor.calls == ["detach"] * 2
    assert type(again) is type(value)

    def leaves(one):
        if isinstance(one, FakeTensor):
            return [one]
        if isinstance(one, dict | MappingProxyType | collections.UserDict | collections.ChainMap):
            parts = [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset | collections.deque):
            parts = list(one)
        elif dataclasses.is_dataclass(one):
            parts = [getattr(one, f.name) for f in dataclasses.fields(one)]
        else:
            parts = list(vars(one).values()) if isinstance(one, SimpleNamespace) else []
        return [found for part in parts for found in leaves(part)]

    assert leaves(value) == [tensor]
    (new,) = leaves(out)
    check(tensor, new)


def test_what_types_carry(C):
    tensor = leaf()
    out = C.detach(collections.deque([tensor], maxlen=7))
    assert out.maxlen == 7
    out = C.detach(collections.defaultdict(set, a=tensor))
    assert out.default_factory is set
    made = ListWithArguments(1, [tensor])
    out = C.detach(made)
    assert len(out) == 1
    assert out.count_wanted == 1
    out = C.detach(DictWithArguments({"k": tensor}, second=tensor))
    assert out.second is out["k"]
    out = C.detach(TupleWithArguments(tensor, 2))
    assert out.label[0] is out[0]
    slotted = SlottedList([tensor])
    slotted.extra = tensor
    out = C.detach(slotted)
    assert out.extra is out[0]
    out = C.detach(FrozenSlotted(tensor))
    assert out.b == 3
    ordered = collections.OrderedDict(a=tensor, b=1)
    ordered.move_to_end("a")
    assert list(C.detach(ordered)) == ["b", "a"]
    refusing = Refusing([])
    refusing.a = tensor
    check(tensor, C.detach(refusing).a)


def test_tensor_subclass_keeps_class_and_attributes(C):
    class Named(FakeTensor):
        pass

    tensor = Named(2, requires_grad=True)
    tensor.names = ["n", leaf()]
    tensor.me = tensor
    out = C.detach([tensor])[0]
    assert type(out) is Named
    assert out.names[0] == "n"
    check(tensor.names[1], out.names[1])
    assert out.me is out
    plain = Named(2)
    assert C.detach(plain) is plain


def test_unchanged(C):
    empty, full = (), (1, "x", (2, None))
    assert C.detach(empty) is empty
    assert C.detach([full])[0] is full
    frozen = Frozen(3)
    assert C.detach(frozen) is frozen
    mutable = Plain(3)
    assert C.detach(mutable) is not mutable
    inner = [1]
    assert C.detach((inner,))[0] is not inner


def test_identity_and_sharing(C):
    tensor, shared = leaf(), [1]
    out = C.detach([tensor, {"again": tensor}, shared, (shared,), Point(tensor, shared)])
    assert out[0] is out[1]["again"] is out[4].x
    assert out[2] is out[3][0] is out[4].y
    assert tensor.calls == ["detach"]


def test_rings(C):
    tensor = leaf()
    ring: list = [tensor]
    ring.append(ring)
    out = C.detach(ring)
    assert out[1] is out
    holder: list = [tensor]
    through = (holder, tensor)
    holder.append(through)
    out = C.detach(through)
    assert type(out) is tuple
    assert out[0][1] is out
    assert out[1] is out[0][0]
    table: dict = {}
    table["me"] = ((table,), frozenset([tensor]))
    out = C.detach(table)
    assert out["me"][0][0] is out
    node = Plain(tensor)
    node.b = {"back": node}
    out = C.detach(node)
    assert out.b["back"] is out
    one, two = [], []
    both = (one, two)
    one.append((both, tensor))
    two.append(both)
    out = C.detach(both)
    assert out[0][0][0] is out
    assert out[1][0] is out
    frozen = Frozen([])
    frozen.a.append(frozen)
    out = C.detach(frozen)
    assert out.a[0] is out
    assert out is not frozen


def test_ring_of_many_tuples_takes_linear_time(C):
    lists = [[] for _ in range(20_000)]
    parent = tuple(lists)
    for one in lists:
        one.append(parent)
    out = C.detach(parent)
    assert all(one[0] is out for one in out)
    for one in (*lists, *out):
        one.clear()


def test_ring_of_immutables_only_is_one_sentence(C):
    class Node(tuple):
        pass

    # A tuple that holds itself: its attribute makes it immutable content here.
    node = Node((1,))
    node.me = node
    with pytest.raises(TypeError, match="immutable containers only") as caught:
        C.detach({"deep": [node]})
    assert "\n" not in str(caught.value)


DEPTH = 100_000


@pytest.mark.parametrize(
    "wrap",
    [
        lambda value: [value],
        lambda value: (value,),
        lambda value: {"k": value},
        Plain,
        lambda value: frozenset([value]),
        lambda value: Point(value, 0),
    ],
    ids=["list", "tuple", "dict", "dataclass", "frozenset", "namedtuple"],
)
def test_depth(C, wrap):
    depth = DEPTH if wrap(0).__class__ is not frozenset else 300  # hashing recurses in CPython
    tensor = leaf()
    value = tensor
    for _ in range(depth):
        value = wrap(value)
    out = C.detach(value)
    for _ in range(depth):
        assert type(out) is type(value)
        if type(out) is Plain:
            # Taken apart from the outside: CPython frees nested instances by recursion.
            inner, out.a = out.a, None
            outer, value = value, value.a
            outer.a = None
            out = inner
        else:
            (out, value) = (
                (out["k"], value["k"])
                if type(out) is dict
                else (next(iter(out)), next(iter(value)))
            )
    check(tensor, out)


# --- hostile ------------------------------------------------------------------------------------


class Lying(list):
    def __len__(self):
        return 1_000_000

    def __iter__(self):
        raise RuntimeError("no iteration")

    def __getitem__(self, index):
        raise RuntimeError("no items")

    def append(self, item):
        raise RuntimeError("no appending")


class LyingDict(dict):
    def __len__(self):
        return -1  # noqa: PLE0303

    def __iter__(self):
        raise RuntimeError("no")

    items = keys = values = __getitem__ = __setitem__ = __iter__


class Raising:
    def __getattr__(self, name):
        raise RuntimeError(f"no {name}")

    def __getattribute__(self, name):
        raise RuntimeError(f"never {name}")


def test_lying_containers_lose_nothing(C):
    tensor = leaf()
    out = C.detach(Lying([tensor, 1]))
    assert type(out) is Lying
    assert list.__len__(out) == 2
    check(tensor, list.__getitem__(out, 0))
    out = C.detach(LyingDict(a=tensor))
    assert type(out) is LyingDict
    check(tensor, dict.__getitem__(out, "a"))


def test_raising_objects_are_returned_themselves(C):
    value = Raising()
    assert C.detach([value])[0] is value

    @dataclasses.dataclass
    class RaisingData(Raising):
        a: int = 1

    hostile = object.__new__(RaisingData)
    assert type(C.detach([hostile])[0]) is RaisingData

    class Meta(type):
        def __getattribute__(cls, name):
            raise RuntimeError("metaclass")

    class Odd(metaclass=Meta):
        pass

    odd = Odd()
    assert C.detach([odd])[0] is odd


def test_mutation_during_the_walk(C):
    values: list = []

    class Mutating(FakeTensor):
        def detach(self):
            values.clear()
            table.clear()
            return super().detach()

    tensor = leaf()
    table = {"x": tensor}
    values += [Mutating(1, requires_grad=True), tensor, table, tensor]
    out = C.detach(values)
    assert len(out) == 4
    check(tensor, out[1])
    assert out[3] is out[1]
    # The dict was emptied before the walk came to it.
    assert out[2] == {}

    class Adding(FakeTensor):
        def detach(self):
            names["new"] = 1
            del names["old"]
            return super().detach()

    names = {"old": Adding(1, requires_grad=True)}
    assert list(C.detach(names)) == ["old"]


def test_error_of_a_tensor_keeps_its_type_and_says_where(C):
    class Broken(FakeTensor):
        def detach(self):
            raise ZeroDivisionError("broken")

    with pytest.raises(ZeroDivisionError) as caught:
        C.detach({"boxes": [1, Point(0, Broken(1, requires_grad=True))]})
    assert caught.value.__notes__ == ['while detaching value["boxes"][1][1]']

    class Interrupting(FakeTensor):
        def detach(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        C.detach([Interrupting(1, requires_grad=True)])


def test_container_that_cannot_be_built_is_one_sentence(C):
    class Broken(FakeTensor):
        def __hash__(self):
            if self.origin is not None:
                raise RuntimeError("no hash")
            return 1

    with pytest.raises(TypeError) as caught:
        C.detach({"a": [{Broken(1, requires_grad=True)}]})
    message = str(caught.value)
    assert 'value["a"][0]' in message
    assert "register_detach(set, fn)" in message
    assert "\n" not in message
    assert isinstance(caught.value.__cause__, (RuntimeError, TypeError))


def test_keys_that_become_equal_are_not_lost(C):
    class Merging(FakeTensor):
        def __hash__(self):
            return 1

        def __eq__(self, other):
            return self.origin is not None

    first, second = Merging(1, requires_grad=True), Merging(1, requires_grad=True)
    with pytest.raises(TypeError, match="at value,") as caught:
        C.detach({first: 1, second: 2})
    assert "two keys became equal" in str(caught.value.__cause__)


def test_long_paths_are_cut(C):
    class Broken(FakeTensor):
        def detach(self):
            raise ZeroDivisionError

    value: object = Broken(1, requires_grad=True)
    for _ in range(5000):
        value = {"x" * 500: value}
    with pytest.raises(ZeroDivisionError) as caught:
        C.detach(value)
    (note,) = caught.value.__notes__
    assert len(note) < 700
    assert "value..." in note
    with pytest.raises(ZeroDivisionError) as caught:
        C.detach({"\udc80": Broken(1, requires_grad=True)})
    assert caught.value.__notes__ == ['while detaching value["?"]']


# --- register_detach ----------------------------------------------------------------------------


class Box:
    def __init__(self, content):
        self.content = content


class SmallBox(Box):
    pass


@pytest.fixture
def boxed(C):
    C.register_detach(Box, lambda value, detach: type(value)(detach(value.content)))
    yield
    C.register_detach(Box, None)


@pytest.mark.usefixtures("boxed")
def test_registered_function(C):
    tensor = leaf()
    box = SmallBox([tensor])
    out = C.detach([box, tensor, box])
    assert type(out[0]) is SmallBox
    assert out[0].content[0] is out[1]
    assert out[2] is out[0]
    assert box.content[0] is tensor
    nested = Box([Box((tensor,)), {"k": Box(1)}])
    out = C.detach(nested)
    check(tensor, out.content[0].content[0])


@pytest.mark.usefixtures("boxed")
def test_registered_function_rings_and_depth(C):
    holder: list = []
    box = Box(holder)
    holder.append(box)
    with pytest.raises(TypeError, match="pass detach only the parts"):
        C.detach(holder[0])
    value = None
    for _ in range(100_000):
        value = Box(value)
    with pytest.raises(RecursionError):
        C.detach(value)
    while value is not None:
        value = value.content


def test_registered_function_that_fails(C):
    kept = []

    def fails(value, detach):
        kept.append(detach)
        raise LookupError("mine")

    C.register_detach(Box, fails)
    try:
        with pytest.raises(LookupError, match="mine") as caught:
            C.detach([0, Box(1)])
        assert caught.value.__notes__ == ["while detaching value[1]"]
        with pytest.raises(RuntimeError, match="while its registered function runs"):
            kept[0](1)
    finally:
        C.register_detach(Box, None)


def test_registered_function_that_hides_a_failure(C):
    class Broken(FakeTensor):
        def detach(self):
            raise ZeroDivisionError

    def hides(value, detach):
        try:
            return detach(value.content)
        except ZeroDivisionError:
            return "broken"

    C.register_detach(Box, hides)
    try:
        bad = [Broken(1, requires_grad=True)]
        assert C.detach([Box(bad), 1]) == ["broken", 1]
        with pytest.raises(RuntimeError, match="went on to detach the same value again"):
            C.detach([Box(bad), bad])
    finally:
        C.register_detach(Box, None)


def test_register_detach_refuses(C):
    with pytest.raises(TypeError, match="expected register_detach"):
        C.register_detach("x", print)
    with pytest.raises(TypeError, match="expected register_detach"):
        C.register_detach(Box, 3)
    for fixed in (list, dict, tuple, str, FakeTensor, FakeParameter):
        with pytest.raises(ValueError, match="is fixed"):
            C.register_detach(fixed, print)


def test_types_are_not_kept_alive(C):
    import weakref

    def make():
        @dataclasses.dataclass
        class Passing:
            a: object

        C.detach([Passing(leaf())])
        return weakref.ref(Passing)

    ref = make()
    gc.collect()
    assert ref() is None


def test_more_types_than_the_cache_holds(C):
    made = [dataclasses.make_dataclass(f"D{i}", ["a"]) for i in range(1000)]
    tensor = leaf()
    out = C.detach([one(tensor) for one in made])
    assert [type(one) for one in out] == made
    assert len({id(one.a) for one in out}) == 1


# --- from an accelerator ------------------------------------------------------------------------


def test_far_tensors_come_at_once(C, new_module):
    module = new_module()
    module.bind_types(FakeTensor, FakeParameter)
    batches = []

    def fetch(tensors):
        batches.append(len(tensors))
        return [one.cpu() for one in tensors]

    module.detach_bind(None, fetch, None, None, None, None)
    far = [FakeTensor(2, device="cuda:0") for _ in range(5)]
    ring: list = [far[0]]
    ring.append((ring, far[1]))
    value = {"a": far, "b": (far[0], [far[4]]), "p": FakeParameter(far[2]), "r": ring}
    out = module.detach(value)
    assert batches == [6]
    assert all(one.device == "cpu" for one in out["a"])
    assert out["b"][0] is out["a"][0]
    assert out["b"][1][0] is out["a"][4]
    assert type(out["p"]) is FakeParameter
    assert not out["p"].requires_grad
    assert out["r"][1][0] is out["r"]
    assert out["r"][1][1] is out["a"][1]
    assert module.detach(far[3]).device == "cpu"

    module.register_detach(Box, lambda value, detach: Box((detach(value.content),)))
    out = module.detach([Box([far[0]]), far[0]])
    assert out[0].content[0][0] is out[1]
    module.detach_bind(None, lambda tensors: [], None, None, None, None)
    with pytest.raises(TypeError, match="as many tensors"):
        module.detach(far)


def test_python_resolves_other_types(C, new_module):
    module = new_module()
    module.bind_types(FakeTensor, FakeParameter)
    watched: dict = {}

    def resolve(kind):
        if kind in watched:
            return (
                lambda value: ([value.content], "context"),
                lambda value, context, children, early: kind(children[0]),
                None,
            )
        return None

    module.detach_bind(resolve, None, None, None, None, watched)
    tensor = leaf()
    box = Box(tensor)
    assert module.detach([box])[0] is box
    watched[Box] = 1
    check(tensor, module.detach([box])[0].content)
    for wrong in (lambda kind: 3, lambda kind: (1, 2)):
        module.detach_bind(wrong, None, None, None, None, None)
        with pytest.raises(TypeError, match="can be taken apart"):
            module.detach([box])


def test_argument_errors(C):
    with pytest.raises(TypeError):
        C.detach()
    with pytest.raises(TypeError):
        C.detach(1, False, [])
    with pytest.raises(TypeError):
        C.detach_bind(None)


def test_no_reference_leak(C):
    tensor = leaf()
    holder: list = [tensor]
    value = {
        "a": holder,
        "b": (holder, Plain(tensor)),
        "s": {1, 2},
        "d": collections.deque([holder]),
    }
    value["me"] = (value,)

    def turn():
        C.detach(value).clear()
        tensor.calls.clear()

    for _ in range(50):
        turn()
    gc.collect()
    before = sys.getallocatedblocks()
    for _ in range(500):
        turn()
    gc.collect()
    assert sys.getallocatedblocks() - before < 200


def test_random_values(C):
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    pool = [leaf() for _ in range(3)] + [FakeTensor(1) for _ in range(2)]
    atoms = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.sampled_from(pool))

    def grow(inner):
        keys = st.one_of(st.text(max_size=2), st.sampled_from(pool))
        return st.one_of(
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=4).map(tuple),
            st.dictionaries(keys, inner, max_size=4),
            st.lists(inner, max_size=3).map(lambda a: ListWithArguments(len(a), a)),
            st.lists(inner, max_size=3).map(collections.deque),
            st.tuples(inner, inner).map(lambda a: Point(*a)),
            inner.map(Plain),
            inner.map(lambda a: SimpleNamespace(a=a)),
            st.lists(atoms, max_size=3).map(set),
        )

    def same(old, new, seen):
        assert type(old) is type(new)
        if isinstance(old, FakeTensor):
            assert seen.setdefault(id(old), new) is new
            assert (new is old) == (not old.requires_grad)
        elif isinstance(old, dict):
            assert len(old) == len(new)
            for (k1, v1), (k2, v2) in zip(old.items(), new.items(), strict=True):
                same(k1, k2, seen)
                same(v1, v2, seen)
        elif isinstance(old, list | tuple | collections.deque):
            assert len(old) == len(new)
            for one, two in zip(old, new, strict=True):
                same(one, two, seen)
        elif isinstance(old, set):
            assert len(old) == len(new)
        elif isinstance(old, Plain | SimpleNamespace):
            for name in vars(old):
                same(vars(old)[name], vars(new)[name], seen)
        else:
            assert old is new

    @hypothesis.settings(max_examples=150, deadline=None, database=None)
    @hypothesis.given(st.recursive(atoms, grow, max_leaves=20))
    def run(value):
        same(value, C.detach(value), {})

    run()


def test_class_change_during_detach(C):
    """A type's `__class__` games change nothing for the walk: it looks at the real type."""

    class Pretender:
        __class__ = property(lambda self: list)

    value = Pretender()
    assert C.detach([value])[0] is value
    assert C.detach(types.SimpleNamespace(a=value)).a is value


def test_what_is_met_again_by_another_way_is_one(C):
    """Held by one container only, a tensor can still be met through a proxy or a function."""
    inner = {"a": leaf()}
    outer = [inner, MappingProxyType(inner)]
    made = C.detach(outer)
    assert made[0]["a"] is made[1]["a"]

    class Holder:
        def __init__(self, items):
            self.items = items

    C.register_detach(Holder, lambda value, detach: detach(value.items[0]))
    try:
        items = [leaf()]
        made = C.detach([items, Holder(items)])
        assert made[0][0] is made[1]
        items.append(Holder(items))
        made = C.detach(items)
        assert made[0] is made[1]
    finally:
        C.register_detach(Holder, None)


def test_what_fails_is_not_handed_out_half_made(C):
    """A registered function that swallows an error and asks again is told so."""

    class Holder:
        def __init__(self, part):
            self.part = part

    def twice(value, detach):
        with contextlib.suppress(TypeError):
            detach(value.part)
        return detach(value.part)

    C.register_detach(Holder, twice)
    try:
        bad = {Hashed(): leaf()}
        next(iter(bad)).broken = True
        with pytest.raises((RuntimeError, TypeError)):
            C.detach([Holder(bad)])
    finally:
        C.register_detach(Holder, None)


class Hashed:
    broken = False

    def __hash__(self):
        if self.broken:
            raise LookupError("no hash")
        return 1

"""Every public function on a GuardedTensor: what it records, what it gives back, what it leaves.

The oracle is the same function on tensors and flags, row by row. The list of public names at the
end says of each name which test has it, or that a GuardedTensor is nothing to it.
"""

from __future__ import annotations

import pytest
import torch

import opguard.flags as tg
from opguard.flags import (
    AND,
    HAS,
    IF,
    IS,
    NOT,
    OR,
    BatchMismatchError,
    ErrorConfig,
    FlagsError,
    GuardedTensor,
    err,
    find,
    fix,
    flag_inf,
    flag_inf_,
    flag_nan,
    flag_nan_,
    flag_nan_and_inf,
    flag_nan_and_inf_,
    flag_oob_indices,
    flags,
    get_config,
    guard,
    guarded_embedding,
    guarded_gather,
    guarded_index_select,
    has_err,
    push,
    push_,
    set_config,
    tensorcheck,
)

NAN, INF = float("nan"), float("inf")
ROWS = torch.tensor([[1.0, 2.0, -0.0], [3.0, NAN, 5.0], [INF, 8.0, 9.0], [NAN, -INF, 0.0]])


def words(text):
    return text.split()


def found(f):
    """(code, location) of each error, row by row."""
    return [[(e.code, e.location) for e in row] for row in flags.unpack_all(f)]


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.fixture
def g():
    """Row 1 has UNSTABLE at 9."""
    one = torch.tensor([False, True, False, False])
    return GuardedTensor(ROWS.clone(), push(err.new_t(4), err.UNSTABLE, 9, where=one))


CHECKS = {
    "flag_nan": (flag_nan, flag_nan_),
    "flag_inf": (flag_inf, flag_inf_),
    "flag_nan_and_inf": (flag_nan_and_inf, flag_nan_and_inf_),
}


@pytest.mark.parametrize("name", CHECKS)
def test_detection_records_as_for_flags(g, name):
    check, in_place = CHECKS[name]
    wanted = check(ROWS, 5, g.flags)
    before = g.flags.clone()
    h = check(g, 5)
    assert type(h) is GuardedTensor
    assert torch.equal(h.flags, wanted)
    assert torch.equal(g.flags, before)
    assert same_bits(h.unwrap(), ROWS)
    assert h.unwrap().data_ptr() == g.unwrap().data_ptr()
    assert in_place(g, 5) is g
    assert torch.equal(g.flags, wanted)
    assert torch.equal(check(ROWS, 5, guard(ROWS)).flags, check(ROWS, 5))


def test_nan_inf_is_another_name():
    assert tg.flag_nan_inf is flag_nan_and_inf
    assert found(flag_inf(guard(ROWS), 2, inf="pos")) == [[], [], [(2, 2)], []]


@pytest.mark.parametrize(
    "place", [7, "a name", tg.track(torch.nn.Sequential(torch.nn.Linear(1, 1)))[0], None]
)
def test_locations_of_every_kind(place):
    wanted = flag_nan(ROWS, place)
    assert torch.equal(flag_nan(guard(ROWS), place).flags, wanted)
    assert torch.equal(push(guard(ROWS), err.NAN, place).flags, push(err.new_t(4), 1, place))


def test_rows_that_lie_elsewhere(g):
    """Checks, masks and repairs look at the rows where they are, not at dimension 0."""
    moved = flag_nan(g.t(), 3)
    assert moved.batch_dims == (1,)
    assert found(moved) == [[], [(11, 9), (1, 3)], [], [(1, 3)]]
    assert fix(moved, 1.0).unwrap()[:, 1].tolist() == [1.0, 1.0, 1.0]
    assert fix(moved, 1.0).unwrap()[:, 2].tolist() == [INF, 8.0, 9.0]
    assert moved.take_err().shape == (2, 3)
    two = guard(torch.stack([ROWS, ROWS * 0])).permute(1, 0, 2)
    assert found(flag_nan(two, 3)) == [[(1, 3)], [(1, 3)]]
    one = flag_nan(g.sum(), "loss")
    assert one.flags.shape[0] == 1
    assert has_err(one)
    assert one.take_ok().shape == (0,)


def test_flags_beside_a_guarded_tensor_are_added(g):
    more = push(err.new_t(4), err.INF, 6, where=torch.tensor([True, False, False, False]))
    assert found(flag_nan(g, 5, more)) == [[(2, 6)], [(11, 9), (1, 5)], [], [(1, 5)]]
    plain = err.new_t(4)
    assert flag_nan_(g, 5, plain) is plain
    assert found(plain) == [[], [(1, 5)], [], [(1, 5)]]
    assert found(g) == [[], [(11, 9)], [], []]
    with pytest.raises(BatchMismatchError, match=r"^expected .*4.* got .*3"):
        flag_nan(g, 5, err.new_t(3))


def test_push_and_its_masks(g):
    mask = ROWS.isnan().any(1)
    wanted = push(g.flags, err.INF, 4, where=mask)
    assert torch.equal(push(g, err.INF, 4, where=mask).flags, wanted)
    assert torch.equal(push(g, err.INF, 4, where=g.isnan().any(1)).flags, wanted)
    assert torch.equal(err.push(g, err.INF, 4, where=mask).flags, wanted)
    assert torch.equal(push(g.flags, err.INF, 4, where=g.isnan().any(1)), wanted)
    codes = torch.tensor([0, 1, 2, 0])
    assert torch.equal(err.push(g, codes, 4).flags, err.push(g.flags, codes, 4))
    assert torch.equal(err.push_scalar(g, 1, 4).flags, err.push_scalar(g.flags, 1, 4))
    assert push_(g, err.INF, 4, where=mask) is g
    assert torch.equal(g.flags, wanted)


def test_in_place_stays_out_of_other_tensors(g):
    """Flags are shared among tensors; only those that share memory are told."""
    other = g * 2
    flag_nan_(g, 5)
    assert found(other) == [[], [(11, 9)], [], []]


QUERIES = words("""
    is_ok is_err has_any any_err all_ok has_nan has_inf has_fallback has_critical count_errors
    max_severity get_first_code get_first_location get_first_severity get_ok get_err
""")


@pytest.mark.parametrize("name", QUERIES)
def test_queries_read_its_flags(g, name):
    h = flag_nan_and_inf(g, 5)
    query = getattr(err, name)
    result = query(h)
    assert type(result) is torch.Tensor
    assert torch.equal(result, query(h.flags))


def test_queries_with_a_code(g):
    h = flag_nan_and_inf(g, 5)
    for ask in (
        lambda f: err.has_code(f, err.NAN),
        lambda f: err.find(err.INF, f),
        lambda f: find(err.NAN, f),
        lambda f: err.has_domain(f, 0),
        HAS,
        lambda f: IS(err.INF, f),
        lambda f: OR(HAS(f), IS(err.NAN, f)),
        lambda f: AND(HAS(f), NOT(IS(err.SPARSE, f))),
    ):
        assert torch.equal(ask(h), ask(h.flags))
        assert type(ask(h)) is torch.Tensor
    assert has_err(h) is True
    assert has_err(guard(ROWS)) is False


def test_merge_and_clear(g):
    h = flag_nan(guard(ROWS), 3)
    for merged in (err.merge(g, h), err.merge(g, h.flags), err.merge(g, h, h)):
        assert type(merged) is GuardedTensor
        assert torch.equal(merged.flags, err.merge(g.flags, h.flags))
    assert torch.equal(err.merge(g.flags, h).flags, err.merge(h.flags, g.flags))
    assert found(err.clear(h, err.NAN)) == [[], [], [], []]
    assert torch.equal(err.new(g), err.new_t(4))
    assert torch.equal(tg.experimental.err.new(g.t()), tg.experimental.err.new_t(4))


def test_methods(g):
    bad = torch.tensor([False, True, False, False])
    assert torch.equal(g.is_err(), bad)
    assert torch.equal(g.is_ok(), ~bad)
    assert g.has_err() is True
    assert found(g.take_err()) == [[(11, 9)]]
    assert same_bits(g.take_ok().unwrap(), ROWS[~bad])
    ok, not_ok = g.partition()
    assert same_bits(ok.unwrap(), ROWS[[0, 2, 3]])
    assert same_bits(not_ok.unwrap(), ROWS[[1]])
    for index in ([1, 1, 0], torch.tensor([1, 1, 0])):
        assert found(g.subset(index)) == [[(11, 9)], [(11, 9)], []]
    assert found(g.subset(slice(1, 3))) == [[(11, 9)], []]
    assert found(g.subset(1)) == [[(11, 9)]]
    assert found(g.subset(bad)) == [[(11, 9)]]


def test_take_and_partition(g):
    bad = err.is_err(g)
    for a, b in (
        (err.take_ok(g), ROWS[~bad]),
        (err.Ok(g), ROWS[~bad]),
        (err.take_err(g), ROWS[bad]),
        (err.Err(g, g), ROWS[bad]),
        (err.partition(g)[0], ROWS[~bad]),
        (err.partition(g)[1], ROWS[bad]),
        (err.partition_many(g)[1][0], ROWS[bad]),
        (err.take_ok(g.flags, g), ROWS[~bad]),
        (err.take_ok_p(g), ROWS.masked_fill(bad[:, None], 0.0)),
        (err.take_ok_p(g, 7.0), ROWS.masked_fill(bad[:, None], 7.0)),
        (err.take_err_p(g, fill=7.0), ROWS.masked_fill(~bad[:, None], 7.0)),
    ):
        assert type(a) is GuardedTensor
        assert same_bits(a.unwrap(), b)
        rows = a.flags.shape[0]
        assert torch.equal(a.flags, {4: g.flags, 3: g.flags[~bad], 1: g.flags[bad]}[rows])
    assert same_bits(err.take_ok(g, ROWS), ROWS[~bad])
    assert type(err.take_ok(g, ROWS)) is torch.Tensor
    with pytest.raises(TypeError, match=r"^expected take_ok to get flags and a tensor"):
        err.take_ok(g.flags)


def test_map(g):
    bad = err.is_err(g)[:, None]
    mapped = err.map_ok(g, lambda t: push(t * 2, err.INF, 4))
    assert same_bits(mapped.unwrap(), torch.where(bad, ROWS, ROWS * 2))
    assert found(mapped) == [[(2, 4)], [(11, 9)], [(2, 4)], [(2, 4)]]
    mapped = err.map_err(g, lambda t: push(t * 2, err.INF, 4))
    assert same_bits(mapped.unwrap(), torch.where(bad, ROWS * 2, ROWS))
    assert found(mapped) == [[], [(11, 9), (2, 4)], [], []]
    cleared = err.map_err_flags(g, torch.zeros_like)
    assert type(cleared) is GuardedTensor
    assert not has_err(cleared)


@pytest.mark.parametrize("gives", ["flags", "guarded"])
def test_chains_as_with_flags(g, gives):
    def plain(t):
        return t * 2, push(err.new_t(4), err.INF, 4)

    def guarded(t):
        assert not has_err(t)  # what it adds is what it finds
        return push(t * 2, err.INF, 4) if gives == "guarded" else (t * 2, plain(ROWS)[1])

    for chain in (err.and_then, err.bind):
        values, f = chain(g.flags, ROWS, plain)
        result = chain(g, guarded)
        assert type(result) is GuardedTensor
        assert same_bits(result.unwrap(), values)
        assert torch.equal(result.flags, f)
        both = chain(g.flags, guard(ROWS), guarded)
        assert same_bits(both[0].unwrap(), values)
        assert torch.equal(both[1], f)


def test_guard_and_ensure_mask(g):
    ok = torch.tensor([True, True, False, True])
    wanted = err.ensure_mask(g.flags, ok, err.UNSTABLE, "here", err.WARN)
    assert torch.equal(err.ensure_mask(g, ok, err.UNSTABLE, "here", err.WARN).flags, wanted)
    # The mask itself may have flags and lie anywhere.
    predicate = lambda t: ~(t == INF).any(1)
    said = err.guard(g, predicate, err.UNSTABLE, "here", err.WARN)
    assert torch.equal(said.flags, wanted)
    said = err.guard(g, predicate, err.UNSTABLE, location="here", severity=err.WARN)
    assert found(said)[2] == found(wanted)[2]
    assert torch.equal(err.guard(g, ROWS, predicate, err.UNSTABLE, "here", err.WARN).flags, wanted)


def test_fix_takes_the_peers_arguments(g):
    h = flag_nan_and_inf(g, 5)
    every = fix(h)
    assert type(every) is GuardedTensor
    assert same_bits(every.unwrap()[0], ROWS[0])
    assert not every.unwrap()[1:].any()
    assert all(row[-1] == (err.FALLBACK_VALUE, 0) for row in found(every)[1:])
    some = fix(h, 4.0, "mended", [err.INF])
    assert same_bits(some.unwrap()[1], ROWS[1])
    assert (some.unwrap()[2:] == 4).all()
    assert err.has_fallback(some).tolist() == [False, False, True, True]
    assert torch.equal(fix(h, lambda: torch.ones(3), codes=err.NAN).unwrap()[1], torch.ones(3))
    assert same_bits(fix(h, codes=[]).unwrap(), ROWS)
    values, f = fix(h, h, "mended")  # as with tensors and flags
    wanted = fix(ROWS, h.flags, "mended")
    assert same_bits(values.unwrap(), wanted[0])
    assert torch.equal(f, wanted[1])
    again = err.recover_with_fallback(h, 0.0, "mended")
    assert torch.equal(again.flags, wanted[1])
    mended, _ = fix(ROWS, h, location="mended", codes=err.INF)
    assert same_bits(mended, fix(h, codes=err.INF).unwrap())


def test_replace_keeps_its_rows(g):
    mended = err.replace(g, 4.0, targets=[err.NAN, err.INF])
    assert same_bits(mended.unwrap(), err.replace(ROWS, 4.0, targets=[err.NAN, err.INF]))
    assert torch.equal(mended.flags, g.flags)


def test_look_ups():
    table = torch.arange(12.0).reshape(4, 3)
    ids = torch.tensor([[0, 1], [4, 1], [3, -1]])
    wanted, f = guarded_embedding(ids, table, module=6)
    for weight in (table, torch.nn.Embedding.from_pretrained(table)):
        out = guarded_embedding(guard(ids), weight, module=6)
        assert same_bits(out.unwrap(), wanted)
        assert torch.equal(out.flags, f)
    assert found(flag_oob_indices(guard(ids), 4, 6)) == found(f)
    out, again = guarded_embedding(guard(ids), table, err.new_t(3), module=6, fill=-1.0)
    assert torch.equal(again, f)
    assert (out.unwrap()[1, 0] == -1).all()

    x = GuardedTensor(table, push(err.new_t(4), err.NAN, 1, where=torch.arange(4) == 2))
    picked = guarded_index_select(x, 0, torch.tensor([2, 9, 0]), module=6)
    assert same_bits(picked.unwrap(), table[[2, 3, 0]])
    assert found(picked) == [[(1, 1)], [(5, 6)], []]
    across = torch.tensor([[0], [7], [2], [1]])
    gathered = guarded_gather(x, 1, across, module=6)
    assert gathered.unwrap().flatten().tolist() == [0.0, 5.0, 8.0, 10.0]
    assert found(gathered) == [[], [(5, 6)], [(1, 1)], []]


def test_what_flags_say(g):
    h = flag_nan_and_inf(g, 5)
    for read in (
        flags.unpack_all,
        flags.repr,
        flags.summary,
        flags.pretty_print,
        lambda f: flags.unpack(f, 1),
        tg.ErrorFlags.to_errors,
        lambda f: tg.ErrorFlags.interpret(f, "enc"),
        lambda f: tg.ErrorFlags.reduce_or([f, f]).tolist(),
        lambda f: flags.extract_slots(f).tolist(),
        tg.inspect.summary,
        tg.inspect.report,
        lambda f: str(tg.report(f)),
        tg.prometheus,
        tg.first_failure,
        lambda f: flags.count(f).tolist(),
    ):
        assert str(read(h)) == str(read(h.flags))


def test_branches(g):
    h = flag_nan(g, 5)

    def program(t):
        return IF(IS(err.NAN, t), lambda: fix(t, 1.0, 3)).ELSE(lambda: t * 2)

    mended = program(h)
    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(h).flags, mended.flags)
    assert same_bits(compiled(h).unwrap(), mended.unwrap())
    clean = GuardedTensor(torch.ones(4, 3), err.new_t(4))
    assert (compiled(clean).unwrap() == 2).all()
    assert not has_err(compiled(clean))


def test_tensorcheck_finds_in_what_is_returned(g):
    @tensorcheck
    def halves(x):
        return {"a": x / 2, "b": (x * 0 + 1, 3)}

    out = halves(g)
    assert found(out["a"])[0] == []
    assert [code for code, _ in found(out["a"])[1]] == [11, 1]
    assert [code for code, _ in found(out["a"])[3]] == [1, 2]
    assert found(out["b"][0])[0] == []
    # A tensor that looks like flags is none because flags were made.
    looks = torch.zeros(4, get_config().num_words, dtype=torch.int64)
    assert tensorcheck(lambda x: (flag_nan(x, 1), looks))(g)[1] is looks


def test_compiled_programs():
    x = ROWS.clone().requires_grad_()
    table = torch.nn.Embedding(5, 3)
    layer = torch.nn.Linear(3, 3)

    def program(x, ids):
        g = flag_nan_and_inf(guard(x), "input")
        g = fix(g, 0.0, "mended", [err.NAN])
        e = guarded_embedding(guard(ids), table, module=8)
        g = err.take_ok_p(layer(g) + e, 0.5)
        g = err.and_then(g, lambda t: push(t.relu(), err.SPARSE, 9, where=(t < 0).any(1)))
        g = err.map_err(g, lambda t: t * 2)
        g = err.merge(g, flag_inf(x, 4))
        return g, g.unwrap().sum(), g.flags, find(err.NAN, g), g.is_err()

    ids = torch.tensor([0, 9, 2, 1])
    torch._dynamo.reset()
    wanted = program(x, ids)
    wanted[1].backward()
    gradient = x.grad.clone()
    x.grad = None
    got = torch.compile(program, backend="aot_eager", fullgraph=True)(x, ids)
    got[1].backward()
    assert torch.allclose(got[0].unwrap(), wanted[0].unwrap(), equal_nan=True)
    assert torch.equal(got[0].flags, wanted[0].flags)
    for one, other in zip(got[2:], wanted[2:], strict=True):
        assert torch.equal(one, other)
    assert torch.allclose(x.grad, gradient, equal_nan=True)


def test_in_place_is_refused_while_compiling(g):
    with pytest.raises(Exception, match="use the function without the underscore"):
        torch.compile(lambda t: flag_nan_(t, 1), backend="eager", fullgraph=True)(g)


def test_gradients_pass_the_helpers():
    x = torch.randn(4, 3, requires_grad=True)
    g = flag_nan(guard(x), 1)
    g = push(g, err.NAN, 2, where=torch.tensor([True, False, False, False]))
    g = fix(g, 9.0) * 3
    assert err.take_err(g).requires_grad
    g.unwrap().sum().backward()
    assert x.grad.tolist() == [[0.0] * 3] + [[3.0] * 3] * 3


@pytest.fixture
def few_slots():
    before = get_config()
    keep = ErrorConfig(before.num_slots, flag_dtype=before.flag_dtype)
    yield lambda: set_config(ErrorConfig(num_slots=4))
    set_config(keep)


def test_a_configuration_set_in_between_cuts_nothing(few_slots):
    """R5."""
    a = guard(torch.ones(2, 3))
    for place in range(1, 7):
        a = push(a, err.NAN, place)
    few_slots()
    b = push(guard(torch.ones(2, 3)), err.INF, 20)
    assert b.flags.shape[1] == 1
    for both in (a + b, b + a, err.merge(a, b), err.merge(b, a), torch.cat([b, a])):
        assert {(2, 20), *((1, place) for place in range(1, 7))} >= set(found(both)[0])
        assert len({error for row in found(both) for error in row}) == 7
    assert len(found(push(a, err.INF, 30))[0]) == 7


def test_a_severity_that_is_none_is_refused(few_slots):
    """R6; and the configuration that is read is the one that was set."""
    g = guard(torch.ones(1, 2))
    for record in (push, err.push):
        with pytest.raises(tg.SeverityError):
            record(g, err.INF, 1, severity=7)
    assert found(g) == [[]]
    few_slots()
    assert tg.CONFIG.num_slots == get_config().num_slots == 4
    assert guard(torch.ones(1, 2)).flags.shape == (1, 1)


def test_its_own_configuration_counts():
    none = ErrorConfig(accumulation=tg.AccumulationConfig(dedupe=tg.Dedupe.NONE))
    g = guard(ROWS, none)
    assert len(found(flag_nan(flag_nan(g, 1), 1))[1]) == 2
    assert len(found(flag_nan(flag_nan(guard(ROWS), 1), 1))[1]) == 1


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(8, 4)
        self.layer = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, ids):
        ids = flag_oob_indices(guard(ids), self.embed.num_embeddings, self.embed)
        h = self.embed(ids.clamp(0, 7))
        h = flag_nan(self.layer(h), self.layer)
        h = fix(h, 0.0, self.layer, codes=[err.NAN])
        return flag_nan_and_inf(self.head(h), self.head)


def test_a_tracked_model_names_its_modules():
    """What one reads in a README: guard, run, ask, keep what is good."""
    net = tg.track(Net())
    with torch.no_grad():
        net.layer.weight[0, 0] = INF
        net.embed.weight[3] = 0.0  # 0 * inf
    out = net(torch.tensor([1, 3, 11]))
    said = flags.unpack_all(out)
    assert [(e.code_name, e.location_name) for e in said[1]][:2] == [
        ("NAN", "layer"),
        ("FALLBACK_VALUE", "layer"),
    ]
    assert ("OUT_OF_BOUNDS", "embed") in [(e.code_name, e.location_name) for e in said[2]]
    ok, bad = out.partition()
    assert len(ok) + len(bad) == 3
    assert out.has_err()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.tensor([1, 3, 11])).flags, out.flags)


# --- every public name ----------------------------------------------------------------------------

HERE = words("""
    flag_nan flag_nan_ flag_inf flag_inf_ flag_nan_and_inf flag_nan_and_inf_ flag_nan_inf
    flag_oob_indices push push_ find has_err fix guard GuardedTensor guarded_embedding
    guarded_gather guarded_index_select HAS IS IF AND OR NOT err flags ErrorFlags tensorcheck
    report prometheus first_failure inspect track experimental
""")
# Tested with GuardedTensors, or with what has flags, beside what else they do.
ELSEWHERE = ["check_ops", "check", "check_model", "plot", "to_dataframe", "dist_merge"]
# Neither takes tensors nor flags.
NOTHING = words("""
    CODE_BITS CODE_MASK CODE_SHIFT CONFIG LOCATION_BITS LOCATION_MASK LOCATION_SHIFT
    SEVERITY_BITS SEVERITY_MASK SEVERITY_SHIFT SLOTS_PER_WORD SLOT_BITS SLOT_MASK
    AccumulationConfig AccumulationPolicy BatchMismatchError Broadcast CodeError
    DTypeMismatchError Dedupe DeviceMismatchError Dim DimensionMismatchError Err ErrorCode
    ErrorConfig ErrorDomain ErrorLocation Failure FlagCounters FlagEvent FlagsError
    FlagsLayoutError InvalidParameterError InvalidReturnTypeError LocationError
    LocationExtractor LocationTree ModelCheck Ok Order Priority Report Result RowsLost Severity
    SeverityError TypeMismatchError UnpackedError ValidationError WeightedLocationTree
    __version__ as_exception as_result assign_locations error_t extract_locations get_config
    location_from_stack resolve_location set_config tracked typing unwrap
""")
ERR = words("""
    and_then bind clear ensure_mask find from_code guard map_err map_err_flags map_ok merge new
    new_t partition partition_many push push_scalar recover_with_fallback replace take_err
    take_err_p take_ok take_ok_p has_code has_domain
""")


def test_every_public_name_is_accounted_for():
    names = [*HERE, *ELSEWHERE, *NOTHING]
    assert len(names) == len(set(names))
    assert set(tg.__all__) == set(names)
    functions = {n for n in dir(err) if n[0].islower() and callable(getattr(err, n))}
    assert functions == {*ERR, *QUERIES}


def test_names_of_other_libraries():
    """What code written for torchguard's GuardedTensor looks for."""
    for name in ("Tensor", "Dim", "Broadcast", "AccumulationPolicy", "flag_nan_inf", "track"):
        assert hasattr(tg, name)
    for name in words("""
    new pack_slot_scalar extract_slots pack_slots is_ok is_err any_err find count has_critical
    merge push unpack
"""):
        assert callable(getattr(flags, name))
    f = push(flags.new(2), err.NAN, 3, where=torch.tensor([True, False]))
    assert torch.equal(flags.pack_slots(flags.extract_slots(f)), f)
    assert flags.extract_slots(f)[0, 0] == flags.pack_slot_scalar(err.NAN, 3)
    kept = tg.AccumulationPolicy(tg.Order.LIFO, tg.Dedupe.PAIR)
    assert kept == tg.AccumulationConfig(order=tg.Order.LAST)
    worst = tg.AccumulationPolicy(evict_by_severity=True)
    assert worst.priority is tg.Priority.SEVERITY


def test_refusals(g):
    with pytest.raises(FlagsError, match=r"^expected fallback to be a number"):
        fix(guard(torch.ones(2, 2, dtype=torch.int64)), 0.5)
    with pytest.raises(BatchMismatchError):
        err.take_ok_p(err.new_t(3), g)
    with pytest.raises(tg.LocationError):
        flag_nan(g, 5000)
    with pytest.raises(tg.CodeError):
        push(g, 77)

"""Pools and what is managed in them: budgets, sizes, options, loading on entry, figures."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
import weakref
from types import ModuleType

import pytest
import torch

from opguard import pools
from opguard.pools import _budgets, _lora_targets, _storages
from opguard.pools._parts import find_parts
from opguard.pools.resource_pools import HostPool, ResourcePool
from pools_kit import MIB, Thing, fresh_pools, tiny, until

PAGE = 4096


@pytest.fixture
def cpu(tmp_path):
    with fresh_pools(tmp_path, "4MiB") as management:
        yield management


# --- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (4096, 4096),
        (0, 0),
        ("0", 0),
        ("4096", 4096),
        ("256MiB", 256 * MIB),
        ("256 mib", 256 * MIB),
        ("1.5 GB", 1_500_000_000),
        (".5 KiB", 512),
        ("2TiB", 2 << 40),
        ("50%", 500),
        (" 12.5 % ", 125),
        ("100%", 1000),
    ],
)
def test_budgets_are_bytes_or_text(text, nbytes):
    assert _budgets.parse_bytes(text, 1000) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "many", "-1", "1 XB", "1,5GB", "101%", "1e9", "%", -1])
def test_what_is_no_budget_is_refused_with_what_would_be_one(text):
    with pytest.raises(ValueError, match="expected a budget"):
        _budgets.parse_bytes(text, 1000)


@pytest.mark.parametrize("value", [1.5, True, None, b"1"])
def test_a_budget_of_another_type_is_refused(value):
    with pytest.raises(TypeError, match="int bytes or text"):
        _budgets.parse_bytes(value, 1000)


def test_a_share_needs_a_whole():
    with pytest.raises(ValueError, match="share"):
        _budgets.parse_bytes("50%")


def test_a_budget_of_none_is_the_device_less_a_reserve():
    pool = HostPool()
    whole = pool.capacity()
    assert whole > 64 * MIB
    assert pool.budget_from(None) == int(whole * 0.9)
    assert pool.budget_from("50%") == whole // 2


def test_a_limit_of_the_cgroup_counts_where_it_is_less(tmp_path, monkeypatch):
    own = tmp_path / "a" / "b"
    own.mkdir(parents=True)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "a" / "memory.max").write_text("1073741824\n")
    (own / "memory.max").write_text("max\n")
    read = _budgets.Path.read_text

    def text(path, *args, **kwargs):
        return "0::/a/b\n" if str(path) == "/proc/self/cgroup" else read(path, *args, **kwargs)

    monkeypatch.setattr(_budgets.Path, "read_text", text)
    assert _budgets._cgroup_limits(tmp_path) == [1073741824]
    monkeypatch.setattr(_budgets, "_cgroup_limits", lambda: [12345])
    assert _budgets.host_capacity() == 12345


def test_setting_up_again_changes_budgets_and_policy_and_loses_nothing(cpu):
    handle = pools.manage(Thing())
    with pools.auto_manage(handle):
        again = pools.setup_default_pools(budgets={"cpu": "3MiB"}, policy="cost")
        assert again is cpu is pools.get_management()
        assert handle.loaded
    assert cpu.pool("cpu").budget == 3 * MIB
    assert cpu.policy == "cost"
    cpu.pool("cpu").budget = "2 MiB"
    assert cpu.pool("cpu").budget == 2 * MIB
    pools.setup_default_pools()
    assert cpu.pool("cpu").budget == cpu.pool("cpu").default_budget()
    assert pools.initialize() is cpu, "initialize sets up once"


def test_a_budget_for_a_pool_that_there_is_not_names_those_there_are(cpu):
    with pytest.raises(KeyError, match=r"\['cpu'\], got 'gpu'"):
        pools.setup_default_pools(budgets={"gpu": 1})
    with pytest.raises(KeyError, match="gpu"):
        cpu.pool("gpu")
    with pytest.raises(ValueError, match="budget of pool 'cpu'"):
        pools.setup_default_pools(budgets={"cpu": "lots"})


def test_a_pool_of_ones_own_is_taken_from_by_name(cpu):
    class Slots(ResourcePool):
        def capacity(self):
            return 10

    class Job:
        pass

    class JobUser(pools.ResourcePoolUser):
        def needs(self):
            return {"slots": 4}

        def bring_in(self):
            pass

        def give_back(self):
            pass

    slots = Slots("slots")
    with pytest.raises(LookupError, match="add_pool"):
        slots.used
    cpu.add_pool(slots, "100%")
    pools.register_user(Job, JobUser)
    jobs = [pools.manage(Job()) for _ in range(3)]
    with pools.auto_manage(jobs[0]), pools.auto_manage(jobs[1]):
        assert slots.used == 8
        with pytest.raises(pools.PoolRefused):
            jobs[2].load(0)
    assert [u.obj for u in slots.users] == [job.obj for job in jobs]
    with pytest.raises(ValueError, match="slots"):
        cpu.add_pool(Slots("slots"))


# --- managing -------------------------------------------------------------------------------------


def test_a_model_is_loaded_on_entry_and_counted(cpu):
    model = tiny(2)
    handle = pools.manage(model)
    used = cpu.pool("cpu")
    assert not handle.loaded
    assert used.used == 0
    with pools.auto_manage(handle) as yielded:
        assert yielded is handle
        assert handle.loaded
        assert used.used == 2 * MIB
        with pools.auto_manage(model) as inner:
            assert inner.obj is model
        handle.offload()
        assert handle.loaded, "somebody holds it"
    assert used.used in (0, 2 * MIB)


def test_loads_are_counted(cpu):
    handle = pools.manage(Thing())
    handle.load().load()
    handle.offload()
    assert cpu.free() == 0, "one load holds it still"
    handle.offload()
    cpu.free()
    assert not handle.loaded
    handle.offload()
    assert not handle.loaded


def test_a_lease_ends_by_an_exception_too(cpu):
    handle = pools.manage(Thing())
    with pytest.raises(ZeroDivisionError), pools.auto_manage(handle):
        1 / 0
    assert cpu.free() == MIB


def test_exit_tells_it_to_go_and_lazy_lets_it_stay(cpu):
    lazy, at_exit = pools.manage(Thing()), pools.manage(Thing())
    with pools.auto_manage(lazy):
        pass
    with pools.auto_manage(at_exit, offload="exit"):
        pass
    until(lambda: not at_exit.loaded)
    assert lazy.loaded
    with pytest.raises(ValueError, match="'lazy' or 'exit'"):
        pools.auto_manage(lazy, offload="never")


def test_told_to_go_while_held_it_goes_when_let_go(cpu):
    handle = pools.manage(Thing())
    with pools.auto_manage(handle):
        handle.offload()
        time.sleep(0.15)
        assert handle.loaded
    until(lambda: not handle.loaded)


def test_telling_to_go_is_no_work(cpu):
    handle = pools.manage(tiny(1))
    times = []
    for _ in range(50):
        handle.load()
        started = time.perf_counter()
        handle.offload()
        times.append(time.perf_counter() - started)
    assert min(times) < 100e-6


def test_output_is_the_models_own(cpu):
    model = tiny(2)
    x = torch.randn(3, 512)
    before = model(x)
    handle = pools.manage(model)
    for _ in range(2):
        with pools.auto_manage(handle):
            assert torch.equal(model(x), before)
        cpu.free()


def test_used_is_by_unique_storage_buffers_counted(cpu):
    """A tied weight once, a buffer that no state_dict has, a view of a weight not again."""
    model = tiny(2)
    model[1].weight = model[0].weight
    model.register_buffer("table", torch.zeros(512, 512), persistent=False)
    model.register_buffer("part", model[0].weight.detach()[:5], persistent=False)
    with pools.auto_manage(model):
        assert 2 * MIB <= cpu.pool("cpu").used <= 2 * MIB + PAGE
        assert model[1].weight is model[0].weight


def test_managing_a_small_model_takes_milliseconds(cpu):
    models = [torch.nn.Linear(10, 1) for _ in range(20)]
    pools.manage(torch.nn.Linear(10, 1))
    times = []
    for model in models:
        started = time.perf_counter()
        pools.manage(model)
        times.append(time.perf_counter() - started)
    assert sorted(times)[5] < 0.02
    started = time.perf_counter()
    for model in models:
        pools.manage(model)
    assert (time.perf_counter() - started) / 20 < 0.002


def test_managing_collects_no_garbage(cpu):
    collected = []
    gc.callbacks.append(lambda phase, info: collected.append(info["generation"]))
    gc.disable()
    try:
        pools.manage(torch.nn.Linear(4, 4))
    finally:
        gc.enable()
        gc.callbacks.pop()
    assert collected == []


def test_options_of_a_second_manage_hold(cpu):
    model = tiny(1)
    first = pools.manage(model, priority=3)
    second = pools.manage(model, pin=True, name="unet", inference=1000)
    assert second.user is first.user
    assert (first.priority, first.pinned, first.name) == (3, True, "unet")
    assert first.user.inference_memory_estimator == 1000
    pools.manage(first, pin=False, priority=0)
    assert (second.priority, second.pinned) == (0, False)
    second.priority, second.pinned = 7, True
    assert (first.priority, first.pinned) == (7, True)
    with pytest.raises(TypeError, match="does not take"):
        pools.manage(Thing(), trust_files=True)


def test_names_are_told_apart(cpu):
    things = [Thing(), Thing(), Thing()]
    names = [pools.manage(thing).name for thing in things]
    names += [pools.manage(Thing(), name="unet").name for _ in range(1)]
    assert len(set(names)) == 4
    assert names[0] == "Thing"
    assert names[3] == "unet"


def test_what_no_class_manages_is_refused_by_type(cpu):
    with pytest.raises(pools.Unmanageable, match=r"got dict; register_user"):
        pools.manage({})
    with pytest.raises(pools.Unmanageable, match="int"):
        pools.manage(3)


def test_a_lease_of_something_kept_by_nobody_else_keeps_it(cpu):
    with pools.auto_manage(Thing()) as handle:
        gc.collect()
        assert handle.obj is not None
        assert handle.loaded


def test_what_dies_gives_its_bytes_and_its_file_back(cpu, tmp_path):
    model = tiny(1)
    handle = pools.manage(model)
    handle.load()
    ref = weakref.ref(model)
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size >= MIB]
    assert len(files) == 1
    del model, handle
    gc.collect()
    assert ref() is None
    until(lambda: cpu.pool("cpu").used == 0)
    until(lambda: not files[0].exists())
    assert cpu.entries == {}


def test_unmanaged_it_is_an_ordinary_model_again(cpu):
    model, x = tiny(1), torch.randn(2, 512)
    before = model(x)
    handle = pools.manage(model)
    with pools.auto_manage(handle), pytest.raises(pools.PoolRefused, match="holds 'Sequential'"):
        pools.unmanage(model)
    pools.unmanage(handle)
    pools.unmanage(model)
    assert cpu.entries == {}
    assert cpu.pool("cpu").used == 0
    assert torch.equal(model(x), before)
    again = pools.manage(model)
    with pools.auto_manage(again):
        assert torch.equal(model(x), before)


def test_bytes_of_nobody_are_reserved_and_released(cpu):
    handle = pools.manage(Thing(2 * MIB))
    handle.load()
    handle.offload()
    reserved = cpu.reserve("cpu", 3 * MIB)
    assert not handle.loaded
    assert cpu.pool("cpu").used == 3 * MIB
    with pytest.raises(pools.LeaseTimeout, match="reserved by thread MainThread"):
        handle.load(0)
    cpu.release(reserved)
    assert cpu.pool("cpu").used == 0


def test_figures_say_what_happened(cpu):
    one, two = pools.manage(tiny(3), name="one"), pools.manage(tiny(3), name="two")
    for handle in (one, one, two):
        with pools.auto_manage(handle):
            inside = cpu.snapshot()
    pool = inside.pools[0]
    assert (pool.name, pool.budget, pool.used, pool.peak) == ("cpu", 4 * MIB, 3 * MIB, 3 * MIB)
    figures = {user.name: user for user in inside.users}
    assert (figures["one"].hits, figures["one"].misses, figures["one"].evictions) == (1, 1, 1)
    assert (figures["two"].hits, figures["two"].misses) == (0, 1)
    assert figures["one"].state == "absent"
    assert figures["two"].state == "ready"
    assert figures["two"].leases == 1
    assert "test_pools_management.py" in figures["two"].holders[0]
    assert figures["two"].bytes_in == 3 * MIB
    assert figures["one"].seconds_loading > 0
    assert [used for _, _, used in inside.events][-1] == 3 * MIB
    assert inside.policy == "lru"


HALF_WAY = [
    "opguard.pools._patched",
    "opguard.pools.proxies",
    "opguard.base",
    "torch._dynamo.eval_frame",
    "torch._inductor.config",
    "torch._subclasses.fake_tensor",
    "transformers.pytorch_utils",
]


@pytest.mark.parametrize("module", HALF_WAY)
def test_what_another_thread_is_importing_just_now_is_not_asked(cpu, monkeypatch, module):
    """Its module is there already and has none of its names yet."""
    patched = pools.CommitObjectProxy
    monkeypatch.setitem(sys.modules, module, ModuleType(module))
    model, compiled = tiny(2), tiny(1)
    compiled._compiled_call_impl = compiled._call_impl
    _storages.refuse(compiled)
    handle = pools.manage(model)
    with patched(model), pytest.raises(pools.PoolRefused, match="thread MainThread holds 'Seq"):
        pools.manage(tiny(3)).load(timeout=0)
    with pools.auto_manage(handle):
        model[0].weight = torch.nn.Parameter(torch.ones(512, 512), requires_grad=False)
        assert list(handle.user.strays()) == ["0.weight"]
    assert not _storages._is_wrapper(torch.ones(1).as_subclass(type("Own", (torch.Tensor,), {})))
    assert find_parts({"a": model}) == {"a": model}
    assert not _lora_targets._is_conv1d(model)


def test_importing_pools_is_cheap_and_patches_nothing(tmp_path):
    code = f"""
import sys, threading, time, torch, opguard
assert not [name for name in sys.modules if name.startswith("opguard.pools")]
had = set(sys.modules)
call, assign = torch.nn.Module.__call__, torch.nn.Module.__setattr__
sys.pycache_prefix, sys.dont_write_bytecode = {str(tmp_path)!r}, False
took = 1.0
for _ in range(5):  # the first one compiles
    for name in set(sys.modules) - had:
        del sys.modules[name]
    at = time.process_time()
    import opguard.pools
    took = min(took, time.process_time() - at)
new = {{name.partition(".")[0] for name in set(sys.modules) - had}}
assert not new & {{"diffusers", "transformers", "accelerate", "numpy", "psutil"}}, new
late = {{"commits", "proxies", "streaming", "lora", "reporting"}}  # imported by who uses them
assert not {{f"opguard.pools.{{name}}" for name in late}} & set(sys.modules)
assert threading.active_count() == 1
opguard.pools.setup_default_pools(spill_dir={str(tmp_path)!r})
opguard.pools.manage(torch.nn.Linear(2, 2))
assert torch.nn.Module.__call__ is call and torch.nn.Module.__setattr__ is assign
assert not {{"accelerate", "diffusers", "transformers", "psutil"}} & set(sys.modules)
print(took)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.05  # 10 ms on a quiet machine

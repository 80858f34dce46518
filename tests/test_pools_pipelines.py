"""Pipelines in pools: components are users of their own, whoever shares them."""

from __future__ import annotations

import asyncio
import copy
import gc
import subprocess
import sys
import threading
import types
import weakref
from collections import deque
from pathlib import Path

import pytest
import torch
from torch import nn

from opguard import pools
from opguard.pools._parts import refuse_offloaded
from opguard.pools.pipelines import tell_where
from pools_kit import fresh_pools, until

SIDE = 128
LAYER = SIDE * SIDE * 4  # 64 KiB


class Coder(nn.Module):
    """Used by entry points that are not forward, as a VAE is."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.inner = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(layers)))

    def encode(self, x):
        return self.inner(x)

    def decode(self, x):
        return self.inner(x).tanh()

    def forward(self, x):
        return self.decode(self.encode(x))


class Net(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.inner = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(layers)))
        self.seen: list[int] = []

    def forward(self, x):
        self.seen.append(pools.get_management().pool("cpu").used)
        return self.inner(x).tanh()


class Pipeline:
    """What a pipeline is made of, and more than one entry point of its parts."""

    def __init__(self, vae=None, unet=None, text=None) -> None:
        self.vae, self.unet, self.text = vae or Coder(), unet or Net(), text or Net()
        self.scheduler = types.SimpleNamespace(step=3)

    @property
    def components(self):
        return {"vae": self.vae, "unet": self.unet, "text": self.text, "scheduler": self.scheduler}

    def __call__(self, x):
        x = self.vae.encode(self.text(x))
        for _ in range(2):
            x = self.unet(x)
        return self.vae.decode(x)


@pytest.fixture
def pool(tmp_path):
    with fresh_pools(tmp_path, 16 * LAYER) as management:
        yield management.pool("cpu")


def shrunk(pool, layers: float):
    pool.budget = int(layers * LAYER)
    return pool


def used_layers(pool) -> float:
    return pool.used / LAYER


def held() -> list[str]:
    return [user.name for user in pools.get_management().snapshot().users if user.leases]


X = torch.linspace(-1, 1, SIDE).reshape(1, SIDE)


def test_a_set_that_fits_is_there_as_a_whole(pool):
    pipe = Pipeline()
    expected = pipe(X)
    handle = pools.manage(pipe)
    assert used_layers(pool) == 0
    with pools.auto_manage(handle) as h:
        assert h.obj is pipe
        assert h.loaded
        assert used_layers(pool) == 6
        assert len(held()) == 3
        assert torch.equal(h.obj(X), expected)
    assert not held()
    with pools.auto_manage(pipe, offload="exit") as h:
        assert h.loaded
    pools.free()
    assert used_layers(pool) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: {"a": a, "b": b, "n": 3},
        lambda a, b: [a, b],
        lambda a, b: (a, [b, a]),
        lambda a, b: types.SimpleNamespace(a=a, more={"b": b}),
    ],
)
def test_any_object_whose_parts_are_modules(pool, make):
    a, b = Net(1), Net(2)
    obj = make(a, b)
    with pools.auto_manage(obj) as h:
        assert h.obj is obj
        assert used_layers(pool) == 3
        assert a(X).shape == b(X).shape
    pools.unmanage(obj)
    assert used_layers(pool) == 0


def test_what_has_no_module_is_refused(pool):
    for obj in ({"a": 1}, [], types.SimpleNamespace(), 3):
        with pytest.raises(pools.Unmanageable, match="module"):
            pools.manage(obj)


def test_shared_components_are_one_user_each(pool):
    text = Net(4)
    first, second = Pipeline(text=text), Pipeline(text=text)
    expected = first(X), second(X)
    handles = pools.manage(first), pools.manage(second)
    with pools.auto_manage(handles[0]), pools.auto_manage(handles[1]):
        assert used_layers(pool) == 12  # 2 + 2 + 4 and 2 + 2
        text.seen.clear()
        assert torch.equal(first(X), expected[0])
        assert torch.equal(second(X), expected[1])
    users = pools.get_management().snapshot().users
    assert len(users) == 5
    assert sum(user.misses for user in users) == 5  # what is shared moved once


def test_larger_than_the_budget_runs_each_component_just_in_time(pool):
    shrunk(pool, 5)
    pipe = Pipeline(Coder(4), Net(3), Net(4))
    expected = pipe(X)
    with pools.auto_manage(pipe) as h:
        for _ in range(3):
            pipe.unet.seen.clear()
            assert torch.equal(h.obj(X), expected)
            assert pool.used <= pool.budget
            assert [used / LAYER for used in pipe.unet.seen] == [3, 3]
    assert not held()


def test_entry_points_without_forward(pool):
    shrunk(pool, 4)
    pipe = Pipeline(Coder(4), Net(4), Net(1))
    pools.manage(pipe)
    with pools.auto_manage(pipe):
        pipe.unet(X)
        pipe.vae.encode(X)
        assert used_layers(pool) == 4
        assert "vae" in " ".join(ready())
        pipe.unet(X)
        pipe.vae.decode(X)
        assert "vae" in " ".join(ready())


def ready() -> list[str]:
    return [user.name for user in pools.get_management().snapshot().users if user.state == "ready"]


def test_one_component_larger_than_the_budget_streams(pool):
    shrunk(pool, 8)
    pipe = Pipeline(Coder(2), Net(20), Net(2))
    expected = pipe(X)
    with pools.auto_manage(pipe) as h:
        assert torch.equal(h.obj(X), expected)
        assert pool.used <= pool.budget
    assert torch.equal(pipe(X), expected)


# --- what people reported of others' offloading -------------------------------------------------


def test_an_exception_in_a_component_releases_it(pool):
    shrunk(pool, 4)

    class Fails(Net):
        def forward(self, x):
            raise ValueError("here")

    pipe = Pipeline(unet=Fails(3))
    with pytest.raises(ValueError, match="here"), pools.auto_manage(pipe) as h:
        h.obj(X)
    assert not held()


def plain(module: nn.Module) -> bool:
    return not any(
        "forward" in each.__dict__
        or "encode" in each.__dict__
        or "decode" in each.__dict__
        or each._forward_hooks
        or each._forward_pre_hooks
        for each in module.modules()
    )


@pytest.mark.parametrize("layers", [5, 16])
def test_disabling_again_leaves_what_was_there(pool, layers):
    shrunk(pool, layers)
    pipe = Pipeline(Coder(4), Net(3), Net(4))
    expected, before = pipe(X), dict(vars(pipe))
    for _ in range(2):
        pools.manage(pipe)
        with pools.auto_manage(pipe) as h:
            assert torch.equal(h.obj(X), expected)
        pools.unmanage(pipe)
        assert all(map(plain, (pipe.vae, pipe.unet, pipe.text)))
        assert vars(pipe) == before
        assert pool.used == 0
        assert not pools.get_management().snapshot().users
        assert torch.equal(pipe(X), expected)


def test_enabling_twice_and_on_pipelines_that_share(pool):
    shrunk(pool, 5)
    first = Pipeline(Coder(4), Net(3), Net(4))
    second = Pipeline(first.vae, Net(2), first.text)
    expected = first(X), second(X)
    for pipe in (first, second, first, second):
        pools.manage(pipe)
        with pools.auto_manage(pipe):
            pass
    for _ in range(2):
        for pipe, answer in zip((first, second), expected, strict=True):
            with pools.auto_manage(pipe) as h:
                assert torch.equal(h.obj(X), answer)
    pools.unmanage(first)
    assert plain(first.unet)
    with pools.auto_manage(second) as h:  # what it shares is managed on
        assert torch.equal(h.obj(X), expected[1])
        assert pool.used <= pool.budget
    assert len(pools.get_management().snapshot().users) == 3
    assert torch.equal(first(X), expected[0])


def test_threads_with_pipelines_that_share(pool):
    """As a service does: each worker has a pipeline, the parts are the same."""
    shrunk(pool, 6)
    vae, text = Coder(2), Net(2)
    pipes = [Pipeline(vae, Net(4), text) for _ in range(3)]
    expected = [pipe(X) for pipe in pipes]
    for pipe in pipes:
        pools.manage(pipe)
    wrong: list[object] = []

    def serve(number: int) -> None:
        try:
            for _ in range(5):
                with pools.auto_manage(pipes[number], timeout=60) as h:
                    if not torch.equal(h.obj(X), expected[number]):
                        wrong.append(number)
                    if pool.used > pool.budget:
                        wrong.append("over budget")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=serve, args=(number % 3,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not held()


def test_switching_pipelines_frees_the_first(pool):
    first, second = Pipeline(), Pipeline(Coder(5), Net(5), Net(5))
    expected = second(X)
    with pools.auto_manage(first):
        pass
    with pools.auto_manage(second) as h:  # 6 + 15 do not fit 16
        assert torch.equal(h.obj(X), expected)
        assert pool.used <= pool.budget
    gone = weakref.ref(second.unet)
    del second, h
    assert gone() is None  # without the collector
    until(lambda: pool.used == 0)


def test_nothing_grows_call_after_call(pool):
    shrunk(pool, 5)
    pipe = Pipeline(Coder(4), Net(3), Net(4))
    handle = pools.manage(pipe)
    pools.get_management().recorder.events = deque(maxlen=8)  # what it keeps it may keep

    def calls(count: int) -> tuple[int, int]:
        for _ in range(count):
            with pools.auto_manage(handle) as h, torch.no_grad():
                h.obj(X)
                pipe.unet.seen.clear()
                pipe.text.seen.clear()
        gc.collect()
        return sys.getallocatedblocks(), anonymous()

    calls(20)
    first, second = calls(10), calls(100)
    assert second[0] - first[0] < 90  # fewer than one object a call
    assert second[1] - first[1] < LAYER


def anonymous() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return next(
        int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Anonymous:")
    )


def test_the_last_component_goes_when_told(pool):
    pipe = Pipeline()
    handle = pools.manage(pipe)
    with pools.auto_manage(handle):
        pipe(X)
    assert handle.loaded
    handle.offload()
    pools.free()
    assert not handle.loaded
    assert pool.used == 0


def test_whoever_holds_what_is_in_the_way_is_named(pool):
    first, second = Pipeline(Coder(4), Net(4), Net(4)), Pipeline(Coder(4), Net(4), Net(4))
    pools.manage(second)
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with pools.auto_manage(first):
            inside.set()
            done.wait(30)

    thread = threading.Thread(target=hold, name="worker-7")
    thread.start()
    try:
        assert inside.wait(30)
        with (
            pytest.raises(pools.LeaseTimeout, match=r"worker-7.*test_pools_pipelines"),
            pools.auto_manage(second, timeout=0.05),
        ):
            pass
    finally:
        done.set()
        thread.join(30)


def test_in_use_is_not_let_go(pool):
    pipe = Pipeline()
    with (
        pools.auto_manage(pipe),
        pytest.raises(pools.PoolRefused, match=r"Pipeline\.vae.*test_pools_pipelines"),
    ):
        pools.unmanage(pipe)
    pools.unmanage(pipe)
    assert not pools.get_management().snapshot().users


def test_tasks(pool):
    shrunk(pool, 6)
    text = Net(2)
    pipes = [Pipeline(text=text) for _ in range(3)]
    expected = [pipe(X) for pipe in pipes]

    async def serve(number: int) -> bool:
        async with pools.auto_manage(pipes[number], timeout=60) as h:
            await asyncio.sleep(0)
            return torch.equal(h.obj(X), expected[number]) and pool.used <= pool.budget

    async def everybody() -> list[bool]:
        return await asyncio.gather(*(serve(number % 3) for number in range(9)))

    assert all(asyncio.run(everybody()))
    assert not held()


def test_managed_before_the_pipeline_came_stays_managed(pool):
    pipe = Pipeline()
    handle = pools.manage(pipe.unet, priority=2)
    pools.manage(pipe)
    pools.unmanage(pipe)
    assert [user.name for user in pools.get_management().snapshot().users] == [handle.name]
    assert handle.priority == 2


def test_swapped_components(pool):
    pipe = Pipeline()
    handle = pools.manage(pipe)
    with pools.auto_manage(handle):
        pipe(X)
    pipe.unet = Net(4)
    pipe.extra = Net(1)
    expected = pipe(X)
    with pools.auto_manage(handle) as h:
        assert len(held()) == 4
        assert torch.equal(h.obj(X), expected)
    pipe.extra = None
    with pools.auto_manage(handle):
        assert len(held()) == 3


def test_a_swapped_component_that_somebody_uses_is_in_nobodys_way(pool):
    pipe = Pipeline()
    pools.manage(pipe)
    old, pipe.unet = pipe.unet, Net(1)
    with pools.manage(old).lease(), pools.auto_manage(pipe) as h:
        assert h.obj(X).shape == X.shape
    assert len(pools.get_management().snapshot().users) == 4  # the old one works on, managed
    pools.unmanage(old)
    assert len(pools.get_management().snapshot().users) == 3


class Meta(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, device="meta"))


def test_a_pipeline_of_which_one_part_is_refused_is_as_it_was(pool):
    pipe = Pipeline(text=Meta())
    with pytest.raises(pools.Unmanageable, match="meta"):
        pools.manage(pipe)
    assert not pools.get_management().snapshot().users
    pipe.text = Net()
    handle = pools.manage(pipe)
    text, pipe.more, pipe.text = pipe.text, Net(), Meta()
    with pytest.raises(pools.Unmanageable, match="meta"), pools.auto_manage(handle):
        pass
    users = [user.name for user in pools.get_management().snapshot().users]
    assert users == ["Pipeline.vae", "Pipeline.unet", "Pipeline.text"]
    pipe.text = text
    with pools.auto_manage(handle) as h:
        assert h.obj(X).shape == X.shape
    assert len(pools.get_management().snapshot().users) == 4


def test_options_reach_the_components(pool):
    pipe = Pipeline()
    handle = pools.manage(pipe, verify="bytes")
    pools.manage(pipe, inference=1000)
    users = [entry.user for entry in handle.user.members]
    assert [user.inference_memory_estimator for user in users] == [1000] * 3
    with pytest.raises(ValueError, match=r"trust_files: expected False.*unmanage"):
        pools.manage(pipe, trust_files=True)
    with pytest.raises(TypeError, match=r"among \['name', 'trust_files', 'verify'\], got 'stream'"):
        pools.manage(Pipeline(), stream=True)


def test_priority_and_pin_reach_the_components(pool):
    pipe = Pipeline()
    handle = pools.manage(pipe, priority=3, pin=True)
    assert handle.priority == 3
    assert handle.pinned
    with pools.auto_manage(pipe):
        pass
    pools.free(nbytes=pool.budget)
    assert handle.loaded
    pools.manage(pipe, pin=False)
    pools.free(nbytes=pool.budget)
    assert not handle.loaded


def test_parts_that_share_weights(pool):
    encoder = Net(2)
    whole = nn.Sequential(encoder, Net(1))
    pipe = types.SimpleNamespace(encoder=encoder, whole=whole)  # one part is inside the other
    expected = encoder(X), whole(X)
    with pools.auto_manage(pipe):
        assert used_layers(pool) == 3
        assert torch.equal(encoder(X), expected[0])
        assert torch.equal(whole(X), expected[1])


# --- the libraries' own -------------------------------------------------------------------------


def test_nothing_is_imported_to_look(tmp_path):
    code = f"""
import sys, types, torch
from opguard import pools
from opguard.pools._parts import refuse_offloaded
from opguard.pools.pipelines import tell_where
pools.setup_default_pools(budgets={{"cpu": "4MiB"}}, spill_dir={str(tmp_path)!r})
pipe = types.SimpleNamespace(net=torch.nn.Linear(8, 8))
with pools.auto_manage(pipe) as h:
    h.obj.net(torch.zeros(1, 8))
loaded = {{"diffusers", "transformers", "accelerate", "peft", "numpy.testing"}} & set(sys.modules)
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    pytest.importorskip("diffusers")
    from tiny_diffusion import build_stable_diffusion

    return build_stable_diffusion(tmp_path_factory.mktemp("sd"))


def load_sd(folder):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe):
    generator = torch.Generator().manual_seed(3)
    return pipe(
        "a cat", num_inference_steps=2, height=32, width=32, generator=generator, output_type="pt"
    ).images


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("share", [0.55, 2.0])
def test_stable_diffusion(stable_diffusion, pool, share):
    pipe = load_sd(stable_diffusion)
    expected = picture(pipe)
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    nbytes = {name: sum(p.nbytes for p in part.parameters()) for name, part in parts.items()}
    assert max(nbytes.values()) < 0.8 * sum(nbytes.values())
    budget = int(max(max(nbytes.values()) * 1.1, share * sum(nbytes.values()))) + (64 << 10)
    pool.budget = budget
    for _ in range(2):
        with pools.auto_manage(pipe) as h:
            assert torch.equal(picture(h.obj), expected)
            assert pool.used <= pool.budget
    assert not held()
    pools.unmanage(pipe)
    assert all(map(plain, parts.values()))
    assert torch.equal(picture(pipe), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_offload_hooks_of_others_are_refused_with_the_way_out(stable_diffusion, pool):
    pytest.importorskip("accelerate")
    pipe = load_sd(stable_diffusion)
    pipe.enable_model_cpu_offload(device="cpu:0")
    with pytest.raises(pools.Unmanageable, match="remove_all_hooks"):
        pools.manage(pipe)
    pipe.remove_all_hooks()
    pools.manage(pipe)
    pipe.enable_model_cpu_offload(device="cpu:0")  # afterwards is no better
    with pytest.raises(pools.Unmanageable, match="remove_all_hooks"), pools.auto_manage(pipe):
        pass


def test_diffusers_is_told_where_absent_components_run(stable_diffusion):
    pipe = load_sd(stable_diffusion)
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    for module in modules:
        tell_where(module, torch.device("cuda:0"))
    assert pipe._execution_device == torch.device("cuda:0")
    copied = copy.deepcopy(pipe.vae)
    assert copied._hf_hook.execution_device is None  # the copy is where it is
    refuse_offloaded(dict(enumerate(modules)), "it")  # it moves nothing
    for module in modules:
        tell_where(module, None)
    assert pipe._execution_device == torch.device("cpu")
    assert not any("_hf_hook" in vars(module) for module in modules)


def test_transformers_pipeline(tmp_path, pool):
    transformers = pytest.importorskip("transformers")
    from tiny_models import build_llama

    folder = build_llama(tmp_path / "llama")
    pipe = transformers.pipeline("text-generation", model=str(folder), device="cpu")
    ask = {"max_new_tokens": 4, "do_sample": False}
    expected = pipe("a cat", **ask)
    shrunk(pool, 16)
    with pools.auto_manage(pipe) as h:
        assert pool.used > 0
        assert h.obj("a cat", **ask) == expected
    pools.unmanage(pipe)
    assert pipe("a cat", **ask) == expected


def test_guarded_model(pool):
    from opguard.base import OpGuardBase

    class Guarded(OpGuardBase):
        NAME = "net"
        MODEL_ID = "net"
        REVISION = "1"
        DETECTOR_TYPE = staticmethod(lambda _: Net())

    guarded = Guarded()
    with pytest.raises(pools.Unmanageable, match="loaded"):
        pools.manage(guarded)
    with guarded:
        expected = guarded(input_raw=X)
        with pools.auto_manage(guarded) as h:
            assert h.obj is guarded
            assert used_layers(pool) == 2
            assert torch.equal(guarded(input_raw=X), expected)
    until(lambda: pool.used == 0)  # its model was freed

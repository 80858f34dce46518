"""A model larger than its pool: block by block, within the budget, equal to the last bit."""

from __future__ import annotations

import asyncio
import copy
import logging
import mmap
import os
import pickle
import re
import struct
import threading
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from opguard import pools
from pools_kit import fresh_pools, until

SIDE = 128  # a Linear(SIDE, SIDE, bias=False) is 64 KiB
LAYER = SIDE * SIDE * 4
PAGE = mmap.PAGESIZE
pytestmark = pytest.mark.skipif(
    not Path("/proc/self/pagemap").exists(), reason="needs Linux to tell what is resident"
)


@pytest.fixture
def pool(tmp_path):
    with fresh_pools(tmp_path, 8 * LAYER) as management:
        yield management.pool("cpu")


def layers(count: int, side: int = SIDE) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(side, side, bias=False), nn.Tanh()) for _ in range(count))
    ).eval()


def twin(model: nn.Module) -> nn.Module:
    """An equal model of its own, that is never managed."""
    return copy.deepcopy(model)


def resident_bytes(model: nn.Module) -> int:
    """Bytes of the model's tensors that are in memory, by the kernel's own account."""
    resident = set()
    with open("/proc/self/pagemap", "rb", buffering=0) as table:
        for tensor in [*model.parameters(), *model.buffers()]:
            first = tensor.data_ptr() // PAGE
            last = (tensor.data_ptr() + tensor.nbytes - 1) // PAGE
            words = os.pread(table.fileno(), 8 * (last - first + 1), 8 * first)
            resident |= {
                first + number
                for number, (word,) in enumerate(struct.iter_unpack("Q", words))
                if word >> 63
            }
    return PAGE * len(resident)


def map_bytes(folder: Path) -> int:
    """Bytes of memory that maps of files below ``folder`` take, from smaps."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_a_model_larger_than_its_pool_gives_the_same_answers(pool):
    model = layers(20)
    x, bare = torch.randn(3, SIDE), twin(model)
    pools.manage(model)
    for _ in range(3):
        assert torch.equal(model(x), bare(x))
    assert 0 < pool.used <= pool.budget


def test_the_budget_is_kept_all_the_time(pool, tmp_path):
    model = layers(20)
    pools.manage(model)
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append((map_bytes(tmp_path), resident_bytes(model), pool.used))
            return x

    for layer in model:
        layer.append(Look())
    x = torch.randn(2, SIDE)
    for _ in range(3):
        model(x)
    assert len(seen) == 60
    slack = PAGE * len(list(model.parameters()))
    assert max(used for _, _, used in seen) <= pool.budget
    assert max(held for held, _, _ in seen) <= pool.budget + slack
    assert min(held for _, held, _ in seen) >= LAYER  # the one that runs is there


def test_auto_manage_of_a_streamed_model(pool):
    model = layers(20)
    bare, x = twin(model), torch.randn(1, SIDE)
    with pools.auto_manage(model, offload="exit") as handle:
        assert handle.obj is model
        assert torch.equal(model(x), bare(x))
        assert not handle.loaded  # never all of it

    async def tasks() -> list[torch.Tensor]:
        async with pools.auto_manage(handle):
            threads = [asyncio.to_thread(model, x) for _ in range(3)]
            return [model(x), *await asyncio.gather(*threads)]

    assert all(torch.equal(each, bare(x)) for each in asyncio.run(tasks()))
    handle.offload()
    until(lambda: pool.used == 0)


@pytest.mark.parametrize("when", ["before", "after", "inside", "handed over"])
def test_compiled_models(pool, when):
    model = layers(12)
    bare, x = twin(model), torch.randn(2, SIDE)
    compiled = torch.compile(model, backend="eager") if when != "inside" else model
    pools.manage(compiled if when == "handed over" else model)
    if when == "inside":
        model.compile(backend="eager")
    elif when == "after":
        compiled = torch.compile(model, backend="eager")
    for inputs in (x, x, x[:1]):
        assert torch.equal(compiled(inputs), bare(inputs))
        assert 0 < pool.used <= pool.budget
    torch.compiler.reset()


def test_compiled_blocks_are_compiled_once(pool, caplog):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(SIDE, SIDE, bias=False)

        def forward(self, x):
            return self.inner(x).tanh()

    class Top(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(20))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model, graphs = Top().requires_grad_(False), []
    x = torch.randn(2, SIDE)
    expected = model(x)
    pools.manage(model)
    compiled = torch.compile(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with caplog.at_level(logging.WARNING, "torch._dynamo"):
        for _ in range(2):
            assert torch.equal(compiled(x), expected)
    torch.compiler.reset()
    assert len(graphs) == 1
    assert not caplog.records  # no code of ours is compiled again and again


def test_decides_by_itself_and_can_be_told(pool):
    small, told = layers(2), layers(2)
    pools.manage(small)
    pools.manage(told, stream=True)
    x = torch.randn(1, SIDE)
    assert torch.equal(told(x), twin(told)(x))
    assert "forward" not in small[0].__dict__
    handle = pools.manage(layers(20), stream=False)
    with pytest.raises(pools.PoolRefused, match="does not fit"):
        handle.load()


def test_blocks_that_are_there_stay_while_nobody_needs_the_bytes(pool):
    model = layers(20)
    handle = pools.manage(model)
    x = torch.randn(1, SIDE)
    model(x)
    model(x)
    first = [resident_bytes(model[number]) for number in range(3)]
    assert first == [LAYER] * 3  # the next run does not start from nothing
    handle.offload()
    pools.free(nbytes=pool.budget)
    assert resident_bytes(model) == 0


def test_exceptions_release(pool):
    class Fails(nn.Module):
        kind: type[BaseException] = ValueError

        def forward(self, x):
            raise self.kind("here")

    model = layers(20)
    model[5].append(Fails())
    pools.manage(model)
    for kind in (ValueError, KeyboardInterrupt):
        Fails.kind = kind
        with pytest.raises(kind):
            model(torch.randn(1, SIDE))
        until(lambda: not held())  # what is prefetched is held for a moment


def held() -> list[str]:
    """Names of users that somebody holds a lease on."""
    return [user.name for user in pools.get_management().snapshot().users if user.leases]


class Attends(nn.Module):
    """Attention uses out_proj's weight without its forward; so does the head with the table's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4 * SIDE, SIDE)
        self.blocks = nn.ModuleList(
            nn.MultiheadAttention(SIDE, 4, batch_first=True) for _ in range(4)
        )
        self.norm = nn.LayerNorm(SIDE)
        self.scale = nn.Parameter(torch.randn(SIDE))

    def forward(self, ids):
        x = self.table(ids) * self.scale
        for block in self.blocks:
            x = x + block(x, x, x)[0]
        return nn.functional.linear(self.norm(x), self.table.weight)


def test_weights_used_without_forward(pool, tmp_path):
    model = Attends().eval()
    bare = twin(model)
    pools.manage(model)
    ids = torch.randint(0, 4 * SIDE, (2, 5))
    for _ in range(4):
        assert torch.equal(model(ids), bare(ids))
        assert pool.used <= pool.budget
    assert map_bytes(tmp_path) <= pool.budget + PAGE * len(list(model.parameters()))


def test_weights_used_without_forward_are_learned(pool):
    """The head reads the table's weight: from the second call on it is there for that."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers(12)
            self.table = nn.Embedding(2 * SIDE, SIDE)
            self.scale = nn.Parameter(torch.randn(SIDE))
            self.look = list[bool]()

        def forward(self, ids):
            x = self.layers(self.table(ids) * self.scale)
            self.look.append(table_name in held())
            return nn.functional.linear(x, self.table.weight)

    model = Tied().eval()
    bare, ids = twin(model), torch.randint(0, 2 * SIDE, (1, 4))
    stream = pools.manage(model).user
    block = next(block for block in stream.cut.blocks if block.name == "table")
    table_name = stream.members[block.segments[0]].name
    with torch.no_grad():
        for _ in range(8):
            assert torch.equal(model(ids), bare(ids))
            assert pool.used <= pool.budget
    assert not model.look[0]
    assert model.look[-1]


def test_encoder_layers_take_the_road_they_took(pool):
    layer = nn.TransformerEncoderLayer(SIDE, 4, SIDE, batch_first=True)
    model = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval()
    bare, x = twin(model), torch.randn(2, 7, SIDE)
    pools.manage(model)
    with torch.no_grad():
        assert torch.equal(model(x), bare(x))
    assert torch.equal(model(x), bare(x))


def test_tied_weights_in_two_blocks(pool):
    model = layers(20)
    model[19][0].weight = model[0][0].weight
    bare, x = twin(model), torch.randn(1, SIDE)
    pools.manage(model)
    assert torch.equal(model(x), bare(x))
    assert model[19][0].weight is model[0][0].weight
    assert model[19][0].weight.data_ptr() == model[0][0].weight.data_ptr()


def test_recursion_and_shared_modules(pool):
    class Recursive(nn.Module):
        def __init__(self, shared: nn.Module) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(SIDE))
            self.shared, self.more = shared, layers(12)

        def forward(self, x, depth=3):
            x = self.shared(x * self.scale)
            return self(self.more(x), depth - 1) if depth else self.shared(x)

    model = Recursive(layers(1))
    bare, x = twin(model), torch.randn(1, SIDE)
    pools.manage(model)
    assert torch.equal(model(x), bare(x))
    assert torch.equal(model(x, depth=1), bare(x, depth=1))  # the order learned was another
    until(lambda: not held())  # what is prefetched is held for a moment


def test_one_block_larger_than_the_budget_is_refused_with_figures(pool):
    model = nn.Sequential(nn.Linear(SIDE, SIDE), nn.Linear(SIDE, 20 * SIDE, bias=False))
    before = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(pools.PoolRefused, match=r"512\.0 KiB.*'1'.*1\.2 MiB"):
        pools.manage(model)
    assert [p.data_ptr() for p in model.parameters()] == before  # nothing happened to it


def test_two_streamed_models_at_once(pool):
    models = [layers(16) for _ in range(2)]
    bare = [twin(model) for model in models]
    for model in models:
        pools.manage(model)
    x = torch.randn(1, SIDE)
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for _ in range(10):
                if not torch.equal(models[number](x), bare[number](x)):
                    wrong.append(number)
                if pool.used > pool.budget:
                    wrong.append("over budget")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number % 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    until(lambda: not held())  # what is prefetched is held for a moment


def test_changes_are_kept(pool):
    model = layers(20)
    bare = twin(model)
    pools.manage(model)
    x = torch.randn(1, SIDE)
    model(x)
    for each in (model, bare):
        each[0][0].weight.data.mul_(2)
        each[10][0].weight.detach().numpy()[0] = 1
    model(x)
    assert torch.equal(model(x), bare(x))


def test_training_through_blocks(pool):
    model = layers(12)
    bare, x = twin(model), torch.randn(4, SIDE)
    pools.manage(model)
    for each in (model, bare):
        for _ in range(2):
            each.zero_grad()
            each(x).sum().backward()
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter.sub_(0.1 * parameter.grad)
    assert torch.equal(model(x), bare(x))


def test_copies_and_pickles_are_models_of_their_own(pool):
    model = layers(20)
    bare, x = twin(model), torch.randn(1, SIDE)
    pools.manage(model)
    model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(other(x), torch.zeros(1, SIDE))
        assert torch.equal(model(x), bare(x))
    assert [type(p).__name__ for p in model.parameters()] == ["Parameter"] * 20
    assert model.state_dict().keys() == bare.state_dict().keys()


def test_unmanage_leaves_a_plain_model(pool):
    model = layers(20)
    bare, x = twin(model), torch.randn(1, SIDE)
    pools.manage(model)
    model(x)
    pools.unmanage(model)
    assert not any("forward" in each.__dict__ for each in model.modules())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
    assert pool.used == 0
    assert torch.equal(model(x), bare(x))
    pools.manage(model)
    assert torch.equal(model(x), bare(x))


def test_goes_with_its_model(pool, tmp_path):
    model = layers(20)
    pools.manage(model)
    model(torch.randn(1, SIDE))
    gone = weakref.ref(model[0])
    del model
    assert gone() is None  # without the collector
    until(lambda: pool.used == 0)
    until(lambda: map_bytes(tmp_path) == 0)
    until(lambda: not pools.get_management().snapshot().users)


def test_the_next_block_is_there_before_it_is_asked_for(pool):
    model = layers(20)
    pools.manage(model)
    x, waited = torch.randn(1, SIDE), []

    class Pause(nn.Module):
        def forward(self, x):
            for _ in range(200):
                if resident_bytes(following[self]):
                    break
                threading.Event().wait(0.01)
            waited.append(resident_bytes(following[self]))
            return x

    pauses = [Pause() for _ in range(19)]
    following = {pause: model[number + 1] for number, pause in enumerate(pauses)}
    model(x)  # learns the order
    for number, pause in enumerate(pauses):
        model[number].append(pause)
    model(x)
    assert waited == [LAYER] * 19


def test_a_wrong_guess_costs_time_only(pool):
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = layers(16)
            self.order = list(range(16))

        def forward(self, x):
            for number in self.order:
                x = self.experts[number](x)
            return x

    model = Routed()
    bare, x = twin(model), torch.randn(1, SIDE)
    pools.manage(model)
    for order in ([3, 1, 2], [1, 1, 15, 0], list(range(16)), [], [15, 3]):
        model.order = bare.order = order
        assert torch.equal(model(x), bare(x))
    until(lambda: not held())  # what is prefetched is held for a moment

"""Random histories of the pools as users call them: nothing lost, nothing kept, nobody left.

Models are managed, used, patched, changed in every way torch has, evicted, and fail to load; in
threads and tasks, nested, timed out and cancelled. After each step no lease and no waiting is left,
the budget is kept, no patch is left, and every weight is bit by bit what it was made or changed to.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from opguard import pools
from opguard.pools._patched import DeltaCommit
from opguard.pools.commits import AttributeCommit, ForwardHookCommit
from opguard.pools.proxies import CommitObjectProxy
from pools_kit import MIB, Holder, fresh_pools, until

INDEX = st.integers(0, 100)
SIZE = 128
WAYS = ["data", "numpy", "no_grad", "copy", "training", "optimizer", "buffer", "state"]
SECONDS = 20.0


class Net(torch.nn.Module):
    """72 KiB: a weight that is tied, a view of it, statistics, a buffer that is not saved."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Linear(SIZE, SIZE, bias=False)
        self.norm = torch.nn.BatchNorm1d(SIZE)
        self.second = torch.nn.Linear(SIZE, SIZE)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.rand(SIZE), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x)) * self.scale)


class Adds(DeltaCommit):
    """Adds a number to every element of the tied weight."""

    def __init__(self, value: float) -> None:
        self.value = value

    def deltas(self, obj):
        def delta(source, out):
            out.copy_(source + self.value)

        return {obj.first.weight: delta}


class UserError(Exception):
    pass


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """A patch needs bytes beside the weights, which a small budget does not have."""
    try:
        yield
    except pools.PatchFailed as error:
        assert isinstance(error.__cause__, pools.PoolRefused)


def tensors(model: Net) -> dict[str, torch.Tensor]:
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return {name: tensor.detach() for name, tensor in named}


class PoolsMachine(RuleBasedStateMachine):
    """``expected`` holds a copy of every tensor of every model, changed as the model is."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
        folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.management = self.stack.enter_context(fresh_pools(folder, MIB // 4))
        self.models: list[Net] = []
        self.expected: list[dict[str, torch.Tensor]] = []
        self.x = torch.ones(3, SIZE)

    @initialize()
    def begin(self) -> None:
        for _ in range(4):
            self.manage(0, False)

    def pick(self, index: int) -> int:
        return index % len(self.models)

    def check(self, at: int) -> None:
        for name, tensor in tensors(self.models[at]).items():
            assert torch.equal(tensor, self.expected[at][name]), (at, name)
        assert self.models[at].first.weight is self.models[at].second.weight

    # --- rules ------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.models) < 6)
    @rule(priority=st.integers(0, 2), trains=st.booleans())
    def manage(self, priority: int, trains: bool) -> None:
        model = Net(len(self.models)).eval().requires_grad_(trains)
        self.expected.append({name: t.clone() for name, t in tensors(model).items()})
        self.models.append(model)
        pools.manage(model, priority=priority)

    @rule(index=INDEX, pin=st.booleans())
    def pin(self, index: int, pin: bool) -> None:
        for model in self.models:
            pools.manage(model, pin=False)
        handle = pools.manage(self.models[self.pick(index)])
        # Another must fit beside it, or using that one is refused.
        if self.management.pool("cpu").budget >= 2 * handle.user.nbytes:
            pools.manage(handle, pin=pin)

    @rule(index=INDEX, offload=st.sampled_from(["lazy", "exit"]), fails=st.booleans())
    def use(self, index: int, offload: str, fails: bool) -> None:
        at = self.pick(index)
        lease = pools.auto_manage(self.models[at], offload=offload, timeout=SECONDS)
        with contextlib.suppress(UserError), lease as handle:
            assert handle.loaded
            self.check(at)
            with torch.no_grad():
                self.models[at](self.x)
            if fails:
                raise UserError

    @rule(indices=st.lists(INDEX, min_size=2, max_size=5), fails=st.booleans())
    def nested(self, indices: list[int], fails: bool) -> None:
        """More than fit at a time is refused, since nobody else could let go."""
        with contextlib.suppress(UserError, pools.PoolRefused), contextlib.ExitStack() as held:
            for index in indices:
                at = self.pick(index)
                held.enter_context(pools.auto_manage(self.models[at], timeout=SECONDS))
                self.check(at)
            if fails:
                raise UserError

    @rule(index=INDEX, way=st.sampled_from(WAYS), leased=st.booleans())
    def change(self, index: int, way: str, leased: bool) -> None:
        at = self.pick(index)
        model = self.models[at]
        lease = pools.auto_manage(model, timeout=SECONDS) if leased else contextlib.nullcontext()
        with lease:
            self.change_now(model, way)
            self.expected[at] = {name: t.clone() for name, t in tensors(model).items()}

    def change_now(self, model: Net, way: str) -> None:
        weight = model.first.weight
        if way == "data":
            weight.data.add_(1)
        elif way == "numpy":
            weight.detach().numpy()[3, 5] += 2
        elif way == "copy":
            weight.data.copy_(torch.rand(SIZE, SIZE))
        elif way == "buffer":
            model.scale[7] += 1
        elif way == "training":
            with torch.no_grad():
                model.train()(self.x + torch.rand(3, SIZE))
            model.eval()
        elif way == "state":
            model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
        elif way == "optimizer" and weight.requires_grad:
            model(self.x).sum().backward()
            torch.optim.AdamW(model.parameters(), fused=True).step()
            model.zero_grad(set_to_none=True)
        else:
            with torch.no_grad():
                weight[1].mul_(3)

    @rule(index=INDEX, kind=st.sampled_from(["delta", "hook", "attribute"]), fails=st.booleans())
    def patch(self, index: int, kind: str, fails: bool) -> None:
        at = self.pick(index)
        model = self.models[at]
        commit = {
            "delta": lambda: Adds(0.5),
            "hook": lambda: ForwardHookCommit(lambda module, args, result: result * 0),
            "attribute": lambda: AttributeCommit("first", torch.nn.Identity()),
        }[kind]()
        proxy = CommitObjectProxy(model, [commit])
        block = pools.auto_manage(proxy, timeout=SECONDS)
        with contextlib.suppress(UserError), no_room(), block, torch.no_grad():
            if kind == "delta":
                wanted = self.expected[at]["first.weight"] + 0.5
                assert torch.equal(model.first.weight, wanted)
            elif kind == "hook":
                assert not model(self.x).any()
            if fails:
                raise UserError
        assert isinstance(model.first, torch.nn.Linear)
        assert not model._forward_hooks

    @rule(nbytes=st.none() | st.integers(0, MIB // 4))
    def free(self, nbytes: int | None) -> None:
        pools.free(nbytes=nbytes)

    @rule(index=INDEX)
    def offload(self, index: int) -> None:
        handle = pools.manage(self.models[self.pick(index)])
        handle.load(SECONDS)
        handle.offload()

    @rule(nbytes=st.sampled_from([MIB // 8, MIB // 4, MIB // 2]))
    def budget(self, nbytes: int) -> None:
        for model in self.models:
            pools.manage(model, pin=False)
        self.management.pool("cpu").budget = nbytes

    @rule(index=INDEX)
    def failing_load(self, index: int) -> None:
        at = self.pick(index)
        pools.free()
        handle = pools.manage(self.models[at])
        if handle.loaded:  # pinned
            return
        home = handle.user.home
        good, home.bring_in = home.bring_in, lambda *args: (_ for _ in ()).throw(UserError())
        try:
            with contextlib.suppress(UserError), pools.auto_manage(handle, timeout=SECONDS):
                raise AssertionError("the load should have failed")
        finally:
            home.bring_in = good
        assert not handle.loaded

    def fill(self) -> Holder | None:
        """Another thread holds as many models as fit."""
        handles = [pools.manage(model) for model in self.models]
        room = self.management.pool("cpu").budget // handles[0].user.nbytes
        if any(h.pinned for h in handles) or room >= len(handles):
            return None
        return Holder(*handles[:room])

    @rule()
    def time_out(self) -> None:
        holder = self.fill()
        if holder is not None:
            try:
                with pools.auto_manage(self.models[-1], timeout=0.02):
                    raise AssertionError("there was room after all")
            except pools.LeaseTimeout as error:
                assert error.holders
            finally:
                holder.let_go()

    @rule(wins=st.booleans())
    def cancel(self, wins: bool) -> None:
        holder = self.fill()
        if holder is None:
            return

        async def use() -> None:
            async with pools.auto_manage(self.models[-1], timeout=SECONDS):
                await asyncio.sleep(0)

        async def main() -> None:
            task = asyncio.ensure_future(use())
            while not self.management.ledger.waiting():
                await asyncio.sleep(0)
            if wins:  # the grant and the cancellation meet
                await asyncio.to_thread(holder.let_go)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            if not wins:
                await asyncio.to_thread(holder.let_go)

        asyncio.run(main())

    @rule(indices=st.lists(INDEX, min_size=2, max_size=4), tasks=st.booleans())
    def together(self, indices: list[int], tasks: bool) -> None:
        errors: list[BaseException] = []

        def one(at: int) -> None:
            try:
                with pools.auto_manage(self.models[at], timeout=SECONDS):
                    self.check(at)
            except BaseException as error:
                errors.append(error)

        async def one_task(at: int) -> None:
            async with pools.auto_manage(self.models[at], timeout=SECONDS):
                await asyncio.sleep(0)
                self.check(at)

        async def main() -> None:
            await asyncio.gather(*(one_task(self.pick(i)) for i in indices))

        threads = [threading.Thread(target=one, args=(self.pick(i),)) for i in indices]
        for thread in threads:
            thread.start()
        if tasks:
            asyncio.run(main())
        for thread in threads:
            thread.join(2 * SECONDS)
            assert not thread.is_alive(), "hung"
        assert not errors, errors

    # --- what must hold ---------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost_or_left(self) -> None:
        management = self.management
        until(lambda: not management.drain())
        ledger, pool = management.ledger, management.pool("cpu")
        assert ledger.waiting() == ()
        until(lambda: not any(ledger.holders(unit) for unit in ledger.units(0)))
        assert ledger.pool(0).extra == 0
        assert pool.used <= pool.budget
        for at in range(len(self.models)):
            self.check(at)

    def teardown(self) -> None:
        for at, model in enumerate(self.models):
            pools.unmanage(model)
            self.check(at)
        assert self.management.pool("cpu").used == 0
        self.stack.close()


TestPools = PoolsMachine.TestCase
TestPools.settings = settings(
    max_examples=12,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

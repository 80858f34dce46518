"""Cutting a module into blocks: every tensor in one segment, every segment where it is used."""

from __future__ import annotations

import mmap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from opguard.pools import _blocks

PAGE = mmap.PAGESIZE
SIDE = 64  # a Linear(SIDE, SIDE, bias=False) is 4 pages


def linear() -> nn.Linear:
    return nn.Linear(SIDE, SIDE, bias=False)


class cut_module:
    """A cut and, as its segments, the storages of the tensors in each."""

    def __init__(self, module: nn.Module, chunk: int) -> None:
        self.cut, tensors = _blocks.cut_module(module, chunk)
        self.segments = [tuple(map(key, segment)) for segment in tensors]

    def __getattr__(self, name: str):
        return getattr(self.cut, name)


def names(cut) -> list[str]:
    return [block.name for block in cut.blocks]


def key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def keys(module: nn.Module) -> set[int]:
    return set(map(key, [*module.parameters(), *module.buffers()]))


def held(cut, name: str) -> set[int]:
    block = next(block for block in cut.blocks if block.name == name)
    return {key for segment in block.segments for key in cut.segments[segment]}


class Model(nn.Module):
    """Own tensors, a list without a forward, and a tail tied to the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(SIDE))
        self.register_buffer("mean", torch.zeros(3), persistent=False)
        self.layers = nn.ModuleList(nn.Sequential(linear(), linear()) for _ in range(3))
        self.layers.register_buffer("stray", torch.zeros(5))
        self.tail = linear()
        self.tail.weight = self.layers[0][0].weight

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.tail(x * self.scale + self.mean.sum())


def test_largest_subtrees_that_fit():
    model = Model()
    cut = cut_module(model, 8 * PAGE)
    assert names(cut) == ["", "layers.0", "layers.1", "layers.2", "tail"]
    cut = cut_module(model, 4 * PAGE)
    assert names(cut)[1:4] == ["layers.0", "layers.0.0", "layers.0.1"]
    assert names(cut_module(model, 1 << 20)) == [""]


def test_own_tensors_belong_to_the_module_itself():
    model = Model()
    cut = cut_module(model, 8 * PAGE)
    own = set(map(key, (model.scale, model.mean, model.layers.stray)))
    assert held(cut, "") == own  # what a module without a forward has is its parent's
    for block in cut.blocks[1:]:
        assert block.around == (0,)
        assert cut.bytes_held(block) == cut.bytes_of(block) + cut.bytes_of(cut.blocks[0])


def test_tied_tensors_have_a_segment_of_their_own():
    model = Model()
    cut = cut_module(model, 8 * PAGE)
    tied = key(model.tail.weight)
    assert tied in held(cut, "layers.0")
    assert held(cut, "tail") == {tied}
    assert [segment for segment in cut.segments if tied in segment] == [(tied,)]


class Views(nn.Module):
    """Two layers whose weights are given parts of one storage."""

    def __init__(self, first: torch.Tensor, second: torch.Tensor) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()
        self.a.weight.data, self.b.weight.data = first, second


def test_views_that_overlap_are_one_piece():
    both = torch.randn(2 * SIDE, SIDE)
    cut = cut_module(Views(both[:SIDE], both[SIDE // 2 :][:SIDE].T), 4 * PAGE)
    assert len(cut.segments) == 1
    assert cut.sizes == (6 * PAGE,)


def test_weights_that_lie_side_by_side_in_one_storage_are_pieces_of_their_own():
    both = torch.randn(40, SIDE, SIDE)
    cut = cut_module(Views(both[0], both[7].T), 4 * PAGE)
    assert names(cut) == ["", "a", "b"]
    assert cut.sizes == (4 * PAGE, 4 * PAGE)  # and what nobody looks at counts for nothing


def test_parameters_in_a_list_belong_to_who_runs_with_them():
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList(torch.randn(SIDE, SIDE) for _ in range(2))
            self.tail = linear()

        def forward(self, x):
            return self.tail(x @ self.weights[0] @ self.weights[1])

    model = Listed()
    cut = cut_module(model, 4 * PAGE)
    assert names(cut) == ["", "tail"]
    assert held(cut, "") == keys(model.weights)


def test_nothing_is_cut_into_no_blocks():
    cut = cut_module(nn.Sequential(nn.ReLU()), PAGE)
    assert (cut.blocks, cut.sizes, cut.segments) == ((), (), [])
    assert cut.largest() is None


def test_attention_is_one_block():
    attention = nn.MultiheadAttention(SIDE, 2)
    model = nn.Sequential(linear(), attention)
    cut = cut_module(model, PAGE)
    assert held(cut, "1") == keys(attention)  # out_proj's forward is never called
    encoder = nn.TransformerEncoderLayer(SIDE, 2, dim_feedforward=SIDE)
    assert names(cut_module(nn.Sequential(encoder), PAGE)) == ["", "0"]


def test_a_module_in_two_places_is_one_block():
    shared = linear()
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(linear(), shared))
    cut = cut_module(model, 4 * PAGE)
    assert names(cut) == ["", "0", "2", "2.0"]
    assert sum(cut.sizes) == 8 * PAGE


def test_what_needs_most_at_once():
    model = nn.Sequential(nn.Linear(SIDE, SIDE), nn.Linear(SIDE, 4 * SIDE))
    block = cut_module(model, PAGE).largest()
    assert (block.name, block.module()) == ("1", model[1])


@pytest.mark.filterwarnings("ignore")
def test_inner_tensors_of_subclasses():
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(SIDE, SIDE), nn.Linear(SIDE, SIDE))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    cut = cut_module(model, 2 * PAGE)
    assert names(cut) == ["", "0", "1"]
    assert all(SIDE * SIDE < size < 4 * SIDE * SIDE for size in cut.sizes)  # int8, not float


@st.composite
def trees(draw, depth: int = 3):
    pool = draw(st.shared(st.builds(list), key="tensors"))

    def tensor():
        if pool and draw(st.integers(0, 3)) == 0:
            return draw(st.sampled_from(pool))
        pool.append(nn.Parameter(torch.zeros(draw(st.integers(1, 3000)))))
        return pool[-1]

    kind = draw(st.sampled_from([nn.Module, nn.Sequential, nn.ModuleList]))
    module = kind()
    for number in range(draw(st.integers(0, 2))):
        module.register_parameter(f"w{number}", tensor())
    if depth:
        for number in range(draw(st.integers(0, 3))):
            module.add_module(str(number), draw(trees(depth=depth - 1)))
    return module


@settings(max_examples=60, deadline=None)
@given(module=trees(), chunk=st.integers(1, 60_000))
def test_every_tensor_is_in_one_segment_that_its_users_take(module, chunk):
    cut = cut_module(module, chunk)
    everywhere = [key for segment in cut.segments for key in segment]
    assert sorted(everywhere) == sorted(keys(module))  # once each
    assert len(cut.segments) == len(cut.sizes)
    assert all(size % PAGE == 0 for size in cut.sizes)
    taken = {segment for block in cut.blocks for segment in block.segments}
    assert taken == set(range(len(cut.segments)))
    by_module = {id(block.module()): block for block in cut.blocks}
    for block in cut.blocks:
        own = {t.untyped_storage()._cdata for t in block.module()._parameters.values()}
        assert own <= held(cut, block.name)
        for number in block.around:
            inside = {id(each) for each in cut.blocks[number].module().modules()}
            assert id(block.module()) in inside
    assert len(by_module) == len(cut.blocks)

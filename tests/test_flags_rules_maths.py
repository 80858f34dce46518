"""Layers and maths on tensors whose samples carry flags: who follows, who merges.

Each case names where the batch of its result is, and the oracle finds by poisoning single samples
whether each row has the flags of all that it depends on, and of nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opguard.flags import ErrorConfig, GuardedTensor, guard
from opinfo_oracle import CONFIG, Sample, Verdict, check, flags_for, locations

N = 4


def held(
    function: Callable[..., Any], *inputs: Tensor, dim: int = 0, exact: bool = True
) -> tuple[Any, Verdict]:
    """The result on inputs[0] with flags along ``dim``, and what the oracle says of it."""
    sample = Sample(lambda leaves: function(*leaves), list(inputs))
    sample.guarded[0] = (1, dim)
    grad = any(leaf.requires_grad for leaf in inputs)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = sample.flagged()
        return outputs, check(sample, outputs, sample.plain(), exact)


def layer(module: nn.Module, training: bool = False) -> nn.Module:
    return module.train(training)


def image(*shape: int) -> Tensor:
    return torch.randn(N, *shape)


FOLLOWS: dict[str, tuple[Callable[..., Any], Callable[[], Tensor], tuple[int, ...]]] = {
    "linear": (lambda x: F.linear(x, torch.ones(2, 3), torch.ones(2)), lambda: image(3), (0,)),
    "linear in 3-D": (lambda x: F.linear(x, torch.ones(2, 3)), lambda: image(5, 3), (0,)),
    "conv1d": (layer(nn.Conv1d(3, 5, 2)), lambda: image(3, 7), (0,)),
    "conv2d of 2 groups": (layer(nn.Conv2d(4, 6, 3, groups=2)), lambda: image(4, 6, 6), (0,)),
    "conv3d": (layer(nn.Conv3d(2, 3, 2)), lambda: image(2, 4, 4, 4), (0,)),
    "conv_transpose2d": (layer(nn.ConvTranspose2d(3, 2, 3, 2)), lambda: image(3, 4, 4), (0,)),
    "batch norm in eval": (layer(nn.BatchNorm2d(3)), lambda: image(3, 4, 4), (0,)),
    "instance norm": (layer(nn.InstanceNorm2d(3, affine=True)), lambda: image(3, 4, 4), (0,)),
    "layer norm": (layer(nn.LayerNorm((3, 4))), lambda: image(5, 3, 4), (0,)),
    "group norm": (layer(nn.GroupNorm(2, 4)), lambda: image(4, 5), (0,)),
    "rms norm": (layer(nn.RMSNorm(4)), lambda: image(3, 4), (0,)),
    "local response norm": (layer(nn.LocalResponseNorm(2)), lambda: image(4, 5), (0,)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), lambda: image(2, 4, 4), (0,)),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 2), lambda: image(2, 4), (0,)),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, 2), lambda: image(2, 4, 4, 4), (0,)),
    "adaptive pools": (
        lambda x: (F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 2)),
        lambda: image(2, 4, 4),
        (0,),
    ),
    "interpolate": (
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda: image(2, 3, 3),
        (0,),
    ),
    "grid_sample": (
        lambda x: F.grid_sample(x, torch.rand(N, 3, 3, 2), align_corners=False),
        lambda: image(2, 4, 4),
        (0,),
    ),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), lambda: image(4, 3, 3), (0,)),
    "unfold and fold": (
        lambda x: F.fold(F.unfold(x, 2), (4, 4), 2),
        lambda: image(2, 4, 4),
        (0,),
    ),
    "pads": (
        lambda x: F.pad(F.pad(x, (1, 1), mode="reflect"), (1, 2), mode="replicate"),
        lambda: image(2, 4),
        (0,),
    ),
    "gelu, softplus, dropout, glu": (
        lambda x: F.glu(F.dropout(F.softplus(F.gelu(x)), 0.5), -1),
        lambda: image(3, 4),
        (0,),
    ),
    "softmax over features": (lambda x: x.softmax(-1), lambda: image(3), (0,)),
    "attention": (
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        lambda: image(2, 5, 4),
        (0,),
    ),
    "bmm, einsum": (
        lambda x: torch.einsum("bij,bjk->bik", x @ x.mT, x),
        lambda: image(3, 2),
        (0,),
    ),
    "einsum that moves the batch": (
        lambda x: torch.einsum("bij,jk->kbi", x, torch.ones(2, 3)),
        lambda: image(3, 2),
        (1,),
    ),
    "lstm, batch first": (
        layer(nn.LSTM(3, 5, 2, batch_first=True)),
        lambda: image(6, 3),
        (0,),
    ),
    "fft over time": (lambda x: torch.fft.irfft(torch.fft.rfft(x)), lambda: image(2, 6), (0,)),
    "stft": (
        lambda x: torch.stft(x, 4, 2, window=torch.ones(4), return_complex=True),
        lambda: image(16),
        (0,),
    ),
    "complex and back": (
        lambda x: torch.view_as_real(torch.view_as_complex(x) * 1j),
        lambda: image(3, 2),
        (0,),
    ),
    "losses without reduction": (
        lambda x: (
            F.mse_loss(x, torch.ones(N, 3), reduction="none").sum(-1),
            F.cross_entropy(x, torch.arange(N) % 3, reduction="none"),
            F.binary_cross_entropy_with_logits(x, torch.ones(N, 3), reduction="none"),
            F.multi_margin_loss(x, torch.arange(N) % 3, reduction="none"),
        ),
        lambda: image(3),
        (0,),
    ),
    "nll_loss over pixels": (
        lambda x: F.nll_loss(x, torch.zeros(N, 2, 2, dtype=torch.long), reduction="none"),
        lambda: image(3, 2, 2),
        (0,),
    ),
    "cosine_similarity, normalize, cdist": (
        lambda x: torch.cdist(F.normalize(x, dim=-1), torch.ones(N, 2, 3)),
        lambda: image(5, 3),
        (0,),
    ),
    "bilinear": (
        lambda x: F.bilinear(x, torch.ones(N, 2), torch.ones(5, 3, 2)),
        lambda: image(3),
        (0,),
    ),
    "reductions over features": (
        lambda x: (x.sum((1, 2)), x.var(1), x.amax(-1), x.norm(dim=1), x.logsumexp(2)),
        lambda: image(3, 2),
        (0,),
    ),
}


@pytest.mark.parametrize("name", FOLLOWS)
def test_samples_follow(name: str):
    function, make, dims = FOLLOWS[name]
    outputs, verdict = held(function, make())
    assert not verdict.faults
    first = outputs if isinstance(outputs, GuardedTensor) else outputs[0]
    assert first.batch_dims == dims
    assert not verdict.loose


MERGES: dict[str, tuple[Callable[..., Any], Callable[[], Tensor]]] = {
    "batch norm in training": (layer(nn.BatchNorm1d(3), True), lambda: image(3)),
    "matmul over the batch": (lambda x: torch.ones(2, N) @ x, lambda: image(3)),
    "gram matrix": (lambda x: x @ x.t(), lambda: image(3)),
    "softmax over the batch": (lambda x: x.softmax(0), lambda: image(3)),
    "attention across samples": (
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
        lambda: image(3),
    ),
    "sum over the batch": (lambda x: x.sum(0), lambda: image(3)),
    "mean loss": (lambda x: F.mse_loss(x, torch.ones(N, 3)), lambda: image(3)),
    "cross entropy": (lambda x: F.cross_entropy(x, torch.arange(N) % 3), lambda: image(3)),
    "fft over the batch": (lambda x: torch.fft.fft(x, dim=0), lambda: image(3)),
    "pool over the batch": (lambda x: F.avg_pool1d(x.t(), N), lambda: image(3)),
    "inverse of the batch": (lambda x: torch.linalg.inv(x + 9 * torch.eye(N)), lambda: image(N)),
}


@pytest.mark.parametrize("name", MERGES)
def test_samples_merge(name: str):
    function, make = MERGES[name]
    outputs, verdict = held(function, make())
    assert not verdict.faults
    assert all(row == set(range(1, N + 1)) for row in locations(outputs.flags))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_networks_keep_the_batch_in_dimension_1(kind: Any, bidirectional: bool):
    network = kind(3, 5, 2, bidirectional=bidirectional)

    def run(x: Tensor) -> Any:
        state = (x[:1, :, :1] * 0).expand(4 if bidirectional else 2, -1, 5).contiguous()
        return network(x, (state, state) if kind is nn.LSTM else state)

    # With gradients: the way through cells, not oneDNN's.
    outputs, verdict = held(run, torch.randn(6, N, 3, requires_grad=True), dim=1)
    assert not verdict.faults
    assert not verdict.loose
    hidden = outputs[1][0] if kind is nn.LSTM else outputs[1]
    # Steps and layers that were stacked are rows of their own.
    assert outputs[0].batch_dims[-1] == hidden.batch_dims[-1] == 1


def test_lstm_without_a_state_follows_where_no_gradient_is_asked_for():
    network = nn.LSTM(3, 5, 2)
    outputs, verdict = held(network, torch.randn(6, N, 3), dim=1)
    assert not verdict.faults
    assert not verdict.loose
    assert outputs[0].batch_dims == (1,)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_recurrent_cells(cell: Any):
    """torch adds what was computed from x to what a plain state gave: it has to be guarded too."""
    network = cell(3, 5)

    def run(x: Tensor) -> Any:
        state = (x[:, :1] * 0).expand(-1, 5)
        return network(x, (state, state) if cell is nn.LSTMCell else state)

    _, verdict = held(run, image(3))
    assert not verdict.faults
    assert not verdict.loose
    with pytest.raises(NotImplementedError, match="has flags"):
        network(guard(image(3)))


def test_packed_sequences_know_whose_step_each_is():
    lengths = torch.tensor([5, 3, 3, 1])

    def packed(x: Tensor) -> Tensor:
        return nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True).data

    outputs, verdict = held(packed, image(5, 2))
    assert not verdict.faults
    steps = [1, 2, 3, 4, 1, 2, 3, 1, 2, 3, 1, 1]
    assert locations(outputs.flags) == [{step} for step in steps]


@pytest.mark.parametrize("fast", [True, False])
def test_transformer_encoder(fast: bool):
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train(not fast)
    encoder.dropout.p = encoder.dropout1.p = encoder.dropout2.p = encoder.self_attn.dropout = 0.0
    outputs, verdict = held(encoder, image(5, 8))
    assert not verdict.faults
    assert not verdict.loose
    assert outputs.batch_dims == (0,)


def test_multi_head_attention_with_its_weights():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    (output, weights), verdict = held(lambda x: attention(x, x, x), image(5, 8))
    assert not verdict.faults
    assert output.batch_dims == weights.batch_dims == (0,)


def test_embedding_carries_the_flags_of_ids():
    table = torch.randn(9, 3)
    ids = GuardedTensor(torch.tensor([[1, 2], [3, 3]]), flags_for(2, 1), CONFIG)
    output = F.embedding(ids, table)
    assert output.shape == (2, 2, 3)
    assert locations(output.flags) == [{1}, {2}]


def test_embedding_carries_the_flags_of_its_table():
    table = GuardedTensor(torch.randn(5, 3), flags_for(5, 1), CONFIG)
    output = F.embedding(torch.tensor([[4, 0], [2, 2]]), table)
    assert output.batch_dims == (0, 1)
    assert locations(output.flags) == [{5}, {1}, {3}, {3}]


def test_embedding_that_scales_its_table():
    module = nn.Embedding(9, 3, max_norm=1.0)
    output = module(GuardedTensor(torch.tensor([1, 2]), flags_for(2, 1), CONFIG))
    assert locations(output.flags) == [{1}, {2}]
    assert type(module.weight) is nn.Parameter


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_ids(mode: str):
    table = torch.randn(9, 3)
    two = GuardedTensor(torch.tensor([[1, 2], [3, 4], [5, 6]]), flags_for(3, 1), CONFIG)
    assert locations(F.embedding_bag(two, table, mode=mode).flags) == [{1}, {2}, {3}]
    flat = GuardedTensor(torch.arange(5), flags_for(5, 1), CONFIG)
    bags = F.embedding_bag(flat, table, torch.tensor([0, 3, 3]), mode=mode)
    assert locations(bags.flags) == [{1, 2, 3}, set(), {4, 5}]


def test_ctc_has_its_batch_in_dimension_1():
    targets = torch.randint(1, 5, (N, 3))
    lengths = torch.full((N,), 8), torch.full((N,), 3)

    def loss(x: Tensor) -> Tensor:
        return F.ctc_loss(x.log_softmax(-1), targets, *lengths, reduction="none")

    outputs, verdict = held(loss, torch.randn(8, N, 5), dim=1)
    assert not verdict.faults
    assert not verdict.loose
    assert outputs.batch_dims == (0,)


def test_kernel_of_one_leaves_space_alone():
    """A batch that lies in space stays exact through a convolution by 1."""
    conv = nn.Conv1d(3, 2, 1)
    outputs, verdict = held(conv, torch.randn(2, 3, N), dim=2)
    assert not verdict.faults
    assert outputs.batch_dims == (2,)
    assert not verdict.loose


def test_pads_repeat_rows_of_a_padded_batch():
    outputs, verdict = held(lambda x: F.pad(x, (2, 1), mode="reflect"), torch.randn(2, 3, N), dim=2)
    assert not verdict.faults
    assert locations(outputs.flags) == [{3}, {2}, {1}, {2}, {3}, {4}, {3}]


def test_distances_of_pairs_have_both_flags():
    outputs, verdict = held(F.pdist, image(3))
    assert not verdict.faults
    assert locations(outputs.flags) == [{1, 2}, {1, 3}, {1, 4}, {2, 3}, {2, 4}, {3, 4}]


def test_batched_linear_algebra():
    matrices = torch.randn(N, 3, 3) + 5 * torch.eye(3)
    vectors = torch.randn(N, 3)

    def solved(x: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.linalg.solve(x, vectors),
            torch.linalg.solve(x, torch.ones(3, 2)),
            torch.linalg.det(x),
            torch.linalg.inv(x),
            torch.linalg.eigvals(x).abs().sum(-1),
            torch.linalg.cross(x, x.roll(1, -1)),
            torch.linalg.matrix_exp(x * 0.1),
        )

    sample = Sample(lambda leaves: solved(leaves[0]), [matrices], lapack=True)
    sample.guarded[0] = (1, 0)
    outputs = sample.flagged()
    verdict = check(sample, outputs, sample.plain(), exact=False)
    assert not verdict.faults
    assert not verdict.loose
    assert all(output.batch_dims == (0,) for output in outputs)


def test_training_of_batch_norm_leaves_its_statistics_plain():
    norm = nn.BatchNorm1d(3)
    norm(guard(image(3)))
    assert type(norm.running_mean) is Tensor
    assert not torch.equal(norm.running_mean, torch.zeros(3))


def test_inference_mode_and_out_variants():
    x = GuardedTensor(image(3), flags_for(N, 1), CONFIG)
    with torch.inference_mode():
        y = F.layer_norm(F.linear(x, torch.ones(3, 3)), (3,))
    assert locations(y.flags) == [{1}, {2}, {3}, {4}]
    target = guard(torch.empty(N, 3), ErrorConfig(num_slots=64))
    torch.add(x, 1, out=target)
    assert locations(target.flags) == [{1}, {2}, {3}, {4}]


def test_layers_compiled_in_one_graph():
    network = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), nn.GELU(), nn.Flatten(), nn.Linear(20, 3)
    ).eval()
    run = torch.compile(lambda g: network(g).log_softmax(-1), backend="aot_eager", fullgraph=True)
    x = image(2, 5)
    with torch.no_grad():
        output = run(GuardedTensor(x, flags_for(N, 1), CONFIG))
        assert torch.equal(output.unwrap(), network(x).log_softmax(-1))
    assert locations(output.flags) == [{1}, {2}, {3}, {4}]


def test_gather_takes_an_empty_index_as_torch_does():
    x = GuardedTensor(image(3), flags_for(N, 1), CONFIG)
    assert torch.gather(x, 0, torch.tensor([], dtype=torch.uint8)).shape == (0,)
    assert torch.gather(x, 0, torch.empty(0, 3, dtype=torch.int64)).flags.shape[0] in (0, 1)


def test_conjugates_are_what_they_are_of_plain_tensors():
    """Several transforms are followed by a conjugate, which torch makes without touching memory."""
    x = image(5, 6)
    assert torch.equal(torch.fft.hfftn(guard(x)).unwrap(), torch.fft.hfftn(x))
    z = torch.randn(N, 3, dtype=torch.complex64)
    assert torch.equal(torch.view_as_real(guard(z).conj().resolve_conj()).unwrap()[..., 1], -z.imag)


@pytest.mark.parametrize("samples", [3, 5, 7])
def test_layers_compiled_with_symbolic_sizes(samples: int):
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(4),
    ).eval()
    run = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        output = run(GuardedTensor(torch.randn(samples, 2, 5, 5), flags_for(samples, 1), CONFIG))
    assert locations(output.flags) == [{at + 1} for at in range(samples)]

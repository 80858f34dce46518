"""model_guard: chosen, loaded, called and freed in one block, as its documentation says."""

import socket
import weakref

import pytest
import torch

from opguard.guards import freeing
from opguard.guards.freeing import model_guard
from opguard.guards.locality import LocalFileMissing

CPU = torch.device("cpu")


class Net(torch.nn.Module):
    def __init__(self, size=4):
        super().__init__()
        self.linear = torch.nn.Linear(size, size)
        self.drop = torch.nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.linear(x))


@pytest.fixture
def collected(monkeypatch):
    """The list of garbage collections that freeing asked for."""
    calls = []
    monkeypatch.setattr(freeing.gc, "collect", lambda: calls.append("collect"))
    return calls


def test_model_guard_needs_no_argument():
    with model_guard() as g:
        out = g(Net(), torch.ones(2, 4))
        assert g.model is None
    assert out.shape == (2, 4)
    assert not out.requires_grad


def test_model_guard_as_documented(bert_folder):
    """Fault C7: the four dicts, local_files_only among them, and a transformers loader."""
    transformers = pytest.importorskip("transformers")
    x = torch.tensor([[1, 2, 3]])
    with model_guard(
        init_guard_kwargs={
            "model_id": str(bert_folder),
            "model_type": transformers.BertModel,
            "device": "cpu",
            "dtype": "bf16",
            "local_files_only": True,
        },
        load_guard_kwargs={"loader_fn": transformers.BertModel.from_pretrained},
        call_guard_kwargs={"need_grads": False},
        free_guard_kwargs={"run_gc_and_clear_cache": True},
    ) as g:
        ref = weakref.ref(g.model)
        out = g(x)
        assert g.values.dtype is g.model.dtype is torch.bfloat16
        direct = g(g.model.get_input_embeddings(), x)
    assert type(out).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions"
    assert out.last_hidden_state.shape == direct.shape == (1, 3, 8)
    assert g.model is None
    assert ref() is None
    with pytest.raises(RuntimeError, match="it has been left"):
        g(x)


def test_model_guard_passes_what_a_loader_names():
    seen = {}

    def loader(model_id, device, dtype, size=4):
        seen.update(model_id=model_id, device=device, dtype=dtype)
        return Net(size).to(device, dtype)

    with model_guard(
        init_guard_kwargs={"model_id": "m", "dtype": "fp64", "device": "cpu"},
        load_guard_kwargs={"loader_fn": loader, "loader_kwargs": {"size": 2}},
    ) as g:
        assert g(torch.ones(1, 2, dtype=torch.float64)).dtype is torch.float64
    assert seen == {"model_id": "m", "device": CPU, "dtype": torch.float64}


@pytest.mark.parametrize("where", ["init", "load", "body"])
def test_model_guard_shows_the_real_error_and_frees(where, collected):
    """Fault A12: a failure in any step is what the user sees, and cleanup has run."""
    refs = []

    def loader():
        model = Net()
        refs.append(weakref.ref(model))
        if where == "load":
            raise LookupError("load")
        return model

    init = {"device_map": "nowhere"} if where == "init" else {"device": "cpu"}
    expected = {"init": ValueError, "load": LookupError, "body": LookupError}[where]
    held = None
    try:
        with model_guard(init_guard_kwargs=init, load_guard_kwargs={"loader_fn": loader}) as g:
            g(torch.ones(1, 4))
            raise LookupError("body")
    except Exception as caught:
        held = caught
    assert type(held) is expected
    assert not any(ref() for ref in refs)
    if where != "init":
        assert collected


def test_model_guard_opens_no_socket_under_local_files_only(monkeypatch):
    transformers = pytest.importorskip("transformers")
    tried = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: tried.append(a))
    guard = model_guard(
        init_guard_kwargs={
            "model_id": "nobody/nothing",
            "model_type": transformers.BertModel,
            "device": "cpu",
            "dtype": "bf16",
        },
        load_guard_kwargs={"local_files_only": True},
    )
    with pytest.raises(LocalFileMissing, match="hf download nobody/nothing"):
        guard.__enter__()
    assert tried == []


def _locals_of_last(error):
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return dict(trace.tb_frame.f_locals)


@pytest.mark.parametrize("step", ["load_guard_kwargs", "call_guard_kwargs"])
def test_model_guard_keeps_the_frames_its_guards_were_told_to_keep(step):
    def fail(secret):
        raise LookupError

    kwargs = {
        "load_guard_kwargs": {"loader_fn": Net},
        "call_guard_kwargs": {},
    }
    kwargs[step] |= {"sanitize_all_exceptions": False}
    where = {"load_guard_kwargs": "load", "call_guard_kwargs": "body"}[step]
    if where == "load":
        kwargs[step]["loader_fn"] = lambda: fail("seen")
    with pytest.raises(LookupError) as caught, model_guard(**kwargs):
        fail("seen")
    assert _locals_of_last(caught.value) == {"secret": "seen"}


@pytest.mark.parametrize("keep", [LookupError, (LookupError,)])
def test_model_guard_keeps_the_payload_it_was_told_to_keep(keep):
    payload = torch.ones(2)
    with pytest.raises(LookupError) as caught, model_guard(call_guard_kwargs={"keep": keep}):
        raise LookupError(payload)
    assert caught.value.args[0] is payload

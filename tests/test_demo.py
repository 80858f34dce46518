"""The demo: a real model, offline, equal to plain transformers, with nothing left behind."""

import contextlib
import socket
import sys
import weakref

import pytest
import torch

from opguard import demo, local_guard

for package in demo.NEEDED:
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def embedder():
    with local_guard():
        instance = demo.make_embedder()(
            device_override="cpu", local_files_only=True, keep_warm=True
        )
    yield instance
    instance.free()


@pytest.fixture
def sockets(monkeypatch):
    """The addresses any socket of this process was asked to reach."""
    asked = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: asked.append(a) or [])
    return asked


def plain_transformers(sentences):
    """The model card's own recipe, with transformers and torch alone."""
    from transformers import AutoModel, AutoTokenizer

    folder = demo.model_folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    tokens = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(**tokens)[0]
    mask = tokens["attention_mask"].unsqueeze(-1).expand(states.size()).float()
    pooled = torch.sum(states * mask, 1) / torch.clamp(mask.sum(1), min=1e-9)
    return torch.nn.functional.normalize(pooled, p=2, dim=1)


def test_equal_to_plain_transformers(embedder):
    ours = embedder(input_raw=list(demo.SENTENCES))
    theirs = plain_transformers(list(demo.SENTENCES))
    assert ours.shape == (len(demo.SENTENCES), 384)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


def test_like_sentences_are_alike(embedder):
    vectors = embedder(input_raw=list(demo.SENTENCES))
    similarity = vectors @ vectors.T
    assert [int(row.topk(2).indices[1]) for row in similarity] == [1, 0, 3, 2, 5, 4]


def test_the_answer_is_an_ordinary_cpu_tensor(embedder):
    vectors = embedder(input_raw=["one"])
    assert not vectors.requires_grad
    assert not vectors.is_inference()
    assert vectors.device.type == "cpu"


def test_a_failure_inside_leaves_nothing_and_tells_where(embedder, collected):
    error, seen = demo.provoke_failure(embedder)
    assert len(seen) == 2
    assert [reference() for reference in seen] == [None, None]
    names = []
    traceback = error.__traceback__
    while traceback is not None:
        names.append((traceback.tb_frame.f_code.co_filename, traceback.tb_frame.f_code.co_name))
        traceback = traceback.tb_next
    assert names[-1] == (demo.__file__, "fail")
    assert "attention: " in error.__notes__[0]


def test_the_whole_demo_offline(capsys, sockets):
    assert demo.main(device="cpu") == 0
    out = capsys.readouterr().out
    for wanted in ("cosine similarity", "0 are alive", "in fail", "before", "the model", "freed"):
        assert wanted in out
    assert sockets == []


def test_the_model_is_freed_without_the_collector(collected):
    with contextlib.ExitStack() as stack, local_guard():
        instance = stack.enter_context(demo.make_embedder()(device_override="cpu"))
        model = weakref.ref(instance.detector)
    assert model() is None


@pytest.mark.parametrize("missing", demo.NEEDED)
def test_without_the_extra_one_sentence_says_how_to_get_it(monkeypatch, capsys, missing):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else 1)
    assert demo.main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert missing in error
    assert "'.[demo]'" in error


def test_sentence_transformers_is_not_imported(embedder):
    assert embedder.is_loaded
    loaded_by_us = [name for name in sys.modules if name.startswith("sentence_transformers")]
    assert loaded_by_us == []

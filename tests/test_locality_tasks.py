"""Strict locality of each task class: a local load and a call open nothing, at every dtype.

Each audit is a fresh process with a process-wide hook on all that Python does with sockets.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import opguard
import tiny_diffusion
import tiny_models
from opguard.tasks import controlnets, inversion, nlp, sd, vae

pytest.importorskip("transformers")
pytest.importorskip("diffusers")
constants = pytest.importorskip("huggingface_hub.constants")

AUDIT = Path(__file__).parent / "isolated" / "audit_locality.py"
LANGUAGE = ["captioning", "captioning2", "embedding", "generation"]
PICTURES = [
    "vae-tiny", "vae-kl", "sd", "sd-swapped", "controlnet", "controlled", "canny",
    "inversion-latent", "inversion-ddim",
]  # fmt: skip
DTYPES = ["fp32", "fp16", "bf16"]
QUANTIZED = ["i8", "fp4", "nf4"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for kind in ("blip", "blip2", "bert", "llama"):
        getattr(tiny_models, f"build_{kind}")(root / kind)
    tiny_diffusion.build_autoencoder_tiny(root / "vae")
    tiny_diffusion.build_autoencoder_kl(root / "kl")
    tiny_diffusion.build_stable_diffusion(root / "sd")
    tiny_diffusion.build_controlnet(root / "controlnet")
    return root


def audit(models, tmp_path, *pairs):
    """Each pair: cases, and the settings that every one of them is run with."""
    env = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    env |= {"OPGUARD_EXPORTS": str(tmp_path / "exports"), "HF_HOME": str(tmp_path / "hub")}
    (tmp_path / "exports").mkdir()
    done = subprocess.run(
        [sys.executable, str(AUDIT), str(models), *(",".join(o) for pair in pairs for o in pair)],
        env=env,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_audit_sees_what_is_opened(models, tmp_path):
    found = audit(models, tmp_path, (["leak"], ["fp32"]))
    events = {each["event"] for each in found["seen"]}
    wanted = {"socket.__new__", "socket.bind", "socket.sendto", "socket.getaddrinfo"}
    assert wanted <= events
    assert all(each["in"] == "leak fp32" for each in found["seen"])


@pytest.mark.slow
@pytest.mark.parametrize("cases", [LANGUAGE, PICTURES], ids=["language", "pictures"])
def test_a_local_load_and_a_call_open_nothing(models, tmp_path, cases):
    """All settings in one process: most of its time goes into imports."""
    # The edge detector has no weights, so none to quantize: it refuses.
    quantized = [case for case in cases if case != "canny"]
    found = audit(models, tmp_path, (cases, DTYPES), (quantized, QUANTIZED))
    failed = {name: how for name, how in found["ran"].items() if how != "ran"}
    assert not failed
    assert len(found["ran"]) == len(cases) * len(DTYPES) + len(quantized) * len(QUANTIZED)
    assert found["seen"] == []
    assert all(found["exports"])  # the second load of each had one to come from


# (class, folder of its model, what a load cannot do without)
NEEDS = [
    (nlp.Blip1, "blip", ["config.json", "model.safetensors", "processor_config.json"]),
    (nlp.Blip2, "blip2", ["config.json", "model.safetensors"]),
    (nlp.Embedding, "bert", ["config.json", "model.safetensors"]),
    (nlp.TextGeneration, "llama", ["config.json", "model.safetensors"]),
    (vae.AutoencoderTinyBase, "vae", ["config.json", "diffusion_pytorch_model.safetensors"]),
    (vae.AutoencoderKLBase, "kl", ["config.json", "diffusion_pytorch_model.safetensors"]),
    (
        sd.StableDiffusionBase,
        "sd",
        ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
         "text_encoder/model.safetensors", "scheduler/scheduler_config.json"],
    ),
    (
        controlnets.ControlnetBase,
        "controlnet",
        ["config.json", "diffusion_pytorch_model.safetensors"],
    ),
    (controlnets.ControlledStableDiffusionBase, "sd", ["model_index.json"]),
    (
        inversion.LatentInversionTinyBase,
        "vae",
        ["config.json", "diffusion_pytorch_model.safetensors"],
    ),
    (inversion.DdimInversionBase, "sd", ["model_index.json", "vae/config.json"]),
]  # fmt: skip
IDS = [owner.__name__ for owner, _, _ in NEEDS]


def load(owner, where, monkeypatch, tmp_path, *, local=True, **attributes):
    monkeypatch.setenv("OPGUARD_EXPORTS", str(tmp_path / "exports"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    kind = type(owner.__name__, (owner,), {"MODEL_ID": where, "NAME": "missing"} | attributes)
    with kind(device_override="cpu", dtype_override="fp32", local_files_only=local):
        pass


@pytest.mark.parametrize(
    ("owner", "folder", "file"),
    [(owner, folder, file) for owner, folder, files in NEEDS for file in files],
)
def test_a_missing_file_is_one_sentence_with_the_command(  # noqa: PLR0917
    owner, folder, file, models, monkeypatch, tmp_path
):
    shutil.copytree(models / folder, tmp_path / folder)
    (tmp_path / folder / file).unlink()
    with pytest.raises(opguard.LocalFileMissing) as caught:
        load(owner, tmp_path / folder, monkeypatch, tmp_path, REVISION=None)
    said = str(caught.value)
    assert "\n" not in said
    assert str(tmp_path / folder) in said
    assert "hf download" in said


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
@pytest.mark.parametrize(("owner", "folder", "files"), NEEDS, ids=IDS)
def test_an_absent_model_is_one_sentence_with_the_command(
    owner, folder, files, monkeypatch, tmp_path
):
    with pytest.raises(opguard.LocalFileMissing) as caught:
        load(owner, "nobody/nothing", monkeypatch, tmp_path, REVISION="main")
    said = str(caught.value)
    assert "\n" not in said
    assert "hf download nobody/nothing" in said
    assert "on this machine" in said


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
@pytest.mark.parametrize(("owner", "folder", "files"), NEEDS, ids=IDS)
def test_an_absent_model_is_the_same_sentence_where_the_user_turned_the_hub_off(
    owner, folder, files, monkeypatch, tmp_path
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(opguard.LocalFileMissing) as caught:
        load(owner, "nobody/nothing", monkeypatch, tmp_path, local=False, REVISION="main")
    said = str(caught.value)
    assert "\n" not in said
    assert "hf download nobody/nothing" in said
    if said.startswith("local_guard"):  # the language tasks ask for a file before they load
        assert said.endswith("; unset HF_HUB_OFFLINE for that")


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
@pytest.mark.parametrize(
    ("owner", "folder", "file"),
    [(owner, folder, file) for owner, folder, files in NEEDS for file in files],
)
def test_a_file_the_cache_lacks_is_the_same_sentence(  # noqa: PLR0917
    owner, folder, file, models, monkeypatch, tmp_path
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "hub" / "models--nobody--nothing"
    shutil.copytree(models / folder, repo / "snapshots" / ("a" * 40))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    (repo / "snapshots" / ("a" * 40) / file).unlink()
    with pytest.raises(opguard.LocalFileMissing) as caught:
        load(owner, "nobody/nothing", monkeypatch, tmp_path, local=False, REVISION="main")
    said = str(caught.value)
    assert "\n" not in said
    assert "hf download nobody/nothing" in said


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize(
    ("owner", "folder", "weights"),
    [
        (nlp.Embedding, "bert", "pytorch_model.bin"),
        (vae.AutoencoderTinyBase, "vae", "diffusion_pytorch_model.bin"),
    ],
)
def test_weights_of_another_format_are_no_missing_file(  # noqa: PLR0917
    owner, folder, weights, models, monkeypatch, tmp_path, local
):
    shutil.copytree(models / folder, tmp_path / folder)
    for file in (tmp_path / folder).glob("*.safetensors"):
        file.rename(tmp_path / folder / weights)
    with pytest.raises(opguard.LocalFileMissing, match="set USE_SAFETENSORS = False") as caught:
        load(owner, tmp_path / folder, monkeypatch, tmp_path, local=local, REVISION=None)
    assert f"found {weights}" in str(caught.value)

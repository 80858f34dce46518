"""opguard.tasks.vae over tiny autoencoders: there, back, and both, one picture or several."""

import subprocess
import sys
import weakref

import pytest
import torch

from opguard.tasks import vae
from tiny_diffusion import SIZE, build_autoencoder_kl, build_autoencoder_tiny, picture

pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")

    class Tiny(vae.AutoencoderTinyBase):
        NAME = "tiny-vae"
        MODEL_ID = build_autoencoder_tiny(root / "tiny")
        SCALE_FACTOR = 2

    class KL(vae.AutoencoderKLBase):
        NAME = "tiny-kl"
        MODEL_ID = build_autoencoder_kl(root / "kl")
        SCALE_FACTOR = 2

    return {"tiny": Tiny, "kl": KL}


@pytest.fixture(params=["tiny", "kl"])
def kind(request, classes):
    return classes[request.param]


@pytest.fixture
def opened(kind):
    with kind(device_override="cpu") as made:
        yield made


def tensor_of(images):
    images = images if isinstance(images, list) else [images]
    rows = [torch.frombuffer(bytearray(each.tobytes()), dtype=torch.uint8) for each in images]
    return torch.stack(rows).float()


def test_one_in_one_out(opened):
    latent = opened(input_raw=picture(), mode="encode")
    assert latent.shape == (4, SIZE // 2, SIZE // 2)
    assert not latent.requires_grad
    again = opened(input_raw=latent, mode="decode")
    assert isinstance(again, Image.Image)
    assert again.size == (SIZE, SIZE)
    assert again.tobytes() == opened(input_raw=picture(), mode="encode-decode").tobytes()


def test_several_in_several_out(opened):
    pictures = [picture(seed=seed) for seed in range(3)]
    latents = opened(input_raw=pictures, mode="encode")
    assert latents.shape == (3, 4, SIZE // 2, SIZE // 2)
    for one, among in zip(pictures, latents, strict=True):
        torch.testing.assert_close(opened(input_raw=one, mode="encode"), among)
    decoded = opened(input_raw=latents, mode="decode")
    both = opened(input_raw=pictures, mode="encode-decode")
    assert [each.size for each in decoded] == [(SIZE, SIZE)] * 3
    assert (tensor_of(decoded) - tensor_of(both)).abs().max() <= 1


def test_it_is_what_the_model_itself_computes(opened):
    model, config = opened.detector, opened.detector.config
    pixels = tensor_of(picture()).reshape(1, SIZE, SIZE, 3).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        found = model.encode(pixels)
        raw = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        back = model.decode(raw).sample
    latent = opened(input_raw=picture(), mode="encode")
    torch.testing.assert_close(latent, raw[0] * config.scaling_factor, rtol=1e-4, atol=1e-5)
    shown = tensor_of(opened(input_raw=latent, mode="decode")).reshape(SIZE, SIZE, 3)
    expected = ((back[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255)
    assert (shown - expected).abs().max() <= 1


def test_a_tensor_is_a_picture_too(opened):
    pixels = tensor_of(picture()).reshape(SIZE, SIZE, 3).permute(2, 0, 1) / 255
    expected = opened(input_raw=picture(), mode="encode")
    torch.testing.assert_close(opened(input_raw=pixels, mode="encode"), expected)
    torch.testing.assert_close(opened(input_raw=pixels[None], mode="encode"), expected[None])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_any_kind_of_picture(opened, mode):
    assert opened(input_raw=picture().convert(mode), mode="encode").shape[0] == 4


def test_sides_that_do_not_fit_are_resized(opened):
    assert opened(input_raw=picture(33), mode="encode").shape == (4, 16, 16)


def test_a_seed_draws_from_the_distribution(classes):
    with classes["kl"](device_override="cpu") as kl:
        mode, again = (kl(input_raw=picture(), mode="encode") for _ in range(2))
        one, same, other = (kl(input_raw=picture(), mode="encode", seed=s) for s in (1, 1, 2))
    assert torch.equal(mode, again)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, mode)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(kind, dtype):
    with (
        kind(device_override="cpu") as full,
        kind(device_override="cpu", dtype_override=dtype) as m,
    ):
        assert m.detector.dtype == m.dtype == DTYPES[dtype]
        latent = m(input_raw=picture(), mode="encode")
        expected = full(input_raw=picture(), mode="encode")
        shown = tensor_of(m(input_raw=latent, mode="decode"))
        wanted = tensor_of(full(input_raw=expected, mode="decode"))
    assert torch.cosine_similarity(latent.flatten().float(), expected.flatten(), dim=0) > 0.99
    assert (shown - wanted).abs().mean() < 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_export_gives_the_same(kind, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("OPGUARD_EXPORTS", str(tmp_path))
    settings = {"device_override": "cpu", "dtype_override": dtype}
    made = kind(force_export_refresh=True, **settings)(input_raw=picture(), mode="encode")
    assert list(tmp_path.glob("*/*.safetensors"))
    read = kind(only_load_export=True, **settings)(input_raw=picture(), mode="encode")
    assert torch.equal(made, read)


@pytest.mark.parametrize("mode", [None, "encode_decode"])
def test_the_mode_is_required(opened, mode):
    given = {} if mode is None else {"mode": mode}
    with pytest.raises(ValueError, match=r"expected mode= one of encode, decode, encode-decode"):
        opened(input_raw=picture(), **given)


def test_wrong_inputs_are_one_sentence(opened):
    with pytest.raises(ValueError, match=r"expected input_raw= a latent tensor .* got Image"):
        opened(input_raw=picture(), mode="decode")
    with pytest.raises(ValueError, match="expected pictures of one size"):
        opened(input_raw=[picture(), picture(16)], mode="encode")
    with pytest.raises(ValueError, match="expected pictures of one size, got none"):
        opened(input_raw=[], mode="encode")
    with pytest.raises(TypeError, match=r"did you mean 'mode'"):
        opened(input_raw=picture(), modes="encode")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.full((3, 8, 8), 200, dtype=torch.uint8), r"as floats in \[0, 1\], got .*uint8"),
        (torch.full((3, 8, 8), 200.0), r"in \[0, 1\], got 200 to 200; divide bytes by 255"),
        (torch.full((3, 8, 8), -0.5), r"got -0\.5 to -0\.5; .*shift what is in \[-1, 1\]"),
        (torch.full((3, 8, 8), torch.nan), "got nan to nan"),
        (torch.zeros(8, 8), r"of shape \(3, height, width\) .*got \(8, 8\)"),
        (torch.zeros(4, 8, 8), r"got \(4, 8, 8\)"),
        (torch.zeros(1, 32, 32), r"got \(1, 32, 32\)"),
        (torch.zeros(32, 32, 3), r"got \(32, 32, 3\)"),
        (torch.zeros(0, 3, 32, 32), r"got \(0, 3, 32, 32\)"),
        (torch.zeros(3, 1, 8), "pictures of 2 pixels a side at least, got 8 x 1; enlarge"),
        (picture(1), "pictures of 2 pixels a side at least, got 1 x 1"),
        (torch.stack([torch.zeros(3, 8, 8), torch.full((3, 8, 8), torch.inf)]), "in picture 1;"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)], "got Tensor as number 0; stack tensors"),
        ([picture(), 3], "input_raw= PIL pictures .*got int as number 1"),
        (picture().__array_interface__, "expected input_raw= PIL pictures .*got dict"),
        (None, "expected input_raw= PIL pictures .*got NoneType"),
    ],
)
def test_what_is_no_picture_is_refused(opened, given, words):
    """Bytes taken for pixels in [0, 1] would be encoded without a word."""
    with pytest.raises(ValueError, match=words) as caught:
        opened(input_raw=given, mode="encode")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.zeros(3, 4, 4), r"of shape \(4, height, width\) .*got \(3, 4, 4\)"),
        (torch.zeros(4, 0, 4), r"got \(4, 0, 4\)"),
        (torch.zeros(0, 4, 4, 4), r"got \(0, 4, 4, 4\)"),
        (torch.zeros(4, 4), r"got \(4, 4\)"),
        (torch.zeros(4, 4, 4, dtype=torch.int64), "tensor of floats, .*of torch.int64"),
        (torch.full((4, 4, 4), torch.nan), "finite numbers, got NaN or infinity in latent 0"),
        (torch.tensor([0.0, torch.inf]).reshape(2, 1, 1, 1).expand(2, 4, 4, 4), "in latent 1;"),
    ],
)
def test_what_is_no_latent_is_refused(opened, given, words):
    with pytest.raises(ValueError, match=words) as caught:
        opened(input_raw=given, mode="decode")
    assert "expected input_raw= " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_answer_that_is_not_finite_is_said(opened, caplog, value):
    """Of a list, which; without numpy's own noise, which would be an error here."""
    latents = opened(input_raw=[picture(seed=seed) for seed in range(3)], mode="encode")
    sound = [each.tobytes() for each in opened(input_raw=latents, mode="decode")]
    decode = type(opened)._decode

    class Broken(type(opened)):
        NAME = f"{opened.NAME}-broken"

        def _decode(self, values):
            found = decode(self, values)
            found[1, :, 0, 0] = value
            return found

    assert not [each for each in caplog.records if each.name == "opguard"]
    with Broken(device_override="cpu") as broken:
        made = broken(input_raw=latents, mode="decode")
    assert [each.tobytes() for each in made][::2] == sound[::2]
    (said,) = (each.getMessage() for each in caplog.records if each.name == "opguard")
    assert "Broken: 1 of 3 pictures came out broken" in said
    assert "picture 1;" in said


def test_nothing_stays_after_it_is_freed(kind, collected):
    with kind(device_override="cpu") as made:
        model = weakref.ref(made.detector)
        kept = made(input_raw=picture(), mode="encode")
    assert model() is None
    assert kept.shape[0] == 4


def test_the_examples_run(opened):
    assert opened(**opened.example_inputs()).size == (256, 256)


@pytest.mark.parametrize("name", ["VaeTinyForSd", "VaeTinyForSdxl", "VaeSdxlFp16Fix"])
def test_the_ready_made_say_where_they_come_from(name):
    ready = getattr(vae, name)
    assert ready.MODEL_ID.count("/") == 1
    assert ready.REVISION == "main"
    assert ready.DETECTOR_TYPE.__name__.startswith("Autoencoder")


def test_importing_it_imports_no_library(checkout):
    code = "import sys, opguard.tasks.vae; print({'diffusers', 'PIL'} & {*sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=checkout
    )
    assert run.stdout.strip() == "set()"

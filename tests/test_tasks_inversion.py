"""opguard.tasks.inversion: latents found by gradients, noise found by solving DDIM's steps."""

import weakref

import pytest
import torch

from opguard.tasks import inversion, vae
from tiny_diffusion import (
    PROMPT,
    SIZE,
    build_autoencoder_kl,
    build_autoencoder_tiny,
    build_stable_diffusion,
    picture,
)

diffusers = pytest.importorskip("diffusers")
numpy = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

CPU = {"device_override": "cpu"}
LATENT = (4, SIZE // 2, SIZE // 2)


class Tiny(inversion.LatentInversionTinyBase):
    NAME = "tiny-latent-inversion"
    MODEL_ID = "."
    SCALE_FACTOR = 2


class KL(inversion.LatentInversionKLBase):
    NAME = "kl-latent-inversion"
    MODEL_ID = "."
    SCALE_FACTOR = 2


class Encoder(vae.AutoencoderTinyBase):
    NAME = "tiny-vae"
    MODEL_ID = "."
    SCALE_FACTOR = 2


class Invert(inversion.DdimInversionBase):
    NAME = "tiny-ddim-inversion"
    MODEL_ID = "."
    NUM_INFERENCE_STEPS = 8


class Reconstruct(inversion.DdimBase):
    NAME = "tiny-ddim-reconstruction"
    MODEL_ID = "."
    NUM_INFERENCE_STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    Tiny.MODEL_ID = Encoder.MODEL_ID = build_autoencoder_tiny(root / "tiny")
    KL.MODEL_ID = build_autoencoder_kl(root / "kl")
    Invert.MODEL_ID = Reconstruct.MODEL_ID = build_stable_diffusion(root / "sd")
    # A trained unet tells nearly the same for latents that are nearly the same; so does a random
    # one that is toned down.
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(root / "sd")
    with torch.no_grad():
        pipeline.unet.conv_out.weight *= 0.2
        pipeline.unet.conv_out.bias *= 0.2
    pipeline.save_pretrained(root / "sd")
    return root


def values(given):
    return numpy.asarray(given).astype(float)


# --- by gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Tiny, KL])
def test_the_latent_found_decodes_to_something_nearer(kind):
    with kind(**CPU) as invert:
        found = invert(input_raw=picture(), steps=20, learning_rate=0.2)
    assert found.latents.shape == LATENT
    assert found.picture.size == (SIZE, SIZE)
    assert found.losses.shape == (21,)
    assert found.losses.min() < 0.8 * found.losses[0]
    with pytest.raises(RuntimeError, match="does not require grad"):
        found.losses.sum().backward()
    assert not found.latents.requires_grad


def test_no_steps_give_what_the_encoder_says():
    with Tiny(**CPU) as invert, Encoder(**CPU) as encoder:
        found = invert(input_raw=picture(), steps=0)
        torch.testing.assert_close(found.latents, encoder(input_raw=picture(), mode="encode"))
        again = encoder(input_raw=found.latents, mode="decode")
        with torch.no_grad():
            pixels = encoder.detector.decode(found.latents[None]).sample[0]
    assert again.tobytes() == found.picture.tobytes()
    wanted = torch.tensor(values(picture())).permute(2, 0, 1) / 127.5 - 1
    assert abs((pixels - wanted).square().mean() - found.losses[0]) < 1e-5


def test_it_is_never_worse_than_the_encoder():
    """Steps far too long: the best latent that was met is the first."""
    with Tiny(**CPU) as invert:
        start = invert(input_raw=picture(), steps=0)
        found = invert(input_raw=picture(), steps=2, learning_rate=1e4)
    assert found.losses[-1] > found.losses[0]
    assert torch.equal(found.latents, start.latents)


def test_several_pictures_do_not_disturb_each_other():
    pictures = [picture(seed=1), picture(seed=2)]
    with Tiny(**CPU) as invert:
        together = invert(input_raw=pictures, steps=5)
        alone = [invert(input_raw=each, steps=5) for each in pictures]
    assert together.latents.shape == (2, *LATENT)
    assert together.losses.shape == (2, 6)
    assert [each.size for each in together.picture] == [(SIZE, SIZE)] * 2
    for at, one in enumerate(alone):
        torch.testing.assert_close(together.latents[at], one.latents, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_on_whatever_is_around(mode):
    with mode(), Tiny(**CPU) as invert:
        found = invert(input_raw=picture(), steps=5)
        assert not torch.is_grad_enabled()
    assert found.losses.min() < found.losses[0]


def test_the_model_gets_no_gradients_and_goes(collected):
    with Tiny(**CPU) as invert:
        invert(input_raw=picture(), steps=2)
        assert all(each.grad is None for each in invert.detector.parameters())
        assert not any(each.requires_grad for each in invert.detector.parameters())
        model = weakref.ref(invert.detector)
    assert model() is None


@pytest.mark.parametrize("kind", [Tiny, KL])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_dtype_descends(kind, dtype):
    with kind(**CPU, dtype_override=dtype) as invert:
        assert invert.detector.dtype == invert.dtype
        found = invert(input_raw=picture(), steps=10)
    assert found.losses.isfinite().all()
    assert found.losses.min() < 0.9 * found.losses[0]


def test_an_inversion_has_no_mode():
    with pytest.raises(ValueError, match="expected no mode="):
        Tiny(**CPU)(input_raw=picture(), mode="decode")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": -1}, "steps= at least 0, got -1"),
        ({"steps": 1.5}, r"steps= a whole number, got 1\.5"),
        ({"learning_rate": float("nan")}, "learning_rate= a finite number, got nan"),
    ],
)
def test_what_cannot_be_descended_is_one_sentence(given, words):
    with pytest.raises(ValueError, match=f"expected {words}") as caught:
        Tiny(**CPU)(input_raw=picture(), **given)
    assert "\n" not in str(caught.value)


# --- DDIM -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(models):
    with Invert(**CPU) as invert, Reconstruct(**CPU) as reconstruct:
        yield invert, reconstruct


def decoded(pipeline, given):
    """What the pipeline's own autoencoder makes of a picture: the best that can come back."""
    pixels = pipeline.image_processor.preprocess(given)
    with torch.no_grad():
        found = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mode()).sample
    return pipeline.image_processor.postprocess(found, output_type="pil")[0]


def test_the_noise_found_makes_the_picture_again(pair):
    invert, reconstruct = pair
    noise = invert(input_raw=picture(), prompt=PROMPT, fixed_point_iterations=20)
    assert noise.shape == LATENT
    again = reconstruct(input_raw=PROMPT, latents=noise)
    wanted = values(decoded(invert.detector, picture()))
    assert abs(values(again) - wanted).max() <= 2
    other = reconstruct(input_raw=PROMPT, latents=torch.randn_like(noise))
    assert abs(values(other) - wanted).mean() > 4 * abs(values(again) - wanted).mean()


def test_iterating_beats_the_plain_inversion(pair):
    invert, reconstruct = pair
    wanted = values(decoded(invert.detector, picture()))
    errors = []
    for iterations in (1, 3, 20):
        noise = invert(input_raw=picture(), prompt=PROMPT, fixed_point_iterations=iterations)
        again = reconstruct(input_raw=PROMPT, latents=noise)
        errors.append(((values(again) - wanted) ** 2).mean())
    assert errors[0] > 2 * errors[1] > 2 * errors[2]


def test_no_iterations_are_not_one(pair):
    with pytest.raises(ValueError, match="expected fixed_point_iterations= at least 1, got 0"):
        pair[0](input_raw=picture(), fixed_point_iterations=0)
    with pytest.raises(ValueError, match="expected pictures of 2 pixels a side at least"):
        pair[0](input_raw=picture(1))


def test_several_pictures_and_prompts(pair):
    invert, reconstruct = pair
    pictures, prompts = [picture(seed=0), picture(seed=2)], [PROMPT, "a blue sea"]
    steps = {"num_inference_steps": 16}
    noise = invert(input_raw=pictures, prompt=prompts, fixed_point_iterations=20, **steps)
    assert noise.shape == (2, *LATENT)
    made = reconstruct(input_raw=prompts, latents=noise, **steps)
    for one, again in zip(pictures, made, strict=True):
        assert abs(values(again) - values(decoded(invert.detector, one))).max() <= 2
    with pytest.raises(ValueError, match="expected prompt= one for all or a list of 2"):
        invert(input_raw=pictures, prompt=[PROMPT])
    with pytest.raises(ValueError, match="expected pictures of one size"):
        invert(input_raw=[picture(), picture(16)])


def test_an_unsolved_step_is_said(pair, caplog):
    invert, _ = pair
    invert(input_raw=picture(), prompt=PROMPT, fixed_point_iterations=20)
    invert(input_raw=picture(), prompt=PROMPT, fixed_point_iterations=1)  # plain, as asked
    assert "unsolved" not in caplog.text
    invert(input_raw=picture(), prompt=PROMPT, fixed_point_iterations=2)
    assert "Invert: a step was left unsolved" in caplog.text


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_other_kinds_of_prediction(pair, models, kind, tmp_path):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(models / "sd")
    pipeline.scheduler.register_to_config(prediction_type=kind)
    pipeline.save_pretrained(tmp_path)
    both = [Invert(**CPU), Reconstruct(**CPU)]
    for each in both:
        each.model_id = tmp_path
    with both[0] as invert, both[1] as reconstruct:
        assert reconstruct.detector.scheduler.config.prediction_type == kind
        noise = invert(input_raw=picture(), prompt=PROMPT, fixed_point_iterations=20)
        again = reconstruct(input_raw=PROMPT, latents=noise)
        assert abs(values(again) - values(decoded(invert.detector, picture()))).mean() <= 2


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_ddim_at_half_precision(dtype):
    with Invert(**CPU, dtype_override=dtype) as invert:
        noise = invert(input_raw=picture(), num_inference_steps=4)
    assert noise.isfinite().all()
    assert noise.shape == LATENT


def test_a_swapped_autoencoder_encodes(models):
    with Encoder(**CPU) as shared, Invert(**CPU).swap_in(vae=shared) as invert:
        assert invert.detector.vae is shared.detector
        assert invert(input_raw=picture(), num_inference_steps=2).shape == LATENT


def test_exports_give_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("OPGUARD_EXPORTS", str(tmp_path))
    given = {"input_raw": picture(), "num_inference_steps": 2}
    assert torch.equal(Invert(**CPU)(**given), Invert(**CPU, only_load_export=True)(**given))
    given = {"input_raw": picture(), "steps": 2}
    made, read = (Tiny(**CPU, only_load_export=only)(**given) for only in (False, True))
    assert torch.equal(made.latents, read.latents)


def test_the_examples_run(pair):
    for made in (pair[0], pair[1], Tiny(**CPU)):
        example = made.example_inputs()
        if not isinstance(example["input_raw"], str):
            example["input_raw"] = example["input_raw"].resize((SIZE, SIZE))
        assert made(**example) is not None


@pytest.mark.parametrize("name", ["LatentInversionSd", "DdimInversionSd", "DdimReconstructionSd"])
def test_the_ready_made_say_where_they_come_from(name):
    ready = getattr(inversion, name)
    assert ready.MODEL_ID.count("/") == 1
    assert ready.REVISION == "main"

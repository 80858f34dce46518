"""opguard.tasks.sd over a tiny pipeline: pictures, seeds, and who owns a part swapped in."""

import gc
import threading
import weakref

import pytest
import torch

from opguard.tasks import sd, vae
from pools_kit import fresh_pools
from tiny_diffusion import (
    PROMPT,
    SIZE,
    build_autoencoder_kl,
    build_autoencoder_tiny,
    build_stable_diffusion,
    build_stable_diffusion_xl,
)

diffusers = pytest.importorskip("diffusers")
numpy = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU = {"device_override": "cpu"}


class Plain(sd.StableDiffusionBase):
    NAME = "tiny-sd"
    MODEL_ID = "."
    NUM_INFERENCE_STEPS = 2


class Vae(vae.AutoencoderTinyBase):
    NAME = "tiny-vae"
    MODEL_ID = "."
    SCALE_FACTOR = 2


class Swapped(Plain):
    NAME = "tiny-sd-swapped"
    VAE_TYPE = Vae


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    Plain.MODEL_ID = build_stable_diffusion(root / "sd")
    Vae.MODEL_ID = build_autoencoder_tiny(root / "vae")
    return root


@pytest.fixture(scope="module")
def opened(models):
    with Plain(**CPU) as made:
        yield made


def values(picture):
    return numpy.asarray(picture).astype(float)


def test_a_prompt_gives_a_picture(opened):
    made = opened(input_raw=PROMPT, seed=1)
    assert isinstance(made, Image.Image)
    assert made.size == (SIZE, SIZE)


def test_it_is_what_the_pipeline_itself_makes(opened, models):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(models / "sd")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    bare = pipeline(PROMPT, num_inference_steps=3, guidance_scale=2.0, generator=generator)
    ours = opened(input_raw=PROMPT, num_inference_steps=3, guidance_scale=2.0, seed=3)
    assert ours.tobytes() == bare.images[0].tobytes()


@pytest.mark.parametrize("budget", ["64MiB", "1MiB"], ids=["fits", "part by part"])
def test_in_a_pool_it_makes_the_same_picture(opened, tmp_path, budget):
    expected = opened(input_raw=PROMPT, seed=1).tobytes()
    with fresh_pools(tmp_path, budget) as management, Plain(**CPU, pool=True) as pooled:
        pooled.free()
        assert pooled(input_raw=PROMPT, seed=1).tobytes() == expected
        assert len(management.snapshot().users) > 1
        assert sum(user.leases for user in management.snapshot().users) == 0


def test_a_seed_repeats_a_picture(opened):
    one, same, other = (opened(input_raw=PROMPT, seed=seed).tobytes() for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_a_seed_is_any_integer(opened):
    given = {"input_raw": [PROMPT] * 2}
    expected = [each.tobytes() for each in opened(**given, seed=3)]
    for seed in (numpy.int64(3), torch.tensor(3), [numpy.int64(3), torch.tensor(4)]):
        assert [each.tobytes() for each in opened(**given, seed=seed)] == expected
    with pytest.raises(TypeError, match="float"):
        opened(**given, seed=3.5)


def test_no_steps_are_not_the_default(opened):
    with pytest.raises(ValueError, match="expected num_inference_steps= at least 1, got 0"):
        opened(input_raw=PROMPT, num_inference_steps=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_inference_steps": -1}, "num_inference_steps= at least 1, got -1"),
        ({"num_inference_steps": 1.5}, r"num_inference_steps= a whole number, got 1\.5"),
        ({"height": 0}, "height= at least 8, got 0"),  # the pipeline would take its default
        ({"width": -8}, "width= at least 8, got -8"),
        ({"width": 20}, "width= a multiple of 8, got 20; give 16 or 24"),
        ({"height": 32.0}, r"height= a whole number, got 32\.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale= a finite number, got nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale= a finite number, got inf"),
        ({"guidance_scale": "much"}, "guidance_scale= a finite number, got 'much'"),
        ({"latents": torch.full((4, 16, 16), torch.nan)}, "latents= finite numbers, got NaN"),
        ({"latents": torch.zeros(4, 16, 16, dtype=torch.int64)}, "latents= .*of torch.int64"),
        ({"latents": torch.zeros(3, 16, 16)}, r"latents= .*\(4, height, width\)"),
        ({"latents": [0.0]}, "latents= a latent tensor .*got list"),
    ],
)
def test_what_a_pipeline_would_misread_is_one_sentence(opened, given, words):
    with pytest.raises(ValueError, match=f"expected {words}") as caught:
        opened(input_raw=PROMPT, seed=1, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_picture_that_is_not_finite_is_said(models, caplog, value):
    """Which; without numpy's own noise, which would be an error here; the others are whole."""
    with Plain(**CPU) as made:
        given = {"input_raw": [PROMPT] * 3, "seed": 1}
        sound = [each.tobytes() for each in made(**given)]
        assert not [each for each in caplog.records if each.name == "opguard"]
        vae = made.detector.vae
        decode = vae.decode

        def broken(latents, *args, **kwargs):
            (found,) = decode(latents, *args, **kwargs)
            found[1, :, 0, 0] = value
            return (found,)

        vae.decode = broken
        got = [each.tobytes() for each in made(**given)]
        del vae.decode
        assert [one == two for one, two in zip(got, sound, strict=True)] == [True, False, True]
        (said,) = (each.getMessage() for each in caplog.records if each.name == "opguard")
        assert "1 of 3 pictures came out broken" in said
        assert "picture 1;" in said
        caplog.clear()
        assert [each.tobytes() for each in made(**given)] == sound
        assert not [each for each in caplog.records if each.name == "opguard"]


def test_without_a_seed_pictures_differ(opened):
    assert opened(input_raw=PROMPT).tobytes() != opened(input_raw=PROMPT).tobytes()


def test_several_prompts_give_what_each_gives_alone(opened):
    prompts = [PROMPT, "a blue sea", "xyz"]
    together = opened(input_raw=prompts, seed=7)
    assert [each.size for each in together] == [(SIZE, SIZE)] * 3
    for at, prompt in enumerate(prompts):
        alone = opened(input_raw=prompt, seed=7 + at)
        assert abs(values(alone) - values(together[at])).max() <= 1
    again = opened(input_raw=prompts[::-1], seed=[9, 8, 7])
    assert abs(values(again[2]) - values(together[0])).max() <= 1


def test_a_list_of_one_is_a_list(opened):
    (made,) = opened(input_raw=[PROMPT], seed=1)
    assert made.tobytes() == opened(input_raw=PROMPT, seed=1).tobytes()


def test_the_keywords_reach_the_pipeline(opened):
    given = {"input_raw": PROMPT, "seed": 1, "guidance_scale": 20.0}
    plain = opened(**given)
    assert opened(**given, negative_prompt="zzz").tobytes() != plain.tobytes()
    assert opened(**given, num_inference_steps=5).tobytes() != plain.tobytes()
    assert opened(**given, height=16, width=48).size == (48, 16)
    both = opened(input_raw=[PROMPT] * 2, seed=1, guidance_scale=20.0, negative_prompt="zzz")
    first = opened(**given, negative_prompt="zzz")
    assert abs(values(both[0]) - values(first)).max() <= 1


def test_the_noise_can_be_given(opened):
    noise = torch.randn(4, SIZE // 2, SIZE // 2)
    one, same = (opened(input_raw=PROMPT, latents=given) for given in (noise, noise[None]))
    assert one.tobytes() == same.tobytes()
    assert opened(input_raw=PROMPT, latents=-noise).tobytes() != one.tobytes()
    with pytest.raises(ValueError, match=r"expected latents= of shape .* got \(4, 16, 16\)"):
        opened(input_raw=[PROMPT] * 2, latents=noise)


@pytest.mark.parametrize("given", [3, [], [PROMPT, 3]], ids=["number", "empty", "mixed"])
def test_what_is_no_prompt_is_refused(opened, given):
    with pytest.raises(TypeError, match="expected input_raw= a prompt or a list of prompts"):
        opened(input_raw=given)


def test_one_for_each_prompt(opened):
    with pytest.raises(ValueError, match="expected seed= one for all or a list of 2"):
        opened(input_raw=[PROMPT] * 2, seed=[1])
    with pytest.raises(ValueError, match="expected negative_prompt= one for all or a list of 1"):
        opened(input_raw=PROMPT, negative_prompt=["a", "b"])
    with pytest.raises(TypeError, match="did you mean 'guidance_scale'"):
        opened(input_raw=PROMPT, guidence_scale=1)


@pytest.mark.parametrize("kind", [Plain, Swapped])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(kind, dtype):
    with kind(**CPU) as full:
        expected = values(full(input_raw=PROMPT, seed=1))
    with kind(**CPU, dtype_override=dtype) as made:
        pipeline = made.detector
        parts = [pipeline.unet, pipeline.vae, pipeline.text_encoder]
        assert {part.dtype for part in parts} == {made.dtype} == {DTYPES[dtype]}
        found = values(made(input_raw=PROMPT, seed=1))
    # Noise is drawn in the model's dtype, so half precision begins with other numbers.
    assert found.shape == expected.shape
    assert abs(found - expected).mean() < 12


def test_threads_get_the_pictures_that_each_gets_alone(opened):
    """The schedulers of diffusers count the steps of one call only."""
    ways = [{"seed": seed, "num_inference_steps": steps} for seed in (1, 2) for steps in (3, 6)]
    expected = [opened(input_raw=PROMPT, **way).tobytes() for way in ways]
    found = [[] for _ in ways]

    def call(at):
        for _ in range(5):
            found[at].append(opened(input_raw=PROMPT, **ways[at]).tobytes())

    threads = [threading.Thread(target=call, args=(at,)) for at in range(len(ways))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[each] * 5 for each in expected]


# --- a part swapped in ----------------------------------------------------------------------------


def test_the_swapped_part_is_the_one_that_is_used(models):
    bare = diffusers.StableDiffusionPipeline.from_pretrained(
        models / "sd", vae=diffusers.AutoencoderTiny.from_pretrained(models / "vae")
    )
    bare.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    expected = bare(PROMPT, num_inference_steps=2, guidance_scale=7.5, generator=generator)
    with Swapped(**CPU) as made:
        assert type(made.detector.vae).__name__ == "AutoencoderTiny"
        found = made(input_raw=PROMPT, seed=1)
    assert found.tobytes() == expected.images[0].tobytes()
    with Plain(**CPU) as plain:
        assert plain(input_raw=PROMPT, seed=1).tobytes() != found.tobytes()


@pytest.mark.parametrize("make", [lambda: Swapped(**CPU), lambda: Plain(**CPU)])
def test_nothing_stays_after_the_pipeline_is_freed(make, collected):
    with make() as made:
        parts = [made.detector, made.detector.vae, made.detector.unet]
        alive = [weakref.ref(part) for part in parts]
        del parts
        made(input_raw=PROMPT, seed=1)
    assert [part() for part in alive] == [None] * 3


def test_a_lone_call_loads_and_frees_both(collected):
    made = Swapped(**CPU)
    made(input_raw=PROMPT, seed=1)
    assert not made.is_loaded
    assert made._held == ()
    assert [each for each in gc.get_objects() if type(each) is Vae] == []


def test_a_shared_part_lives_as_long_as_its_last_user():
    shared = Vae(**CPU)
    with Plain(**CPU).swap_in(vae=shared) as made:
        assert shared.is_loaded
        assert made.detector.vae is shared.detector
        assert shared.free() is False  # the pipeline uses it
        assert made(input_raw=PROMPT, seed=1).size == (SIZE, SIZE)
        assert shared.is_loaded
    assert not shared.is_loaded


def test_a_pipeline_leaves_a_shared_part_to_others():
    with Vae(**CPU) as shared:
        model = shared.detector
        with Plain(**CPU).swap_in(vae=shared) as made:
            assert made.detector.vae is model
        assert shared.is_loaded
        assert shared.detector is model
    assert not shared.is_loaded


def test_two_pipelines_share_a_part():
    shared = Vae(**CPU)
    with Plain(**CPU).swap_in(vae=shared) as one:
        with Plain(**CPU).swap_in(vae=shared) as two:
            assert one.detector.vae is two.detector.vae
        assert shared.is_loaded
        assert one(input_raw=PROMPT).size == (SIZE, SIZE)
    assert not shared.is_loaded


def test_a_part_called_beside_the_pipeline_stays():
    """A lone call of the shared part must not free it under the pipeline."""
    shared = Vae(**CPU)
    with Plain(**CPU).swap_in(vae=shared) as made:
        model = made.detector.vae
        latent = shared(input_raw=made(input_raw=PROMPT, seed=1), mode="encode")
        assert latent.shape == (4, SIZE // 2, SIZE // 2)
        assert shared.detector is model


def test_a_pipeline_that_fails_to_load_lets_go_of_its_parts(tmp_path):
    shared = Vae(**CPU)
    broken = Plain(**CPU).swap_in(vae=shared)
    broken.model_id = tmp_path
    with pytest.raises(OSError, match="model_index"):
        broken(input_raw=PROMPT)
    assert not shared.is_loaded
    assert broken._held == ()


def test_a_pipeline_that_goes_lets_go_of_its_parts(collected):
    shared = Vae(**CPU)
    made = Plain(**CPU, keep_warm=False).swap_in(vae=shared)
    assert made.detector.vae is shared.detector
    del made
    assert not shared.is_loaded


def test_threads_that_call_at_once_share_one_load():
    made, found = Swapped(**CPU), []
    expected = made(input_raw=PROMPT, seed=1).tobytes()

    def call():
        with made:
            found.append(made.detector.vae)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert not made.is_loaded
    assert made(input_raw=PROMPT, seed=1).tobytes() == expected


def test_settings_reach_a_part_the_pipeline_makes():
    with Swapped(**CPU, dtype_override="bf16", local_files_only=True) as made:
        (part,) = made._held
        assert part._settings["local_files_only"] is True
        assert part.dtype == torch.bfloat16


def test_a_part_of_another_dtype_is_refused():
    shared = Vae(**CPU, dtype_override="bf16")
    made = Plain(**CPU).swap_in(vae=shared)
    with pytest.raises(ValueError, match=r"expected its vae on cpu as torch.float32, like the"):
        made(input_raw=PROMPT)
    assert not shared.is_loaded


def test_what_cannot_be_swapped_in_is_said(opened):
    with pytest.raises(TypeError, match="did you mean 'unet'"):
        Plain(**CPU).swap_in(unett=Vae(**CPU))
    with pytest.raises(TypeError, match=r"expected vae= an instance of an OpGuardBase, got"):
        Plain(**CPU).swap_in(vae=torch.nn.Identity())
    with pytest.raises(RuntimeError, match="expected a pipeline that is not loaded yet"):
        opened.swap_in(vae=Vae(**CPU))


def test_a_pipeline_that_is_found_in_its_folder_takes_parts_too(collected):
    kinds = [diffusers.DiffusionPipeline, diffusers.AutoPipelineForText2Image]
    expected = Swapped(**CPU)(input_raw=PROMPT, seed=1).tobytes()
    for kind in kinds:
        made = type("Found", (Plain,), {"NAME": "found", "DETECTOR_TYPE": kind})(**CPU)
        shared = Vae(**CPU)
        assert made.swap_in(vae=shared)(input_raw=PROMPT, seed=1).tobytes() == expected
        made.swap_in(vea=shared)
        with pytest.raises(TypeError, match=r"a part 'vea' to swap, got a StableDiffusionPipel"):
            made(input_raw=PROMPT)
        assert not shared.is_loaded


# --- exports --------------------------------------------------------------------------------------


@pytest.fixture
def exports(tmp_path, monkeypatch):
    monkeypatch.setenv("OPGUARD_EXPORTS", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind", [Plain, Swapped])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_export_gives_the_same_pictures(kind, dtype, exports):
    settings = CPU | {"dtype_override": dtype}
    made = kind(**settings)(input_raw=PROMPT, seed=1)
    assert list(exports.glob("*tiny-sd*/unet/*.safetensors"))
    with kind(only_load_export=True, **settings) as read:
        assert str(exports) in read.detector.config["_name_or_path"]
        assert read(input_raw=PROMPT, seed=1).tobytes() == made.tobytes()


def test_a_shared_part_makes_another_export(exports):
    """With one name for both, the part of one must not come back in the other."""
    with Vae(**CPU) as shared:
        swapped = Plain(**CPU).swap_in(vae=shared)(input_raw=PROMPT, seed=1)
        plain = Plain(**CPU)(input_raw=PROMPT, seed=1)
        assert plain.tobytes() != swapped.tobytes()
        assert Plain(**CPU)(input_raw=PROMPT, seed=1).tobytes() == plain.tobytes()
        again = Plain(**CPU).swap_in(vae=shared)(input_raw=PROMPT, seed=1)
    assert again.tobytes() == swapped.tobytes()


def test_a_part_that_changes_makes_another_export(exports, tmp_path_factory):
    folder = build_autoencoder_tiny(tmp_path_factory.mktemp("vae"))

    class Other(Vae):
        NAME = "other-vae"
        MODEL_ID = folder

    class Changing(Plain):
        NAME = "tiny-sd-changing"
        VAE_TYPE = Other

    before = Changing(**CPU)(input_raw=PROMPT, seed=1)
    build_autoencoder_tiny(folder, seed=5)
    after = Changing(**CPU)(input_raw=PROMPT, seed=1)
    assert after.tobytes() != before.tobytes()


_taken = []  # of the calls of _source_only, the autoencoders; no cell, which the export notices


def _source_only(where, **kwargs):
    _taken.append(weakref.ref(kwargs["vae"]))
    if "models--" in str(where):
        raise OSError("cannot be read")
    return _from_pretrained(where, **kwargs)


_from_pretrained = diffusers.StableDiffusionPipeline.from_pretrained


def test_an_attempt_that_fails_holds_no_part(exports, monkeypatch, collected):
    """The export turns out to be unreadable: the part taken for it is let go."""
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", _source_only)
    Swapped(**CPU)(input_raw=PROMPT, seed=1)
    del _taken[:]
    with Swapped(**CPU) as made:
        assert len(made._held) == 1
        assert len(_taken) == 2
        assert _taken[0]() is None
        assert made.detector.vae is _taken[1]()
    assert _taken[1]() is None


@pytest.mark.parametrize("kind", [Plain, Swapped])
def test_a_quantized_pipeline_and_its_export(kind, exports):
    pytest.importorskip("torchao")
    settings = CPU | {"quant_type_override": "i8"}
    with kind(**settings) as made:
        kinds = {type(each).__name__ for each in made.detector.unet.parameters()}
        assert kinds > {"Parameter"}  # some are int8 tensors
        first = made(input_raw=PROMPT, seed=1)
    with kind(**CPU) as full:
        exact = full(input_raw=PROMPT, seed=1)
    again = kind(**settings, only_load_export=True)(input_raw=PROMPT, seed=1)
    assert again.tobytes() == first.tobytes() != exact.tobytes()
    assert abs(values(first) - values(exact)).mean() < 8


# diffusers hands an old keyword to huggingface_hub
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
def test_a_part_that_is_missing_is_one_sentence():
    class Gone(Vae):
        NAME = "gone-vae"
        MODEL_ID = "nobody/nothing-of-this-name"
        REVISION = "main"

    class Incomplete(Plain):
        VAE_TYPE = Gone

    made = Incomplete(**CPU, local_files_only=True)
    with pytest.raises(OSError, match=r"expected config.json of 'nobody/nothing-of-this-name'"):
        made(input_raw=PROMPT)
    assert made._held == ()


def test_the_examples_run(opened):
    assert opened(**opened.example_inputs()).size == (SIZE, SIZE)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sdxl_takes_the_autoencoder_of_its_class(dtype, tmp_path):
    class Fixed(vae.VaeSdxlFp16Fix):
        MODEL_ID = build_autoencoder_kl(tmp_path / "vae", seed=3)

    class Xl(sd.SdxlTextToImage):
        MODEL_ID = build_stable_diffusion_xl(tmp_path / "xl")
        VAE_TYPE = Fixed

    class OwnVae(Xl):
        VAE_TYPE = None

    given = {"input_raw": [PROMPT, "a blue sea"], "seed": 1, "num_inference_steps": 2}
    with Xl(**CPU, dtype_override=dtype) as made:
        assert made.detector.vae is made._held[0].detector
        assert made.detector.vae.dtype == made.detector.text_encoder_2.dtype == made.dtype
        pictures = made(**given)
    assert [each.size for each in pictures] == [(SIZE, SIZE)] * 2
    others = OwnVae(**CPU, dtype_override=dtype)(**given)
    assert others[0].tobytes() != pictures[0].tobytes()


@pytest.mark.parametrize("name", ["SdTinyNanoTextToImage", "SdxlTextToImage"])
def test_the_ready_made_say_where_they_come_from(name):
    ready = getattr(sd, name)
    assert ready.MODEL_ID.count("/") == 1
    assert ready.REVISION == "main"
    assert "Pipeline" in ready.DETECTOR_TYPE.__name__

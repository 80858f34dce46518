"""opguard.tasks.controlnets: no use alone, handed to a pipeline, and the edges they follow."""

import pytest
import torch

from opguard.tasks import controlnets
from opguard.tasks._canny import Canny
from tiny_diffusion import (
    PROMPT,
    SIZE,
    build_controlnet,
    build_stable_diffusion,
    picture,
)

diffusers = pytest.importorskip("diffusers")
numpy = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")

CPU = {"device_override": "cpu"}


class Control(controlnets.ControlnetBase):
    NAME = "tiny-controlnet"
    MODEL_ID = "."


class Plain(controlnets.ControlledStableDiffusionBase):
    NAME = "tiny-controlled"
    MODEL_ID = "."
    NUM_INFERENCE_STEPS = 2


class Controlled(Plain):
    CONTROLNET_TYPE = Control


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    Control.MODEL_ID = build_controlnet(root / "controlnet")
    Plain.MODEL_ID = Controlled.MODEL_ID = build_stable_diffusion(root / "sd")
    return root


@pytest.fixture(scope="module")
def opened(models):
    with Controlled(**CPU) as made:
        yield made


def values(given):
    return numpy.asarray(given).astype(float)


# --- ControlNets ----------------------------------------------------------------------------------


def test_a_controlnet_cannot_be_called():
    made = Control(**CPU)
    with pytest.raises(TypeError, match=r"Control\(\): expected a class that is callable"):
        made(input_raw=picture())
    assert not made.is_loaded


def test_the_control_picture_counts(opened):
    given = {"input_raw": PROMPT, "seed": 1}
    one = opened(**given, control=picture(seed=1))
    assert one.size == (SIZE, SIZE)
    assert opened(**given, control=picture(seed=1)).tobytes() == one.tobytes()
    assert opened(**given, control=picture(seed=2)).tobytes() != one.tobytes()
    off, also = (opened(**given, control=picture(seed=s), control_scale=0) for s in (1, 2))
    assert off.tobytes() == also.tobytes() != one.tobytes()


def test_it_is_what_the_pipeline_itself_makes(opened, models):
    bare = diffusers.StableDiffusionControlNetPipeline.from_pretrained(
        models / "sd",
        controlnet=diffusers.ControlNetModel.from_pretrained(models / "controlnet"),
    )
    bare.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    given = {"num_inference_steps": 2, "guidance_scale": 7.5, "generator": generator}
    expected = bare(PROMPT, image=picture(), controlnet_conditioning_scale=0.5, **given).images[0]
    found = opened(input_raw=PROMPT, control=picture(), control_scale=0.5, seed=1)
    assert found.tobytes() == expected.tobytes()


def test_one_control_for_all_or_one_for_each(opened):
    prompts = [PROMPT, "a blue sea"]
    controls = [picture(seed=1), picture(seed=2)]
    together = opened(input_raw=prompts, control=controls, seed=5)
    for at, prompt in enumerate(prompts):
        alone = opened(input_raw=prompt, control=controls[at], seed=5 + at)
        assert abs(values(alone) - values(together[at])).max() <= 1
    shared = opened(input_raw=prompts, control=controls[0], seed=5)
    assert shared[0].tobytes() == together[0].tobytes()
    assert shared[1].tobytes() != together[1].tobytes()


def test_the_control_is_required(opened):
    with pytest.raises(ValueError, match="expected control= a picture for the ControlNet"):
        opened(input_raw=PROMPT)
    with pytest.raises(ValueError, match="expected control= one for all or a list of 2"):
        opened(input_raw=[PROMPT] * 2, control=[picture()])
    with pytest.raises(ValueError, match="expected control= PIL pictures, got Tensor as number 1"):
        opened(input_raw=[PROMPT] * 2, control=[picture(), torch.full((3, 8, 8), 200.0)])
    with pytest.raises(ValueError, match="expected control_scale= a finite number, got nan"):
        opened(input_raw=PROMPT, control=picture(), control_scale=float("nan"))


def test_a_controlnet_is_handed_over_by_its_detector():
    with Control(**CPU) as control, Plain(**CPU).swap_in(controlnet=control) as made:
        assert made.detector.controlnet is control.detector
        assert made(input_raw=PROMPT, control=picture(), seed=1).size == (SIZE, SIZE)
    assert not control.is_loaded


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_dtype(dtype):
    with Controlled(**CPU, dtype_override=dtype) as made:
        assert made.detector.controlnet.dtype == made.detector.unet.dtype == made.dtype
        assert made(input_raw=PROMPT, control=picture(), seed=1).size == (SIZE, SIZE)


def test_an_export_gives_the_same_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("OPGUARD_EXPORTS", str(tmp_path))
    given = {"input_raw": PROMPT, "control": picture(), "seed": 1}
    made = Controlled(**CPU)(**given)
    assert list(tmp_path.glob("*tiny-controlled*/controlnet/*.safetensors"))
    read = Controlled(**CPU, only_load_export=True)(**given)
    assert read.tobytes() == made.tobytes()


def test_the_examples_run(opened):
    example = opened.example_inputs()
    example["control"] = example["control"].resize((SIZE, SIZE))
    assert opened(**example).size == (SIZE, SIZE)


def test_no_two_ready_made_share_a_name():
    ready = [getattr(controlnets, name) for name in controlnets.__all__]
    names = [each.NAME for each in ready if "NAME" in vars(each)]
    assert len(names) == len(set(names)) == 6
    hub = [each for each in ready if "MODEL_ID" in vars(each) and "/" in each.MODEL_ID]
    assert all(each.REVISION for each in hub)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_promax_is_read_where_only_half_precision_is(tmp_path, dtype):
    """As in its repository: no other set of weights, whatever dtype is asked for."""
    diffusers.ControlNetModel.from_pretrained(Control.MODEL_ID).save_pretrained(
        tmp_path, variant="fp16"
    )
    tiny = {"MODEL_ID": tmp_path, "DETECTOR_TYPE": diffusers.ControlNetModel}
    kind = type("Tiny", (controlnets.UnionPromaxControlnet,), tiny)
    with kind(**CPU, dtype_override=dtype) as made:
        assert made.detector.dtype == made.dtype


# --- the edge detector ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edges():
    with controlnets.CannyDetector(**CPU) as made:
        yield made


def square(size=64, inner=(16, 48), ink="white"):
    made = Image.new("RGB", (size, size), "black")
    made.paste(ink, (inner[0], inner[0], inner[1], inner[1]))
    return made


def test_edges_are_where_the_brightness_changes(edges):
    found = values(edges(input_raw=square()))
    assert found.shape == (64, 64, 3)
    assert set(numpy.unique(found)) == {0.0, 255.0}
    ys, xs = numpy.nonzero(found[..., 0])
    near = lambda at: (abs(at - 15.5) < 2) | (abs(at - 47.5) < 2)
    assert (near(ys) | near(xs)).all()
    assert 4 * 28 <= len(ys) <= 4 * 36  # one pixel wide, all the way round
    for row in (20, 30, 40):
        assert (found[row, :, 0] > 0).sum() == 2


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_a_turned_picture_has_the_same_number_of_edges(edges, turn):
    straight, turned = (values(edges(input_raw=square().rotate(angle))) for angle in (0, turn))
    assert abs((straight > 0).sum() - (turned > 0).sum()) <= 24


def test_an_even_picture_has_no_edges(edges):
    assert values(edges(input_raw=Image.new("RGB", (20, 30), "grey"))).sum() == 0


def test_a_weak_edge_needs_a_strong_one_to_join():
    ramp = torch.zeros(1, 1, 16, 32)
    ramp[..., 10:] = 0.2  # weak by itself
    ramp[..., 22:] += torch.linspace(0.1, 0.8, 16)[:, None]  # grows strong downwards
    with torch.no_grad():
        found = Canny()(ramp, 0.02, 0.15)[0, 0]
        strong = Canny()(ramp, 0.15, 0.15)[0, 0]
    assert not found[:, 5:15].any()
    rows, strong_rows = (each[:, 18:26].any(dim=1).sum() for each in (found, strong))
    assert 0 < strong_rows < rows - 3
    assert not (strong & ~found).any()


def test_the_bounds_count(edges):
    soft = picture(64, seed=3)
    few, many = (values(edges(input_raw=soft, low=0.001, high=h)).sum() for h in (0.05, 0.002))
    assert few < many
    with pytest.raises(ValueError, match="expected 0 <= low <= high"):
        edges(input_raw=soft, low=0.3, high=0.2)
    with pytest.raises(ValueError, match="expected input_raw= PIL pictures, got Tensor as number"):
        edges(input_raw=torch.zeros(3, 8, 8))


def test_pictures_of_several_sizes(edges):
    one, other = edges(input_raw=[square(), square(32, (8, 24))])
    assert (one.size, other.size) == ((64, 64), (32, 32))
    assert one.tobytes() == edges(input_raw=square()).tobytes()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_edges_at_every_dtype(edges, dtype):
    with controlnets.CannyDetector(**CPU, dtype_override=dtype) as made:
        found = values(made(input_raw=square())) > 0
    assert (found != (values(edges(input_raw=square())) > 0)).mean() < 0.05


def test_edges_feed_a_pipeline(opened, edges):
    outline = edges(input_raw=square(SIZE, (8, 24)))
    assert opened(input_raw=PROMPT, control=outline, seed=1).size == (SIZE, SIZE)
    assert edges(**edges.example_inputs()).size == (256, 256)

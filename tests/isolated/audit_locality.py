"""What task classes open when they load from folders of this machine and are called.

    python audit_locality.py ROOT CASES SETTINGS [CASES SETTINGS ...]

prints a JSON object with all that was seen, and with the exports that each pair of lists made.

An audit hook sees every socket that this process makes, every name it looks up and every address it
binds, connects or sends to, from any thread, from before the first import. ROOT holds the models,
as tests/test_locality_tasks.py builds them; a case is a name in CASES, a setting fp32, fp16, bf16,
i8, fp4 or nf4; lists have commas. Case ``leak`` opens a socket itself: it proves that the audit can
see one.
"""

import sys
import traceback

seen: list[dict[str, object]] = []
running = ["imports"]


def hook(event: str, args: tuple[object, ...]) -> None:
    if event.startswith("socket."):
        frames = [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_stack(limit=12)]
        if any("urllib3" in frame and "_has_ipv6" in frame for frame in frames):
            return  # at its import it asks this machine's kernel for ::1; nothing leaves
        seen.append({"event": event, "args": repr(args), "in": running[0], "frames": frames[:-1]})


sys.addaudithook(hook)

import itertools  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import pathlib  # noqa: E402
import warnings  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

torch.set_num_threads(1)
root = pathlib.Path(sys.argv[1])
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def tiny(owner: type, folder: str, **attributes: Any) -> type:
    return type(f"Tiny{owner.__name__}", (owner,), {"MODEL_ID": str(root / folder), **attributes})


def nlp(name: str, folder: str) -> Any:
    from opguard.tasks import nlp as tasks

    return tiny(getattr(tasks, name), folder)


def diffusion(module: str, name: str, folder: str, **attributes: Any) -> Any:
    import importlib

    owner = getattr(importlib.import_module(f"opguard.tasks.{module}"), name)
    return tiny(owner, folder, NAME=f"audited-{name}", REVISION=None, **attributes)


def picture() -> Any:
    from PIL import Image

    return Image.linear_gradient("L").convert("RGB").resize((32, 32))


def swapped() -> Any:
    part = diffusion("vae", "AutoencoderTinyBase", "vae", SCALE_FACTOR=2)
    return diffusion("sd", "StableDiffusionBase", "sd", NUM_INFERENCE_STEPS=2, VAE_TYPE=part)


def controlled() -> Any:
    part = diffusion("controlnets", "ControlnetBase", "controlnet")
    return diffusion(
        "controlnets",
        "ControlledStableDiffusionBase",
        "sd",
        NUM_INFERENCE_STEPS=2,
        CONTROLNET_TYPE=part,
    )


# name: the class, the keywords of a call (None: its .detector is asked for instead)
CASES: dict[str, tuple[Any, Any]] = {
    "captioning": (lambda: nlp("Blip1", "blip"), lambda: {"input_raw": picture()}),
    "captioning2": (lambda: nlp("Blip2", "blip2"), lambda: {"input_raw": picture()}),
    "embedding": (lambda: nlp("Embedding", "bert"), lambda: {"input_raw": ["a cat", "dog"]}),
    "generation": (
        lambda: nlp("TextGeneration", "llama"),
        lambda: {"input_raw": "a cat", "max_new_tokens": 3},
    ),
    "vae-tiny": (
        lambda: diffusion("vae", "AutoencoderTinyBase", "vae", SCALE_FACTOR=2),
        lambda: {"input_raw": picture(), "mode": "encode-decode"},
    ),
    "vae-kl": (
        lambda: diffusion("vae", "AutoencoderKLBase", "kl", SCALE_FACTOR=2),
        lambda: {"input_raw": picture(), "mode": "encode-decode"},
    ),
    "sd": (
        lambda: diffusion("sd", "StableDiffusionBase", "sd", NUM_INFERENCE_STEPS=2),
        lambda: {"input_raw": "a cat", "seed": 1},
    ),
    "sd-swapped": (swapped, lambda: {"input_raw": "a cat", "seed": 1}),
    "controlnet": (lambda: diffusion("controlnets", "ControlnetBase", "controlnet"), None),
    "controlled": (controlled, lambda: {"input_raw": "a cat", "seed": 1, "control": picture()}),
    "canny": (
        lambda: diffusion("controlnets", "CannyDetector", "."),
        lambda: {"input_raw": picture()},
    ),
    "inversion-latent": (
        lambda: diffusion("inversion", "LatentInversionTinyBase", "vae", SCALE_FACTOR=2),
        lambda: {"input_raw": picture(), "steps": 2},
    ),
    "inversion-ddim": (
        lambda: diffusion("inversion", "DdimInversionBase", "sd", NUM_INFERENCE_STEPS=2),
        lambda: {"input_raw": picture()},
    ),
}


def leak() -> None:
    import socket

    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.sendto(b"x", sock.getsockname())
    socket.getaddrinfo("localhost", 80)


def run(case: str, setting: str) -> str:
    """Loads twice, the second time from the export where one was made, and calls each time."""
    make, inputs = CASES[case]
    settings: dict[str, Any] = {"device_override": "cpu", "local_files_only": True}
    if setting in DTYPES:
        settings["dtype_override"] = DTYPES[setting]
    else:
        settings["quant_type_override"] = setting
    owner = make()
    for _ in range(2):
        with owner(**settings) as model:
            if inputs is None:
                assert model.detector is not None
            else:
                model(**inputs())
    return "ran"


def main() -> None:
    logging.getLogger("opguard").setLevel(logging.ERROR)  # what a fallback says is not asked here
    warnings.simplefilter("ignore")
    done: dict[str, str] = {}
    exports: list[list[str]] = []
    before: set[str] = set()
    for cases, settings in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
        for case, setting in itertools.product(cases.split(","), settings.split(",")):
            running[0] = f"{case} {setting}"
            try:
                if case == "leak":
                    leak()
                    done[running[0]] = "ran"
                else:
                    done[running[0]] = run(case, setting)
            except Exception as error:
                done[running[0]] = f"{type(error).__name__}: {error}"
        made = set(os.listdir(os.environ["OPGUARD_EXPORTS"]))
        exports.append(sorted(made - before))
        before = made
    threads = [thread for thread in __import__("threading").enumerate() if not thread.daemon]
    print(json.dumps({"ran": done, "seen": seen, "threads": len(threads), "exports": exports}))


if __name__ == "__main__":
    main()

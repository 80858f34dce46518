"""A hub that moves under an unchanged name: what each load of it gives, asks and says, as JSON."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import fake_hub

ROOT = Path(sys.argv[1])
REPO = "org/model"
HUB = fake_hub.FakeHub(REPO)
os.environ |= {
    "HF_ENDPOINT": HUB.endpoint,
    "HF_HOME": str(ROOT / "hf"),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_XET": "1",
    "NO_PROXY": "127.0.0.1",
}
for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "OPGUARD_EXPORTS"):
    os.environ.pop(name, None)

import torch  # noqa: E402
from safetensors.torch import load_file, save  # noqa: E402
from safetensors.torch import save_file as write  # noqa: E402

from opguard import cache_guard, hub, local_guard  # noqa: E402

FROM: list[str] = []


class Model:
    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def save_pretrained(self, folder: str) -> None:
        write({"weight": self.weight}, os.path.join(folder, "model.safetensors"))


def loader(model_id: str, revision: str | None = None) -> Model:
    from huggingface_hub import hf_hub_download

    if os.path.isdir(model_id):
        FROM.append("export")
        path = os.path.join(model_id, "model.safetensors")
    else:
        FROM.append("source")
        path = hf_hub_download(model_id, "model.safetensors", revision=revision)
    return Model(load_file(path)["weight"])


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(f"{record.levelname} {record.getMessage()}")


def main() -> None:
    heard = Heard()
    logging.getLogger("opguard").addHandler(heard)
    logging.getLogger("opguard").setLevel("INFO")
    steps: dict[str, object] = {}

    def step(name: str, revision: str | None = "main", **settings: bool) -> None:
        hub._upstream.clear()  # as a process would that starts later
        FROM.clear()
        heard.texts.clear()
        HUB.asked.clear()
        try:
            with cache_guard(base_export_name="m", **settings) as load:
                value: object = float(load(loader, REPO, revision=revision).weight[0])
        except Exception as error:
            value = "; ".join([type(error).__name__, *getattr(error, "__notes__", ())])
        asked = [request for request in HUB.asked if "/api/" in request]
        steps[name] = {"value": value, "from": FROM[:], "asked": asked, "said": heard.texts[:]}

    def commit(value: float) -> str:
        return HUB.commit({"model.safetensors": save({"weight": torch.full((3,), value)})})

    first = commit(1.0)
    step("first")
    step("again")
    second = commit(2.0)
    step("local", local_files_only_on_refresh=True)
    step("only", only_load_export=True)
    step("moved")
    step("moved again")
    step("pinned", first)
    step("pinned again", first)
    step("main again")
    HUB.close()
    step("gone")
    os.rename(ROOT / "hf" / "hub", ROOT / "hf" / "away")
    with local_guard():  # or the hub's own retries are waited for
        step("gone and forgotten")
    step("gone, export", only_load_export=True)
    print(json.dumps({"first": first, "second": second, "steps": steps}))


if __name__ == "__main__":
    main()

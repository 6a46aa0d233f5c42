"""Downloads, against a hub of our own on the loopback interface that serves real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from stand_in_hub import COMMIT, Hub, Repository

PACKAGE = Path(__file__).parents[2] / "priv" / "python"

# Runs in a process of its own: the hub's address is read when its client is imported.
CLIENT = """
import json, sys
sys.path[:0] = [{package!r}, {tests!r}]
from starweave_image import schema
from engines import Bench
known = json.loads(sys.argv[1])
entries = [schema.ModelEntry(id=id) for id in known["models"] if known["configured"]]
bench = Bench(models=entries, offline=known["offline"], **known["config"]).start()
answers = {{}}
for model in known["models"]:
    end = bench.generate(model=model, steps=1, seed=1)
    if isinstance(end, schema.Done):
        answers[model] = [end.parameters["width"], end.parameters["environment"]["revision"]]
    else:
        answers[model] = [end.kind, end.message, end.retryable]
states = {{card.id: card.state for card in bench.engine.models()}}
print(json.dumps([answers, states]))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    good = checkpoints.stable_diffusion(tmp_path / "good")
    (good / "unet/diffusion_pytorch_model.bin").write_bytes(b"not for us")
    (good / "extra.ckpt").write_bytes(b"not for us")
    coded = checkpoints.stable_diffusion(tmp_path / "coded")
    index = json.loads((coded / "model_index.json").read_text())
    (coded / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "Mine"]}))
    pickled = checkpoints.pickled(tmp_path / "pickled")
    names = {"good": good, "pickled": pickled, "coded": coded, "empty": tmp_path / "empty"}
    hub = Hub({f"owner/{name}": Repository({COMMIT: folder}) for name, folder in names.items()})
    yield hub
    hub.stop()


@pytest.fixture
def client(hub: Hub, tmp_path: Path) -> Any:
    """Asks for one picture of each model; what came of it by model, and the state of each card."""

    def run(*models: str, offline: bool = False, configured: bool = True, **config: Any) -> Any:
        known = {"models": models, "offline": offline, "configured": configured, "config": config}
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        script = CLIENT.format(package=str(PACKAGE), tests=str(Path(__file__).parent))
        ran = subprocess.run(
            [sys.executable, "-c", script, json.dumps(known)],
            env=environment
            | {
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_DISABLE_XET": "1",
                "OMP_NUM_THREADS": "1",
            },
            capture_output=True,
            timeout=600,
        )
        print(ran.stderr.decode())
        assert ran.returncode == 0
        answers, states = json.loads(ran.stdout.splitlines()[-1])
        assert str(tmp_path) not in str(answers) and "127.0.0.1" not in str(answers)
        return answers, states

    return run


def test_a_configured_model_is_downloaded_once_and_without_pickles(
    hub: Hub, client: Any, tmp_path: Path
) -> None:
    answers, states = client("owner/good")
    assert answers == {"owner/good": [64, COMMIT]}
    assert states["owner/good"] == "loaded"
    fetched = [path.rpartition("/")[2] for path in hub.asked]
    assert "diffusion_pytorch_model.safetensors" in fetched
    assert "diffusion_pytorch_model.bin" not in fetched and "extra.ckpt" not in fetched
    assert (tmp_path / "hf/hub/models--owner--good").is_dir()
    hub.asked.clear()
    assert client("owner/good", offline=True)[0] == answers
    assert hub.asked == []


@pytest.mark.slow
def test_what_the_hub_will_not_give_is_one_clear_sentence(hub: Hub, client: Any) -> None:
    hub.errors["owner/gated"] = (403, "GatedRepo")
    hub.errors["owner/moved"] = (404, "RevisionNotFound")
    hub.errors["owner/down"] = (503, "")
    hub.errors["owner/busy"] = (429, "")
    hub.errors["owner/barred"] = (451, "")
    wanted = {
        "owner/pickled": ("model_load_failed", "pickled weights only"),
        "owner/coded": ("model_load_failed", "code of its own"),
        "owner/empty": ("model_load_failed", "no model_index.json"),
        "owner/nobody": ("model_not_found", "is not on the hub"),
        "owner/gated": ("model_load_failed", "set HF_TOKEN"),
        "owner/moved": ("model_not_found", "no such revision"),
        "owner/down": ("model_load_failed", "the hub cannot be reached"),
        "owner/busy": ("model_load_failed", "the hub cannot be reached"),
        "owner/barred": ("model_load_failed", "the hub refuses it (HTTP 451)"),
    }
    answers, states = client(*wanted)
    for model, (kind, words) in wanted.items():
        assert answers[model][0] == kind and words in answers[model][1]
        assert answers[model][2] == (model in ("owner/down", "owner/busy"))
        assert states[model] == "remote"
    assert hub.weights_asked() == []


@pytest.mark.slow
def test_a_request_for_what_is_not_configured_asks_the_hub_nothing(hub: Hub, client: Any) -> None:
    answers, _ = client("owner/good", configured=False)
    assert answers["owner/good"][0] == "model_not_found" and hub.asked == []


def test_downloads_keep_within_bounds_and_weights_are_compared_with_their_names(
    hub: Hub, client: Any, tmp_path: Path
) -> None:
    hub.repositories["owner/other"] = Repository({COMMIT: checkpoints.stable_diffusion(tmp_path / "other")})
    answers, _ = client("owner/good", "owner/other", max_models=1, pinned=["owner/good"])
    assert answers["owner/good"] == [64, COMMIT]
    assert (
        answers["owner/other"][0] == "model_load_failed"
        and "which is max_models" in answers["owner/other"][1]
    )
    [blob] = [
        path.resolve()
        for path in (tmp_path / "hf/hub").glob("models--owner--good/snapshots/*/unet/*.safetensors")
    ]
    blob.write_bytes(blob.read_bytes()[:-8] + bytes(8))
    answers, states = client("owner/good", offline=True)
    assert answers["owner/good"][0] == "model_load_failed"
    assert "its unet/diffusion_pytorch_model.safetensors is damaged" in answers["owner/good"][1]
    assert states["owner/good"] == "failed"

"""`starweave-image models`: real commands and real processes, against a hub of our own that the real client asks."""

from __future__ import annotations

import gc
import json
import os
import pty
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
from conftest import Tracked
from huggingface_hub import constants
from PIL import Image
from sidecar import Sidecar
from stand_in_hub import COMMIT, Hub, Repository, sha256
from starweave_image import schema
from starweave_image.errors import ImageError
from starweave_image.weights import disk, lease
from starweave_image.weights.hub import File, Plan
from starweave_image.weights.upkeep import Upkeep

NEXT = "fedcba9876543210fedcba9876543210fedcba98"
CHUNK = 10 * 1024 * 1024  # The hub's client writes this much at a time.
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkpoints.stable_diffusion(tmp_path_factory.mktemp("models") / "small")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: picture-licence\n---\n# Small\n")
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"not for us")
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not for us")
    (folder / "everything.safetensors").write_bytes(b"not for us")
    (folder / "sheet.png").write_bytes(b"not for us")
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a UNet of more than two of the client's chunks."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    checkpoints.stable_diffusion(folder, block_out_channels=(96, 256))
    assert (folder / UNET).stat().st_size > 2 * CHUNK + 2**20
    return folder


@pytest.fixture
def hub(small: Path) -> Iterator[Hub]:
    hub = Hub({"owner/small": Repository({COMMIT: small})})
    yield hub
    hub.stop()


class Machine:
    """A machine with a cache of its own, on which commands are run."""

    def __init__(self, hub: Hub, tracked: Tracked, folder: Path) -> None:
        self.cache = folder / "hf" / "hub"
        self.folder = folder
        kept = {name: value for name, value in tracked.env.items() if not name.startswith("HF_")}
        self.env = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "starweave_image", *arguments],
            env=self.env | options.pop("env", {}),
            cwd=self.folder,
            **({"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options),
            text=True,
        )

    def run(self, *arguments: str, code: int = 0, **options: Any) -> str:
        """What the command says, on both streams."""
        process = self.start(*arguments, **options)
        said, errors = process.communicate(timeout=300)
        assert process.returncode == code, said + errors
        assert str(self.folder) not in errors and "Traceback" not in errors
        return said + errors

    def models(self, *arguments: str, **options: Any) -> str:
        return self.run("models", *arguments, **options)

    def listed(self) -> dict[str, Any]:
        rows = json.loads(self.models("list", "--json"))
        return {row["id"]: row for row in rows if row["state"] in ("complete", "incomplete")}

    def repository(self, name: str = "small") -> Path:
        return self.cache / f"models--owner--{name}"

    def snapshot(self, name: str = "small", commit: str = COMMIT) -> Path:
        return self.repository(name) / "snapshots" / commit

    def blob(self, file: str, name: str = "small") -> Path:
        return (self.snapshot(name) / file).resolve()


@pytest.fixture
def machine(hub: Hub, tracked: Tracked, tmp_path: Path) -> Machine:
    return Machine(hub, tracked, tmp_path)


@pytest.fixture(scope="module")
def kept_cache(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which owner/small was pulled."""
    hub = Hub({"owner/small": Repository({COMMIT: small})})
    machine = Machine(hub, Tracked(), tmp_path_factory.mktemp("kept"))
    machine.models("pull", "owner/small", "--yes")
    hub.stop()
    return machine.cache


@pytest.fixture
def pulled(machine: Machine, kept_cache: Path) -> Machine:
    shutil.copytree(kept_cache, machine.cache, symlinks=True)
    return machine


def add(machine: Machine, name: str, used: float) -> None:
    """Another model on the machine, last used so many seconds since 1970."""
    shutil.copytree(machine.repository(), machine.repository(name), symlinks=True)
    with_lease = lease.take(machine.snapshot(name))
    assert with_lease is not None
    with_lease.release()
    os.utime(record(machine, name), (used, used))


def record(machine: Machine, name: str) -> Path:
    return machine.cache / ".locks/starweave_image" / f"models--owner--{name}" / COMMIT


# pull


def test_nothing_travels_without_consent(hub: Hub, machine: Machine, small: Path) -> None:
    said = machine.models("pull", "owner/small", code=3)
    assert "licence   picture-licence" in said and "gated     no" in said and "--yes" in said
    assert f"owner/small at revision {COMMIT}" in said and "free" in said
    again = machine.models("pull", "owner/small", "--dry-run", code=3)
    # What is free moves, whoever else writes to that disk.
    assert [line for line in again.splitlines() if "free" not in line and line not in said] == []
    assert "to fetch" in again
    assert hub.weights_asked() == [] and not machine.cache.exists()


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("\n", 3)])
def test_a_terminal_is_asked(machine: Machine, answer: str, code: int) -> None:
    ours, theirs = pty.openpty()
    process = machine.start("models", "pull", "owner/small", stdin=theirs)
    os.write(ours, f"{answer}\n".encode())
    said, errors = process.communicate(timeout=300)
    assert (process.returncode, machine.cache.exists()) == (code, code == 0)
    assert "under this licence? [y/N]" in errors
    os.close(ours)
    os.close(theirs)


def test_a_pulled_model_draws_offline(hub: Hub, machine: Machine, small: Path) -> None:
    said = machine.models("pull", "owner/small", "--yes")
    assert f"owner/small is here, revision {COMMIT}" in said and "100 %" in said
    files = [path for path in machine.snapshot().rglob("*") if path.is_file()]
    names = {path.relative_to(machine.snapshot()).as_posix() for path in files}
    wanted = {path.relative_to(small).as_posix() for path in small.rglob("*") if path.is_file()}
    assert names == {name for name in wanted if not name.endswith((".bin", "fp16.safetensors", ".png"))} - {
        "everything.safetensors"
    }
    row = machine.listed()["owner/small"]
    assert row["revision"] == COMMIT and row["state"] == "complete" and row["licence"] == "picture-licence"
    assert row["bytes"] == sum(path.stat().st_size for path in files) and row["known"] is False
    assert machine.models("verify").splitlines()[-1] == f"owner/small {COMMIT[:12]}: intact"
    os.utime(record(machine, "small"), (1, 1))
    offline = {"HF_HUB_OFFLINE": "1"}
    hub.asked.clear()
    arguments = ["generate", "a cat", "--model", "owner/small", "--steps", "1"]
    machine.run(*arguments, env=offline)
    with Image.open(machine.folder / "image.png") as image:
        assert image.size == (64, 64)
    assert time.time() - record(machine, "small").stat().st_mtime < 600
    assert "is here" in machine.models("pull", "owner/small", "--offline")
    assert hub.asked == []
    # Once more, with the hub: nothing travels twice.
    hub.served.clear()
    assert "to fetch  0 B" in machine.models("pull", "owner/small")
    assert hub.served == {}


def test_offline_mode_says_what_cannot_be_done(hub: Hub, pulled: Machine) -> None:
    said = pulled.models("pull", "owner/nothing", code=1, env={"HF_HUB_OFFLINE": "1"})
    assert said == ("starweave-image: owner/nothing is not all here, and offline mode forbids to fetch it\n")
    pulled.blob(UNET).unlink()
    said = pulled.models("pull", "owner/small", "--offline", code=1)
    assert "forbids to fetch the rest of it" in said
    said = pulled.models("verify", "--repair", "--offline", code=1)
    assert f"{UNET} is missing" in said and "offline mode" in said
    assert hub.asked == []


def test_a_cut_download_is_gone_on_with(hub: Hub, machine: Machine, wide: Path) -> None:
    hub.repositories["owner/wide"] = Repository({COMMIT: wide})
    others = sum(path.stat().st_size for path in wide.rglob("*.safetensors")) - (wide / UNET).stat().st_size
    # The connection is cut and the hub goes down; what the client has not written by then is lost.
    hub.limit = others + CHUNK + 2**20
    hub.at_limit = lambda: hub.errors.update({UNET: (503, "")})
    said = machine.models("pull", "owner/wide", "--yes", code=1)
    assert "owner/wide could not be downloaded: the hub cannot be reached" in said
    partial = machine.repository("wide") / "blobs" / f"{sha256(wide / UNET)}.incomplete"
    assert partial.stat().st_size == CHUNK
    assert machine.listed()["owner/wide"]["state"] == "incomplete"
    assert "10.5 MB of broken downloads" in machine.models("list")
    hub.limit = None
    hub.errors.clear()
    hub.served.clear()
    machine.models("pull", "owner/wide", "--yes")
    assert hub.served == {UNET: (wide / UNET).stat().st_size - CHUNK}
    assert machine.blob(UNET, "wide").read_bytes() == (wide / UNET).read_bytes()
    assert not partial.exists()


@pytest.mark.slow
def test_a_killed_download_is_gone_on_with(hub: Hub, machine: Machine, wide: Path) -> None:
    hub.repositories["owner/wide"] = Repository({COMMIT: wide})
    go_on = threading.Event()
    hub.limit, hub.at_limit = 2 * CHUNK + 2**20, go_on.wait
    process = machine.start("models", "pull", "owner/wide", "--yes")
    partial = machine.repository("wide") / "blobs" / f"{sha256(wide / UNET)}.incomplete"
    deadline = time.monotonic() + 200
    while not (partial.exists() and partial.stat().st_size >= CHUNK):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    # Nobody deletes what is being fetched.
    assert "in use" in machine.models("rm", "owner/wide", code=2)
    process.kill()
    process.communicate()
    go_on.set()
    kept = partial.stat().st_size
    hub.limit = None
    hub.served.clear()
    machine.models("pull", "owner/wide", "--yes")
    assert hub.served == {UNET: (wide / UNET).stat().st_size - kept}
    assert "intact" in machine.models("verify", "owner/wide")


def test_what_arrives_damaged_is_thrown_away(hub: Hub, machine: Machine) -> None:
    hub.spoil = True
    said = machine.models("pull", "owner/small", "--yes", code=1)
    assert "arrived damaged" in said
    assert [path for path in machine.repository().glob("blobs/*") if len(path.name) > 40] == []
    resolved = [path.partition(f"/resolve/{COMMIT}/")[2] for path in hub.asked if "/resolve/" in path]
    assert resolved[:2] == ["model_index.json"] * 2, "once to look, and then before all others"
    hub.spoil = False
    machine.models("pull", "owner/small", "--yes")
    assert "intact" in machine.models("verify")


@pytest.mark.slow
def test_what_the_hub_refuses_is_explained(hub: Hub, machine: Machine, small: Path, tmp_path: Path) -> None:
    hub.repositories["owner/pickled"] = Repository({COMMIT: checkpoints.pickled(tmp_path / "pickled")})
    for name, class_ in (("newer", {"_class_name": "NextPipeline"}), ("odd", {"unet": ["diffusers", "Odd"]})):
        folder = shutil.copytree(small, tmp_path / name)
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | class_))
        hub.repositories[f"owner/{name}"] = Repository({COMMIT: folder})
    hub.repositories["owner/gated"] = Repository({COMMIT: small}, token="hf_right")
    for arguments, code, words in [
        (["owner/nobody"], 2, "owner/nobody is not on the hub"),
        (["owner/small", "--revision", "v9"], 2, "owner/small has no such revision on the hub"),
        (["owner/pickled", "--yes"], 1, "has its unet as pickled weights only"),
        (
            ["owner/newer", "--yes"],
            1,
            "needs the pipeline NextPipeline, which the installed diffusers does not",
        ),
        (["owner/odd", "--yes"], 1, "has a unet that is no class of diffusers or transformers"),
        (["owner/gated", "--yes"], 1, "accept its terms on https://huggingface.co/owner/gated"),
    ]:
        assert words in machine.models("pull", *arguments, code=code)
    said = machine.models("pull", "owner/gated", "--yes", code=1, env={"HF_TOKEN": "hf_wrong"})
    assert "the account of HF_TOKEN has no access yet" in said
    assert hub.weights_asked() == [] and not machine.cache.exists()

    said = machine.models("pull", "owner/gated", "--yes", env={"HF_TOKEN": "hf_right"})
    assert "gated     yes, and you have access" in said
    assert machine.listed()["owner/gated"]["state"] == "complete"
    assert hub.served and hub.leaked == []


@pytest.mark.slow
def test_a_new_revision_shares_what_is_the_same(
    hub: Hub, pulled: Machine, small: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(small, tmp_path / "changed")
    (changed / "vae/diffusion_pytorch_model.safetensors").write_bytes(
        (small / "text_encoder/model.safetensors").read_bytes()
    )
    hub.repositories["owner/small"].commits[NEXT] = changed
    pulled.models("pull", "owner/small", "--revision", COMMIT, "--yes")
    pulled.models("pull", "owner/small", "--yes")
    # That file's content is here too, under another name.
    assert hub.served == {}
    assert (pulled.repository() / "refs/main").read_text() == NEXT
    old_vae = pulled.blob("vae/diffusion_pytorch_model.safetensors")
    pulled.models("rm", "owner/small", "--revision", COMMIT[:8])
    assert not pulled.snapshot().exists() and not old_vae.exists()
    assert "intact" in pulled.models("verify", "owner/small")


# verify


def test_damage_is_found_and_mended(hub: Hub, pulled: Machine) -> None:
    vae, scheduler = "vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"
    flipped = bytearray(pulled.blob(UNET).read_bytes())
    flipped[len(flipped) // 2] ^= 1
    pulled.blob(UNET).write_bytes(flipped)
    with pulled.blob(vae).open("r+b") as content:
        content.truncate(1000)
    pulled.blob(scheduler).write_text("{}")
    pulled.blob("unet/config.json").unlink()
    said = pulled.models("verify", "owner/small", code=1)
    name = f"owner/small {COMMIT[:12]}"
    for line in (
        f"{name}: {UNET} is damaged",
        f"{name}: {vae} is damaged",
        f"{name}: {scheduler} is damaged",
        f"{name}: unet/config.json is missing",
    ):
        assert line in said
    assert "intact" not in said and hub.asked == []
    assert "repaired" in pulled.models("verify", "--repair")
    assert sorted(hub.served) == [UNET, vae]
    assert pulled.models("verify") == f"{name}: intact\n"


# Bounds that a sidecar keeps


@pytest.fixture
def here(pulled: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The cache of the machine is this process's own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(pulled.cache))
    for name, used in (("old", 1), ("older", 0), ("newer", 2)):
        add(pulled, name, used)
    os.utime(record(pulled, "small"), (3, 3))
    return pulled


def left(machine: Machine) -> set[str]:
    return {snapshot.repository.removeprefix("owner/") for snapshot in disk.snapshots()}


def await_left(machine: Machine, *names: str) -> None:
    deadline = time.monotonic() + 120
    while left(machine) != set(names):
        assert time.monotonic() < deadline, left(machine)
        time.sleep(0.02)


def test_models_are_kept_within_a_quota_and_a_number(here: Machine) -> None:
    size = disk.snapshots("owner/small")[0].bytes
    bounded = Upkeep(schema.Config(disk_quota=3 * size, cleanup_interval_ms=1000), ["owner/older"])
    bounded.begin()
    await_left(here, "older", "newer", "small")
    # And again, after a while.
    add(here, "third", 1)
    await_left(here, "older", "newer", "small")
    bounded.end()
    fewer = Upkeep(schema.Config(max_models=1), ["owner/newer"])
    fewer.begin()
    await_left(here, "newer")
    fewer.end()


def test_what_is_in_use_or_pinned_stays_whatever_the_bounds(here: Machine) -> None:
    with_lease = lease.take(here.snapshot("older"))
    bounded = Upkeep(schema.Config(disk_quota=0, max_models=1, cleanup_interval_ms=1000), ["owner/old"])
    bounded.begin()
    await_left(here, "old", "older")
    assert with_lease is not None
    with_lease.release()
    await_left(here, "old")
    bounded.end()


def planned(name: str, size: int) -> Plan:
    return Plan(f"owner/{name}", None, NEXT, "unknown", False, (File("model_index.json", size, "ab" * 32),))


def test_a_download_makes_room_or_is_refused(here: Machine) -> None:
    size = disk.snapshots("owner/small")[0].bytes
    Upkeep(schema.Config(), []).make_room(planned("next", 10**15))
    assert len(left(here)) == 4
    Upkeep(schema.Config(disk_quota=4 * size), []).make_room(planned("next", size))
    assert left(here) == {"old", "newer", "small"}
    # A new revision of one that is here is no further model, and does not push out the one that it is of.
    Upkeep(schema.Config(max_models=3), []).make_room(planned("old", size))
    assert left(here) == {"old", "newer", "small"}
    keep = ["owner/old", "owner/newer", "owner/small"]
    with pytest.raises(ImageError, match="and disk_quota leaves") as refused:
        Upkeep(schema.Config(disk_quota=4 * size - 1), keep).make_room(planned("next", size))
    assert refused.value.kind == "model_load_failed"
    with pytest.raises(ImageError, match="there are 3 models already, which is max_models"):
        Upkeep(schema.Config(max_models=3), keep).make_room(planned("next", size))
    assert left(here) == {"old", "newer", "small"}


# rm and prune


@pytest.mark.slow
def test_a_loaded_model_is_not_deleted(
    pulled: Machine, ready: Callable[..., Sidecar], tracked: Tracked
) -> None:
    env = pulled.env | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(pulled.cache)}
    sidecar = ready(env=env, models=[{"id": "owner/small"}], default_model="owner/small")
    sidecar.send({"t": "load_model", "id": "load", "model": "owner/small"})
    sidecar.expect("done", id="load", timeout=180)
    assert pulled.listed()["owner/small"]["in_use"] is True
    said = pulled.models("rm", "owner/small", code=2)
    assert "owner/small is in use and cannot be deleted now" in said
    assert "more than the quota stays" in pulled.models("prune", "--quota", "0", code=1)
    assert pulled.listed()["owner/small"]["state"] == "complete"

    sidecar.send({"t": "unload_model", "id": "unload", "model": "owner/small"})
    sidecar.expect("done", id="unload")
    assert pulled.listed()["owner/small"]["in_use"] is False
    sidecar.send({"t": "load_model", "id": "again", "model": "owner/small"})
    sidecar.expect("done", id="again", timeout=180)
    assert pulled.listed()["owner/small"]["in_use"] is True

    sidecar.signal(9)
    sidecar.wait()
    assert tracked.gone()
    assert pulled.models("rm", "owner/small") == f"Deleted owner/small {COMMIT[:12]}\n"
    assert not pulled.repository().exists() and pulled.listed() == {}
    assert "owner/small is not in the cache" in pulled.models("rm", "owner/small", code=2)


def test_prune_deletes_the_longest_unused_first(pulled: Machine) -> None:
    for name, used in (("newest", 3e9), ("oldest", 1e9), ("middle", 2e9)):
        add(pulled, name, used)
    shutil.rmtree(pulled.repository())
    size = pulled.listed()["owner/oldest"]["bytes"]
    blobs = pulled.repository("newest") / "blobs"
    (blobs / "abandoned.incomplete").write_bytes(b"x" * 1000)
    os.utime(blobs / "abandoned.incomplete", (1e9, 1e9))
    (blobs / "running.incomplete").write_bytes(b"x" * 1000)
    # Not a model of ours: neither counted nor touched.
    other = pulled.cache / "models--owner--language" / "snapshots" / COMMIT / "model.safetensors"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"x" * 100_000)

    quota = str(2 * size + 2000)
    said = pulled.models("prune", "--quota", quota, "--dry-run")
    assert "Would delete owner/oldest" in said and "middle" not in said
    assert len(pulled.listed()) == 3 and (blobs / "abandoned.incomplete").exists()

    said = pulled.models("prune", "--quota", quota, "--keep", "owner/oldest")
    assert "Deleted 1 beginnings" in said and "Deleted owner/middle" in said
    assert set(pulled.listed()) == {"owner/oldest", "owner/newest"}
    assert [path.name for path in blobs.glob("*.incomplete")] == ["running.incomplete"]

    held = lease.take(pulled.snapshot("oldest"))
    os.utime(record(pulled, "oldest"), (1e9, 1e9))
    assert "Deleted owner/newest" in pulled.models("prune", "--quota", f"{size / 1e6 + 0.001:.3f}MB")
    assert held is not None and set(pulled.listed()) == {"owner/oldest"}
    assert other.exists()


@pytest.mark.parametrize("size", ["", "many", "-1", "4XB", "1e3"])
def test_a_wrong_quota_is_one_line(machine: Machine, size: str) -> None:
    said = machine.models("prune", f"--quota={size}", code=2)
    assert said == f"starweave-image: quota must be a size such as 40GB or 500MB, got {size}\n"


def test_a_cache_with_a_link_to_nothing_can_be_deleted_from(pulled: Machine) -> None:
    pulled.blob(UNET).unlink()
    assert pulled.listed()["owner/small"]["state"] == "incomplete"
    pulled.models("rm", "owner/small")
    assert not pulled.repository().exists()


# list


def test_the_list_has_what_is_in_the_package_and_in_folders(pulled: Machine, small: Path) -> None:
    said = pulled.models("list", "--local", f"my/own={small}").splitlines()
    assert said[0].split() == ["ID", "REVISION", "SIZE", "LAST", "USE", "STATE", "LICENCE"]
    assert [line.split()[0] for line in said[1:-1]] == ["starweave/tiny", "my/own", "owner/small"]
    assert ["embedded", "local", "complete"] == [line.split()[-2] for line in said[1:-1]]
    assert "local must be ID=FOLDER" in pulled.models("list", "--local", "my/own", code=2)


def test_what_only_handles_files_starts_without_torch(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap/torch.py").write_text("raise RuntimeError('torch is imported')\n")
    machine.env["PYTHONPATH"] = f"{tmp_path / 'trap'}:{machine.env['PYTHONPATH']}"
    process = machine.start("generate", "a cat")
    assert "torch is imported" in process.communicate()[1]
    machine.models("pull", "owner/small", "--yes")
    assert machine.listed()["owner/small"]["state"] == "complete"
    assert "intact" in machine.models("verify")
    assert "0 B after" in machine.models("prune", "--quota", "0")


# leases


def test_a_lease_ends_with_whoever_holds_it(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--small" / "snapshots" / COMMIT
    assert lease.take(tmp_path) is None and lease.last_used(folder) is None
    assert not lease.in_use(folder)
    first, second = lease.take(folder), lease.take(folder)
    assert first is not None and second is not None and lease.in_use(folder)
    with lease.alone(folder) as free:
        assert not free
    first.release()
    assert lease.in_use(folder)
    del second
    gc.collect()
    assert not lease.in_use(folder)
    with lease.alone(folder) as free:
        assert free and lease.in_use(folder)


def test_an_attached_command_ends_with_its_input(hub: Hub, machine: Machine, wide: Path) -> None:
    hub.repositories["owner/wide"] = Repository({COMMIT: wide})
    reached, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        reached.set()
        go_on.wait()

    hub.limit, hub.at_limit = 1000, wait
    process = machine.start("models", "pull", "owner/wide", "--yes", "--attached", stdin=subprocess.PIPE)
    assert reached.wait(200) and process.poll() is None
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(30) == 130
    go_on.set()

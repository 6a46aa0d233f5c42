"""Many requests at once: which passes they share, and what becomes of them when a pass fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from engines import PATIENCE_S, Bench, difference
from starweave_image import schema
from starweave_image.device.executor import Memory
from starweave_image.errors import is_device_lost, is_out_of_memory
from starweave_image.weights import load as loading

SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


class Passes:
    """What the real denoiser of each loaded model was asked for: the rows of each pass, in order. `before` is called
    ahead of each pass with its arguments by name, and may raise."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.before: Callable[[dict[str, Any]], None] = lambda arguments: None

    def watch(self, pipeline: Any) -> None:
        def hook(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
            arguments = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs
            self.rows.append(len(arguments["sample"]))
            self.before(arguments)

        pipeline.unet.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Passes]:
    passes = Passes()
    load = loading.load_pipeline

    def watched(*arguments: Any) -> Any:
        pipeline = load(*arguments)
        passes.watch(pipeline)
        return pipeline

    monkeypatch.setattr("starweave_image.engine.models.load_pipeline", watched)
    yield passes


def bench_of(folder: Path, **config: Any) -> Bench:
    models = [schema.ModelEntry(id="local/sd", path=str(folder))]
    return Bench(models=models, default_model="local/sd", dtype="float32", **config).start()


def together(bench: Bench, requests: list[dict[str, Any]], name: str = "t") -> list[str]:
    """Submit the requests so that none begins to draw before all were accepted."""
    hold = threading.Event()
    ids = [f"{name}{index}" for index in range(len(requests))]
    bench.on |= dict.fromkeys(
        ids, lambda message: hold.wait(PATIENCE_S) if isinstance(message, schema.Accepted) else None
    )
    for id, fields in zip(ids, requests, strict=True):
        bench.submit(id, **fields)
    for id in ids:
        bench.wait_for(lambda id=id: bench.of(id, schema.Accepted) or None)  # type: ignore[misc]
    hold.set()
    return ids


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_requests_that_differ_in_all_but_shape_share_their_passes(folder: Path, passes: Passes) -> None:
    bench = bench_of(folder)
    requests: list[dict[str, Any]] = [
        SMALL | {"seed": 1, "steps": 12},
        SMALL | {"seed": 2, "prompt": "a cat in the night", "negative_prompt": "red", "steps": 12},
        SMALL | {"seed": 3, "guidance_scale": 1.0, "steps": 11},
        SMALL | {"seed": 4, "scheduler": "euler", "steps": 10},
        SMALL | {"seed": 5, "guidance_scale": 3.0, "scheduler": "dpm_solver_multistep", "steps": 9},
    ]
    alone = [bench.done(**fields)[1] for fields in requests]
    steps_alone = len(passes.rows)
    assert set(passes.rows) == {1, 2}
    bench.done(num_images=8, seed=1, **SMALL)
    passes.rows.clear()
    ids = together(bench, requests)
    for id, files in zip(ids, alone, strict=True):
        assert isinstance(bench.end(id), schema.Done)
        assert difference(bench.files(id), files) <= 1
    # Guidance makes two rows, its lack one: all five together are nine.
    assert max(passes.rows) == 9
    assert len(passes.rows) < steps_alone / 2


def test_the_pictures_of_one_request_share_their_passes(folder: Path, passes: Passes) -> None:
    bench = bench_of(folder)
    alone = [bench.done(seed=seed, **SMALL)[1][0] for seed in range(5, 9)]
    bench.done(num_images=4, seed=1, **SMALL)
    passes.rows.clear()
    _, files = bench.done(num_images=4, seed=5, **SMALL)
    assert difference(files, alone) <= 1
    assert max(passes.rows) == 8 and len(passes.rows) < 16


def test_what_is_to_be_reproducible_runs_alone_and_holds_nobody_up(folder: Path, passes: Passes) -> None:
    bench = bench_of(folder)
    exact = SMALL | {"seed": 7, "reproducible": True}
    alone = bench.done(**exact)[1]
    ids = together(bench, [exact, *(SMALL | {"seed": seed} for seed in (1, 2, 3)), exact])
    assert all(isinstance(bench.end(id), schema.Done) for id in ids)
    assert bench.files(ids[0]) == bench.files(ids[-1]) == alone
    assert bench_of(folder).done(**exact)[1] == alone


def test_cancel_of_one_member_frees_it_within_a_step_and_changes_no_other(
    folder: Path, passes: Passes
) -> None:
    bench = bench_of(folder)
    requests = [SMALL | {"seed": seed, "steps": 20} for seed in (1, 2, 3)]
    alone = [bench.done(**fields)[1] for fields in requests]
    ids = together(bench, requests)

    def cancel(message: Any) -> None:
        if isinstance(message, schema.Progress) and message.step and not cancelled:
            cancelled.append(message.step)
            bench.engine.cancel("t1")

    cancelled: list[int] = []
    bench.on["t1"] = cancel
    ended = bench.end("t1")
    assert isinstance(ended, schema.Failed) and ended.kind == "cancelled"
    assert max(m.step for m in bench.of("t1", schema.Progress)) == cancelled[0] < 20
    for id, files in ((ids[0], alone[0]), (ids[2], alone[2])):
        assert isinstance(bench.end(id), schema.Done)
        assert difference(bench.files(id), files) <= 1


def test_one_who_spoils_a_pass_fails_alone(folder: Path, passes: Passes) -> None:
    bench = bench_of(folder)
    requests = [SMALL | {"seed": seed, "steps": 6} for seed in (1, 2)]
    alone = [bench.done(**fields)[1] for fields in requests]
    seen: list[set[float]] = []
    passes.before = lambda arguments: seen.append({float(t) for t in arguments["timestep"].flatten()})
    bench.done(**(SMALL | {"steps": 5}))
    poison = set.union(*seen) - {t for steps in (6,) for t in timesteps(folder, steps)}
    assert poison

    def spoil(arguments: dict[str, Any]) -> None:
        if poison & {float(t) for t in arguments["timestep"].flatten()}:
            raise ValueError("no")

    passes.before = spoil
    ids = together(bench, [*requests, SMALL | {"steps": 5}])
    ended = bench.end(ids[2])
    assert isinstance(ended, schema.Failed) and ended.kind == "internal"
    for id, files in zip(ids, alone, strict=False):
        assert isinstance(bench.end(id), schema.Done)
        assert difference(bench.files(id), files) <= 1


def timesteps(folder: Path, steps: int) -> list[float]:
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler.from_pretrained(str(folder), subfolder="scheduler")
    scheduler.set_timesteps(steps)
    return [float(t) for t in scheduler.timesteps]


def test_out_of_memory_makes_passes_smaller_and_no_request_fails(
    folder: Path, passes: Passes, caplog: pytest.LogCaptureFixture
) -> None:
    bench = bench_of(folder)
    requests = [SMALL | {"seed": seed} for seed in range(4)]
    alone = [bench.done(**fields)[1] for fields in requests]
    bench.done(num_images=4, seed=0, **SMALL)
    passes.before = lambda arguments: out_of_memory() if len(arguments["sample"]) > 4 else None
    passes.rows.clear()
    ids = together(bench, [fields | {"steps": 12} for fields in requests])
    assert all(isinstance(bench.end(id), schema.Done) for id in ids)
    # What was too much is not tried twice.
    too_much = [rows for rows in passes.rows if rows > 4]
    assert too_much and len(too_much) == len(set(too_much))
    assert "do not fit into memory together" in caplog.text
    passes.rows.clear()
    ids = together(bench, requests, "again")
    for id, files in zip(ids, alone, strict=True):
        assert isinstance(bench.end(id), schema.Done)
        assert difference(bench.files(id), files) <= 1
    assert max(passes.rows) <= min(too_much)


@pytest.mark.slow
def test_out_of_memory_with_one_picture_draws_it_by_halves(folder: Path, passes: Passes) -> None:
    bench = bench_of(folder)
    [alone] = [bench.done(seed=1, **SMALL)[1]]
    passes.before = lambda arguments: out_of_memory() if len(arguments["sample"]) > 1 else None
    done, files = bench.done(seed=1, **SMALL)
    assert difference(files, alone) <= 1
    assert [notice.partition(":")[0] for notice in done.notices] == [
        "Drawn in smaller passes, because memory was short"
    ]
    # What must be reproducible is not drawn in another way than before.
    ended = bench.generate(seed=1, reproducible=True, **SMALL)
    assert isinstance(ended, schema.Failed) and (ended.kind, ended.retryable) == ("out_of_memory", False)
    passes.before = lambda arguments: None
    assert isinstance(bench.generate(**SMALL), schema.Done)


def test_out_of_memory_lets_idle_models_go_first(folder: Path, passes: Passes) -> None:
    models = [schema.ModelEntry(id=f"local/{name}", path=str(folder)) for name in ("sd", "idle")]
    bench = Bench(models=models, default_model="local/sd", dtype="float32").start()
    bench.done(model="local/idle", **SMALL)
    alone = bench.done(seed=1, **SMALL)[1]
    crowded = lambda: "local/idle" in bench.engine.snapshot().resident  # noqa: E731
    passes.before = lambda arguments: out_of_memory() if crowded() else None
    passes.rows.clear()
    assert bench.done(seed=1, **SMALL)[1] == alone
    assert set(passes.rows) == {2} and bench.engine.snapshot().resident == ["local/sd"]


def test_out_of_memory_in_the_decoder_draws_tile_by_tile(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load = loading.load_pipeline

    def loaded(*arguments: Any) -> Any:
        pipeline = load(*arguments)

        def hook(decoder: Any, args: tuple[Any, ...]) -> None:
            if args[0].shape[-1] > 48:
                out_of_memory()

        pipeline.vae.decoder.register_forward_pre_hook(hook)
        return pipeline

    whole = bench_of(folder).done(seed=1, **(SMALL | {"width": 128, "steps": 1}))[1]
    monkeypatch.setattr("starweave_image.engine.models.load_pipeline", loaded)
    bench = bench_of(folder)
    done, files = bench.done(seed=1, **(SMALL | {"width": 128, "steps": 1}))
    assert "tile by tile" in caplog.text
    assert done.notices == ["Drawn in tiles, because memory was short: slight differences are possible."]
    assert 0 < difference(files, whole) < 255


@pytest.mark.slow
def test_memory_that_is_short_is_told_to_whoever_sends_requests(folder: Path, passes: Passes) -> None:
    bench = bench_of(folder, capacity=8)
    bench.done(num_images=4, **SMALL)
    passes.before = lambda arguments: out_of_memory() if len(arguments["sample"]) > 4 else None
    told: list[tuple[int, int]] = []

    def look(message: Any) -> None:
        snapshot = bench.engine.snapshot()
        told.append((snapshot.capacity, snapshot.grant))

    bench.on["long"] = look
    long = bench.submit("long", **(SMALL | {"steps": 30, "num_images": 4}))
    assert isinstance(bench.end(long), schema.Done)
    assert min(capacity for capacity, _ in told) < 8
    assert all(0 <= grant <= capacity for capacity, grant in told)
    assert bench.engine.snapshot().capacity == 8


def test_two_models_take_turns(tmp_path: Path, folder: Path, passes: Passes) -> None:
    other = checkpoints.stable_diffusion_xl(tmp_path / "xl")
    models = [
        schema.ModelEntry(id="local/sd", path=str(folder)),
        schema.ModelEntry(id="local/xl", path=str(other)),
    ]
    bench = Bench(models=models, default_model="local/sd", dtype="float32").start()
    for model in ("local/sd", "local/xl"):
        bench.done(model=model, **SMALL)
    many = [SMALL | {"steps": 60, "model": "local/sd"}] * 4
    ids = together(bench, [*many, SMALL | {"steps": 60, "model": "local/xl"}])
    for id in ids:
        assert isinstance(bench.end(id), schema.Done)
    order = [
        m.id for m in bench.said if isinstance(m, schema.Progress) and m.phase == "denoising" and m.id in ids
    ]
    # The lone one does not wait for the four to be done, nor they for it.
    first, last = order.index(ids[4]), len(order) - 1 - order[::-1].index(ids[4])
    assert any(id != ids[4] for id in order[first:last])
    assert {ids[0], ids[4]} <= set(order[: len(order) // 2])


def test_the_text_encoder_is_asked_once_for_each_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    load = loading.load_pipeline

    def loaded(*arguments: Any) -> Any:
        pipeline = load(*arguments)
        pipeline.text_encoder.register_forward_pre_hook(lambda module, args: asked.append(1))
        return pipeline

    monkeypatch.setattr("starweave_image.engine.models.load_pipeline", loaded)
    bench = bench_of(folder)
    first = bench.done(seed=1, **SMALL)[1]
    assert len(asked) == 2
    assert len(bench.done(seed=1, num_images=3, **SMALL)[1]) == 3 and len(asked) == 2
    assert bench.done(seed=1, **SMALL)[1] == first and len(asked) == 2
    bench.done(prompt="a cat", **SMALL)
    assert len(asked) == 3


def test_a_stuck_member_does_not_hold_up_the_others(folder: Path, passes: Passes) -> None:
    bench = bench_of(folder)
    bench.done(num_images=2, **SMALL)
    go_on = threading.Event()
    ids = together(bench, [SMALL | {"seed": 1}, SMALL | {"seed": 2}])
    bench.on[ids[0]] = lambda m: (
        go_on.wait(PATIENCE_S) if isinstance(m, schema.Progress) and m.step == 1 else None
    )
    assert isinstance(bench.end(ids[1]), schema.Done)
    go_on.set()
    assert isinstance(bench.end(ids[0]), schema.Done)


def test_a_pass_that_hangs_is_told_apart_from_requests_that_wait(folder: Path, passes: Passes) -> None:
    bench = bench_of(folder)
    bench.done(**SMALL)
    assert bench.engine.snapshot().device_work is None
    hangs, go_on = threading.Event(), threading.Event()

    def hang(_: dict[str, Any]) -> None:
        hangs.set()
        assert go_on.wait(PATIENCE_S)

    passes.before = hang
    ids = [bench.submit(**SMALL)]
    assert hangs.wait(PATIENCE_S)
    ids.append(bench.submit(**SMALL))

    def stands() -> schema.Snapshot | None:
        snapshot = bench.engine.snapshot()
        settled = len(snapshot.running) == 2 and all(entry.waits for entry in snapshot.running)
        long = snapshot.device_work is not None and snapshot.device_work.age_ms > 100
        return snapshot if settled and long else None

    deadline = time.monotonic() + PATIENCE_S
    while not (snapshot := stands()):
        assert time.monotonic() < deadline
    # The first request has shown how long such a pass takes.
    assert snapshot.device_work is not None and snapshot.device_work.known
    assert 0 < snapshot.device_work.usual_ms < 60_000
    passes.before = lambda arguments: None
    go_on.set()
    assert all(isinstance(bench.end(id), schema.Done) for id in ids)
    assert bench.engine.snapshot().device_work is None


def test_one_that_works_outside_of_the_device_does_not_wait(folder: Path) -> None:
    bench = bench_of(folder)
    seen: list[schema.Running] = []
    # Runs in the thread that draws the picture.
    bench.on["one"] = lambda message: seen.extend(bench.engine.snapshot().running)
    assert isinstance(bench.end(bench.submit("one", **SMALL)), schema.Done)
    moments = [(entry.phase, entry.waits) for entry in seen]
    assert {("denoising", False), ("decoding", False), ("encoding", False)} <= set(moments)
    assert all(entry.step_ms > 0 for entry in seen if entry.phase == "decoding")


def test_a_network_remembers_its_latest_answers() -> None:
    memory = Memory(budget=4096, most=3)
    whole = torch.zeros(4, 256)

    def kept() -> str:
        return "".join(question for question in "abcde" if memory.get(question) is not None)

    memory.put("a", {"first": whole[:1], "second": whole[1:]})
    assert kept() == "a"
    # Of four rows one is asked for, and all stay in memory.
    memory.put("b", (torch.zeros(4, 256)[0],))
    assert kept() == "b"
    memory.put("c", torch.zeros(1025))
    assert kept() == "b"
    small = {question: torch.zeros(1) for question in "acde"}
    memory.put("a", small["a"])
    assert kept() == "a"
    memory.put("c", small["c"])
    memory.put("d", small["d"])
    assert memory.get("a") is small["a"]
    memory.put("e", small["e"])
    assert kept() == "ade"


@pytest.mark.parametrize(
    ("words", "memory", "lost"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True, False),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True, False),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", True, False),
        ("CUDA error: device-side assert triggered", False, True),
        ("CUDA error: an illegal memory access was encountered", False, True),
        ("The size of tensor a (3) must match the size of tensor b (4)", False, False),
    ],
)
def test_what_an_error_of_the_device_means(words: str, memory: bool, lost: bool) -> None:
    error = RuntimeError(words)
    assert (is_out_of_memory(error), is_device_lost(error)) == (memory, lost)
    assert not is_device_lost(ValueError(words))

from __future__ import annotations

import io
import logging
import secrets
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from engines import PATIENCE_S, Bench, difference
from PIL import Image
from starweave_image import schema
from starweave_image.doors import log
from starweave_image.pictures import images
from starweave_image.weights import load as loading

SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.stable_diffusion(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="module")
def shared(folder: Path) -> Bench:
    return bench_of(folder)


@pytest.fixture
def bench(folder: Path) -> Iterator[Bench]:
    bench = bench_of(folder)
    yield bench
    bench.engine.drain(PATIENCE_S)


def bench_of(folder: Path, **config: Any) -> Bench:
    models = [schema.ModelEntry(id="local/sd", path=str(folder))]
    return Bench(models=models, default_model="local/sd", **config).start()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Model loads wait for it."""
    opened = threading.Event()
    load = loading.load_pipeline

    def gated(*arguments: Any) -> Any:
        assert opened.wait(PATIENCE_S)
        return load(*arguments)

    monkeypatch.setattr("starweave_image.engine.models.load_pipeline", gated)
    yield opened
    opened.set()


def error(end: schema.Done | schema.Failed) -> schema.Failed:
    assert isinstance(end, schema.Failed), end
    return end


def test_a_request_is_accepted_reports_each_step_and_ends_with_its_picture(bench: Bench) -> None:
    done, [data] = bench.done(id="one", seed=7, **SMALL)
    said = bench.of("one")
    assert [type(message) for message in said[:2]] == [schema.Accepted, schema.Progress]
    assert said[0] == schema.Accepted(
        id="one",
        model="local/sd",
        width=64,
        height=64,
        steps=4,
        guidance_scale=7.5,
        scheduler="DDIMScheduler",
        seeds=[7],
        format="png",
    )
    steps = [(m.phase, m.step, m.steps) for m in bench.of("one", schema.Progress)]
    assert steps == [
        ("loading", 0, 0),
        *(("denoising", step, 4) for step in range(1, 5)),
        ("decoding", 4, 4),
        ("encoding", 4, 4),
    ]
    assert [type(message) for message in said[-2:]] == [schema.ImagePart, schema.Done]
    assert Image.open(io.BytesIO(data)).size == (64, 64)
    assert done.timings is not None and set(done.timings) == {
        "queue",
        "load",
        "denoise",
        "decode",
        "encode",
        "total",
    }
    assert done.timings["denoise"] > 0 and done.timings["total"] >= sum(done.timings.values()) / 2 - 5
    snapshot = bench.engine.snapshot()
    assert snapshot.phase == "ready" and snapshot.grant == 8 and snapshot.resident == ["local/sd"]
    assert snapshot.counters == schema.Counters(accepted=1, done=1)


@pytest.mark.parametrize("reproducible", [True, False])
def test_eight_at_once_are_what_each_is_alone(folder: Path, reproducible: bool) -> None:
    bench = bench_of(folder, dtype="float32")
    wanted: list[dict[str, Any]] = [
        {"seed": 1, "steps": 40},
        {"seed": 1, "steps": 9, "guidance_scale": 3.0},
        {"seed": 2, "steps": 6, "scheduler": "euler"},
        {"seed": 2, "steps": 7, "scheduler": "EulerAncestralDiscreteScheduler"},
        {"seed": 3, "steps": 5, "scheduler": "dpm_solver_multistep", "negative_prompt": "blue"},
        {"seed": 4, "steps": 6, "prompt": "a green tree on the sky of the night in the dog of a cat"},
        {"seed": 5, "steps": 8, "scheduler": "unipc", "guidance_scale": 0.0},
        {"seed": 6, "steps": 5, "scheduler": "heun", "width": 96},
    ]
    requests = [{"width": 64, "height": 64, "reproducible": reproducible} | fields for fields in wanted]
    alone = [bench.done(**fields)[1] for fields in requests]
    ids = [bench.submit(**fields) for fields in requests]
    for id, files in zip(ids, alone, strict=True):
        assert isinstance(bench.end(id), schema.Done)
        assert bench.files(id) == files if reproducible else difference(bench.files(id), files) <= 1
    assert len({files[0] for files in alone}) == len(alone)
    # They advanced together: the longest was in the middle of its steps while each of the others took its first.
    order = [m.id for m in bench.said if isinstance(m, schema.Progress) and m.phase == "denoising"]
    longest, *others = ids
    assert max(order.index(id) for id in others) < len(order) - order[::-1].index(longest)


def test_nothing_computes_while_a_load_changes_the_default_dtype(folder: Path, tmp_path: Path) -> None:
    other = checkpoints.stable_diffusion_xl(tmp_path / "xl")
    models = [
        schema.ModelEntry(id="local/sd", path=str(folder)),
        schema.ModelEntry(id="local/xl", path=str(other)),
    ]
    bench = Bench(models=models, default_model="local/sd", dtype="bfloat16").start()
    alone = bench.done(seed=1, **SMALL)[1]
    seen: list[torch.dtype] = []
    ended: list[Any] = []

    def watch(message: Any) -> None:
        # Runs in the thread that holds the device.
        if isinstance(message, schema.Progress) and message.step == 1:
            bench.engine.load_model("load", "local/xl")
            pause = threading.Event()
            for _ in range(2000):
                seen.append(torch.get_default_dtype())
                pause.wait(0.001)
            ended.extend(bench.of("load", schema.Done))

    bench.on["watch"] = watch
    assert isinstance(bench.end(bench.submit("watch", seed=1, **SMALL)), schema.Done)
    assert ended == [] and set(seen) == {torch.float32}
    assert isinstance(bench.end("load"), schema.Done)
    assert bench.files("watch") == alone and torch.get_default_dtype() == torch.float32


def test_each_of_several_images_is_what_its_seed_alone_gives(shared: Bench) -> None:
    done, files = shared.done(seed=2**63 - 2, num_images=3, reproducible=True, **SMALL)
    assert done.parameters is not None and done.parameters["seeds"] == [2**63 - 2, 2**63 - 1, 0]
    for seed, data in zip(done.parameters["seeds"], files, strict=True):
        assert shared.done(seed=seed, reproducible=True, **SMALL)[1] == [data]


@pytest.mark.parametrize("seed", [None, -1])
def test_an_open_seed_is_fresh_and_reported(shared: Bench, seed: int | None) -> None:
    drawn = [shared.done(seed=seed, **(SMALL | {"steps": 1}))[0].parameters for _ in range(2)]
    seeds = [parameters["seed"] for parameters in drawn if parameters]
    assert len(set(seeds)) == 2 and all(0 <= seed < 2**53 for seed in seeds)


def test_the_highest_seed_that_is_drawn_leaves_room_for_those_of_all_images(
    shared: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "randbelow", lambda below: below - 1)
    parameters = shared.done(num_images=16, **(SMALL | {"steps": 1}))[0].parameters
    assert parameters is not None and parameters["seeds"] == [*range(2**53 - 17, 2**53 - 1)]


def test_a_long_schedule_reports_the_steps_it_really_takes(shared: Bench) -> None:
    id = shared.submit(scheduler="heun", **SMALL)
    shared.end(id)
    denoising = [m for m in shared.of(id, schema.Progress) if m.phase == "denoising"]
    assert [m.step for m in denoising] == list(range(1, 8)) and {m.steps for m in denoising} == {7}


def test_cancel_ends_a_request_before_its_next_step_and_no_other(bench: Bench) -> None:
    other = bench.submit(seed=3, **(SMALL | {"steps": 8}))

    def cancel_after_two(message: Any) -> None:
        if isinstance(message, schema.Progress) and message.step == 2:
            bench.engine.cancel("doomed")

    bench.on["doomed"] = cancel_after_two
    ended = error(bench.end(bench.submit("doomed", **(SMALL | {"steps": 50}))))
    assert ended.kind == "cancelled" and not ended.retryable
    assert max(m.step for m in bench.of("doomed", schema.Progress)) == 2
    assert isinstance(bench.end(other), schema.Done)
    assert bench.files(other) == bench.done(seed=3, **(SMALL | {"steps": 8}))[1]
    assert bench.engine.snapshot().counters.cancelled == 1


def test_cancel_reaches_a_request_that_waits_for_the_device(bench: Bench) -> None:
    bench.done(**SMALL)
    bench.on["first"] = lambda message: waiting(message)

    def waiting(message: Any) -> None:
        # Runs in the thread that holds the device: the second cannot get it before this returns.
        if isinstance(message, schema.Progress) and message.step == 1:
            bench.submit("second", **SMALL)
            bench.wait_for(lambda: bench.of("second", schema.Accepted) or None)
            bench.engine.cancel("second")
            assert error(bench.end("second")).kind == "cancelled"

    assert isinstance(bench.end(bench.submit("first", **SMALL)), schema.Done)
    assert not [m for m in bench.of("second", schema.Progress) if m.step]


@pytest.mark.parametrize("phase", ["decoding", "encoding"])
def test_cancel_after_the_last_step_ends_a_request_without_its_picture(bench: Bench, phase: str) -> None:
    def cancel(message: Any) -> None:
        if isinstance(message, schema.Progress) and message.phase == phase:
            bench.engine.cancel("doomed")

    bench.on["doomed"] = cancel
    assert error(bench.end(bench.submit("doomed", **SMALL))).kind == "cancelled"
    assert bench.of("doomed", schema.Progress)[-1].phase == phase
    assert bench.of("doomed", schema.ImagePart, schema.Done) == []
    assert bench.engine.snapshot().counters.cancelled == 1
    assert isinstance(bench.generate(**SMALL), schema.Done)


def test_cancelling_what_does_not_run_does_nothing(shared: Bench) -> None:
    before = len(shared.said)
    shared.engine.cancel("nobody")
    assert shared.said[before:] == []


def test_a_deadline_is_kept_between_steps(bench: Bench) -> None:
    bench.done(**SMALL)
    passed = threading.Event()

    def linger(message: Any) -> None:
        if isinstance(message, schema.Progress) and message.step == 1:
            passed.wait(1.0)

    bench.on["late"] = linger
    ended = error(bench.end(bench.submit("late", timeout_ms=900, **SMALL)))
    assert (ended.kind, ended.retryable) == ("timeout", True)
    assert max((m.step for m in bench.of("late", schema.Progress)), default=0) <= 1


def test_cancel_and_deadline_end_a_request_while_its_model_loads(bench: Bench, gate: threading.Event) -> None:
    ids = [bench.submit(id, **SMALL) for id in ("stays", "leaves")]
    late = bench.submit("late", timeout_ms=50, **SMALL)
    bench.wait_for(lambda: all(bench.of(id, schema.Progress) for id in ids) or None)
    assert bench.engine.snapshot().phase == "loading"
    assert [card.state for card in bench.engine.models() if card.id == "local/sd"] == ["loading"]
    bench.engine.load_model("operation", "local/sd")
    bench.wait_for(lambda: bench.of("operation", schema.Progress) or None)
    for id in ("leaves", "operation"):
        bench.engine.cancel(id)
        assert error(bench.end(id)).kind == "cancelled"
    assert error(bench.end(late)).kind == "timeout"
    gate.set()
    assert isinstance(bench.end("stays"), schema.Done)


def test_above_capacity_is_overload_and_an_id_that_runs_is_refused(
    folder: Path, gate: threading.Event
) -> None:
    bench = bench_of(folder, capacity=2)
    bench.submit("a", **SMALL)
    bench.submit("b", **SMALL)
    assert bench.engine.snapshot().grant == 0
    refused = error(bench.end(bench.submit("c", **SMALL)))
    assert (refused.kind, refused.retryable) == ("overloaded", True)
    bench.submit("a", **SMALL)
    assert [m.kind for m in bench.of("a", schema.Failed)] == ["invalid_request"]
    gate.set()
    bench.wait_for(lambda: bench.of("a", schema.Done) or None)
    assert isinstance(bench.end("b"), schema.Done)
    assert bench.engine.snapshot().grant == 2


def test_who_reads_the_end_of_a_request_may_send_the_next(folder: Path) -> None:
    bench = bench_of(folder, capacity=1)
    ended = []

    def again(message: Any) -> None:
        if isinstance(message, schema.Done):
            ended.append(message)
            if len(ended) < 6:
                bench.submit("same", **(SMALL | {"steps": 1}))

    bench.on["same"] = again
    bench.submit("same", **(SMALL | {"steps": 1}))
    bench.wait_for(lambda: bench.of("same", schema.Done)[5:] or None)
    assert bench.of("same", schema.Failed) == []


def test_out_of_memory_and_the_unexpected_end_one_request_only(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load = loading.load_pipeline
    # By the width of what they decode.
    failures: dict[int, tuple[type[Exception], str]] = {
        72: (torch.OutOfMemoryError, "CUDA out of memory"),
        80: (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        88: (ZeroDivisionError, "/secret/path"),
    }
    latents: dict[int, weakref.ref[torch.Tensor]] = {}
    logged: list[str | None] = []

    def loaded(*arguments: Any) -> Any:
        pipeline = load(*arguments)
        decode = pipeline.vae.decode

        def failing(z: torch.Tensor, **kwargs: Any) -> Any:
            if failure := failures.get(z.shape[-1] * 2):
                latents[z.shape[-1] * 2] = weakref.ref(z)
                kind, message = failure
                raise kind(message)
            return decode(z, **kwargs)

        pipeline.vae.decode = failing
        return pipeline

    class Ids(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(log.request_id.get())

    handler = Ids(logging.ERROR)
    logging.getLogger("starweave_image").addHandler(handler)
    monkeypatch.setattr("starweave_image.engine.models.load_pipeline", loaded)
    short = [bench.submit(**(SMALL | {"width": width})) for width in list(failures)]
    long = bench.submit(seed=9, **(SMALL | {"steps": 12}))
    *memory, unexpected = (error(bench.end(id)) for id in short)
    logging.getLogger("starweave_image").removeHandler(handler)
    assert [(end.kind, end.retryable) for end in memory] == [("out_of_memory", True)] * 2
    assert unexpected.kind == "internal" and "secret" not in unexpected.message
    assert logged == [short[-1]]
    assert "/secret/path" in caplog.text
    assert isinstance(bench.end(long), schema.Done)
    assert bench.engine.snapshot().counters == schema.Counters(accepted=4, done=1, failed=3)
    # Nothing refers any more to what those that ran out of memory had allocated, without a collection.
    bench.engine.drain(PATIENCE_S)
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("request ")]:
        thread.join(PATIENCE_S)
    assert (latents[72](), latents[80]()) == (None, None)


def test_a_picture_that_the_safety_checker_withholds_is_an_error(tmp_path: Path) -> None:
    bench = bench_of(checkpoints.guarded(tmp_path / "guarded"))
    assert error(bench.generate(**SMALL)).kind == "unsafe_content"


def test_drain_waits_then_cancels(folder: Path) -> None:
    bench = bench_of(folder)
    bench.done(**SMALL)
    patient = bench.submit(**SMALL)
    bench.engine.drain(PATIENCE_S)
    assert isinstance(bench.end(patient), schema.Done)
    assert bench.engine.snapshot().phase == "draining"
    assert error(bench.generate(**SMALL)).kind == "unavailable"

    bench = bench_of(folder)
    begun, drained = threading.Event(), threading.Event()

    def hold(message: Any) -> None:
        if isinstance(message, schema.Progress) and message.step == 1:
            begun.set()
            assert drained.wait(PATIENCE_S)

    bench.on["endless"] = hold
    endless = bench.submit("endless", **SMALL)
    assert begun.wait(PATIENCE_S)
    drain = threading.Thread(target=bench.engine.drain, args=(0.0,))
    drain.start()
    bench.wait_for(lambda: bench.engine.snapshot().phase == "draining" or None)
    drained.set()
    drain.join(PATIENCE_S)
    ended = error(bench.end(endless))
    # Another sidecar can do it.
    assert (ended.kind, ended.retryable) == ("cancelled", True)
    assert [type(m) for m in bench.of(endless)].count(schema.Failed) == 1


def test_a_model_is_loaded_and_unloaded_by_name(bench: Bench) -> None:
    bench.engine.load_model("load", "local/sd")
    assert isinstance(bench.end("load"), schema.Done)
    assert [m.phase for m in bench.of("load", schema.Progress)] == ["loading"]
    # Whoever has the answer finds the model's new state.
    assert states(bench, "load")["local/sd"] == "loaded"
    assert bench.engine.snapshot().resident == ["local/sd"]

    def unload_while_running(message: Any) -> None:
        if isinstance(message, schema.Progress) and message.step == 1:
            bench.engine.unload_model("too soon", "local/sd")
            bench.end("too soon")

    bench.on["user"] = unload_while_running
    assert isinstance(bench.end(bench.submit("user", **SMALL)), schema.Done)
    refused = error(bench.end("too soon"))
    assert (refused.kind, refused.retryable) == ("invalid_request", True)
    bench.engine.unload_model("unload", "local/sd")
    assert isinstance(bench.end("unload"), schema.Done)
    assert states(bench, "unload")["local/sd"] == "available"
    assert bench.engine.snapshot().resident == []
    bench.engine.load_model("unknown", "local/nobody")
    assert error(bench.end("unknown")).kind == "model_not_found"


def states(bench: Bench, id: str) -> dict[str, str]:
    """Of each model, as told just before the end of the operation `id`."""
    [*_, told, end] = bench.of(id)
    assert isinstance(told, schema.Models) and isinstance(end, schema.Done)
    return {card.id: card.state for card in told.models}


def test_a_snapshot_shows_where_each_request_stands(bench: Bench) -> None:
    assert Bench().engine.snapshot().phase == "starting"
    seen: list[schema.Snapshot] = []

    def look(message: Any) -> None:
        if isinstance(message, schema.Progress) and message.step == 3:
            seen.append(bench.engine.snapshot())

    bench.on["watched"] = look
    bench.end(bench.submit("watched", **SMALL))
    [snapshot] = seen[:1]
    [running] = snapshot.running
    assert (snapshot.phase, snapshot.grant) == ("busy", 7)
    assert (running.id, running.phase, running.step, running.steps) == ("watched", "denoising", 3, 4)
    assert 0 <= running.step_age_ms < 60_000 and 0 <= running.step_ms < 60_000


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_file_tells_how_it_was_made(shared: Bench, format: str) -> None:
    fields = {"seed": 5, "style": "blue sky", "format": format, "scheduler": "euler"} | SMALL
    done, [data] = shared.done(**fields)
    record = images.read(data)
    assert record is not None and done.parameters == {**record, "seeds": [5]}
    assert record["prompt"] == "a red apple, blue sky"
    assert (record["scheduler"], record["model"]) == ("EulerDiscreteScheduler", "local/sd")
    environment = record["environment"]
    assert environment["torch"] == torch.__version__ and len(environment["checksum"]) == 64
    assert shared.done(**fields)[1] == [data]
    [bare] = shared.done(metadata=False, **fields)[1]
    assert images.read(bare) is None and b"apple" not in bare
    assert Image.open(io.BytesIO(bare)).format == format.upper()


def test_notices_say_what_of_the_request_was_not_used(shared: Bench) -> None:
    assert shared.done(**SMALL)[0].notices == []
    [cut] = shared.done(prompt="a red apple on the tree " * 8, **SMALL)[0].notices
    assert cut.startswith("prompt is longer")
    [unused] = shared.done(negative_prompt="a dog", guidance_scale=1.0, **SMALL)[0].notices
    assert unused == "negative_prompt has no effect at a guidance_scale of 1 or less."


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"width": 136}, "width", "width must be a multiple of 8 from 64 to 128 for local/sd, got 136"),
        ({"image": b"\x89PNG\r\n\x1a\n...."}, "image", "image must be a whole PNG, JPEG or WebP file"),
        ({"scheduler": "sharp"}, "scheduler", "scheduler must be one of DDIM, "),
        ({"model": "local/sdd"}, "model", "model local/sdd is not known; did you mean local/sd?"),
        ({"model": "stabilityai/sdxl-turbo"}, "model", "stabilityai/sdxl-turbo is not on this machine"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_any_work(
    shared: Bench, fields: dict[str, Any], field: str, words: str
) -> None:
    id = shared.submit(**(SMALL | fields))
    refused = error(shared.end(id))
    assert refused.field == field and refused.message.startswith(words)
    assert shared.of(id) == [refused]

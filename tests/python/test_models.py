from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from threading import Event, Thread
from typing import Any

import checkpoints
import msgspec
import pytest
from engines import PATIENCE_S, Bench, difference
from starweave_image import schema
from starweave_image.errors import ImageError
from starweave_image.weights import load as loading
from starweave_image.weights.cache import Model, ModelCache
from starweave_image.weights.catalog import ModelCard, find, shipped

SMALL: dict[str, Any] = {"model": "local/model", "width": 64, "height": 64, "steps": 2, "seed": 1}


def bench_of(folder: Path, **config: Any) -> Bench:
    models = [schema.ModelEntry(id="local/model", path=str(folder))]
    return Bench(models=models, **config).start()


def error(end: schema.Done | schema.Failed) -> schema.Failed:
    assert isinstance(end, schema.Failed), end
    return end


def card(bench: Bench, id: str = "local/model") -> schema.Card:
    return next(card for card in bench.engine.models() if card.id == id)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.stable_diffusion(tmp_path / "model")


@pytest.mark.parametrize(
    ("make", "pipeline", "limits"),
    [
        (checkpoints.stable_diffusion, "StableDiffusionPipeline", (128, 8)),
        (checkpoints.stable_diffusion_2, "StableDiffusionPipeline", (128, 8)),
        (checkpoints.stable_diffusion_xl, "StableDiffusionXLPipeline", (128, 8)),
        (checkpoints.stable_diffusion_3, "StableDiffusion3Pipeline", (128, 8)),
        (checkpoints.flux, "FluxPipeline", (2048, 8)),
        (checkpoints.flux_2_klein, "Flux2KleinPipeline", (2048, 8)),
        (checkpoints.z_image, "ZImagePipeline", (2048, 8)),
        (checkpoints.qwen_image, "QwenImagePipeline", (2048, 16)),
        (checkpoints.pixart, "PixArtSigmaPipeline", (128, 8)),
        (checkpoints.sana, "SanaPipeline", (128, 8)),
    ],
)
def test_a_local_folder_of_any_family_works(
    checkpoint: Callable[[Callable[[Path], Path]], Path],
    make: Callable[[Path], Path],
    pipeline: str,
    limits: tuple[int, int],
) -> None:
    bench = bench_of(checkpoint(make), dtype="bfloat16")
    known = card(bench)
    assert (known.pipeline, known.source, known.state) == (pipeline, "local", "available")
    assert (known.limits.max_size, known.limits.multiple_of) == limits
    pictures = [bench.done(**SMALL | {"seed": seed, "guidance_scale": 3.0})[1] for seed in (1, 2, 2)]
    assert pictures[0] != pictures[1] == pictures[2]
    assert card(bench).state == "loaded"


def test_what_a_family_does_not_take_is_told(tmp_path: Path) -> None:
    bench = bench_of(checkpoints.flux(tmp_path / "model"))
    [notice] = bench.done(negative_prompt="a dog", **SMALL)[0].notices
    assert notice == "negative_prompt has no effect on this model."


def test_a_catalog_model_may_come_from_a_folder(folder: Path) -> None:
    known = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    entry = schema.ModelEntry(id="runwayml/stable-diffusion-v1-5", path=str(folder))
    bench = Bench(models=[entry]).start()
    assert (card(bench, known).source, card(bench, known).state) == ("local", "available")
    done, _ = bench.done(model="runwayml/stable-diffusion-v1-5", width=256, height=256, steps=1)
    assert done.model == known


def test_what_may_take_the_place_of_a_model_is_on_its_card(folder: Path) -> None:
    entries = [
        schema.ModelEntry(id="local/model", path=str(folder), fallbacks=["tiny", "sdxl"]),
        schema.ModelEntry(id="local/other", path=str(folder)),
        schema.ModelEntry(id="flux-schnell", fallbacks=[]),
        schema.ModelEntry(id="sdxl", path=str(folder)),
    ]
    bench = Bench(models=entries).start()
    assert card(bench).fallbacks == ["tiny", "sdxl"] and card(bench, "local/other").fallbacks == []
    # The configuration's word counts, where it has one.
    assert card(bench, "black-forest-labs/FLUX.1-schnell").fallbacks == []
    known = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert card(bench, "stabilityai/stable-diffusion-xl-base-1.0").fallbacks == [known]
    with pytest.raises(ImageError, match="model nobody is not known"):
        Bench(models=[schema.ModelEntry(id="local/model", path=str(folder), fallbacks=["nobody"])]).start()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index | {"_class_name": ["my_pipeline", "MyPipeline"]}, "code of its own"),
        (
            lambda index: index | {"_class_name": "NoSuchPipeline"},
            "which the installed diffusers does not have",
        ),
        (
            lambda index: index | {"_class_name": "AutoencoderKL"},
            "which the installed diffusers does not have",
        ),
        (lambda index: index | {"unet": ["my_unet", "MyUNet"]}, "no class of diffusers or transformers"),
        (lambda index: index | {"unet": ["os", "system"]}, "no class of diffusers or transformers"),
        (lambda index: index | {"unet": ["diffusers.utils", "x"]}, "code of its own"),
        (lambda index: index | {"../unet": index["unet"]}, "code of its own"),
        (lambda index: index | {"unet": ["diffusers", "DDPMPipeline"]}, "a pipeline of its own as its unet"),
        (lambda index: index, "has a unet with code of its own"),
        (lambda index: [], "its model_index.json has the wrong shape"),
    ],
)
def test_a_folder_with_code_of_its_own_or_without_sense_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    (folder / "my_pipeline.py").write_text("raise SystemExit('ran')")
    (folder / "unet/my_unet.py").write_text("raise SystemExit('ran')")
    bench = bench_of(folder)
    refused = error(bench.generate(**SMALL))
    assert refused.kind == "model_load_failed" and words in refused.message
    assert str(folder) not in refused.message


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    refused = error(bench_of(checkpoints.pickled(tmp_path / "model")).generate(**SMALL))
    assert refused.kind == "model_load_failed"
    assert refused.message == "local/model has its unet as pickled weights only; only safetensors are loaded"


def test_an_index_that_leads_to_pickled_weights_is_refused(folder: Path) -> None:
    unet = folder / "unet"
    (unet / "weights.bin").write_bytes(b"\x80\x04N.")
    index = {"metadata": {}, "weight_map": {"conv_in.weight": "weights.bin"}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    refused = error(bench_of(folder).generate(**SMALL))
    assert refused.message == "local/model has its unet in files that are not safetensors"


def test_a_load_that_failed_is_told_and_forgotten_when_one_succeeds(folder: Path, tmp_path: Path) -> None:
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    bench = bench_of(folder)
    assert card(bench).state == "available"
    broken = error(bench.generate(**SMALL))
    assert broken.kind == "model_load_failed" and "is cut short" in broken.message
    assert str(tmp_path) not in broken.message
    assert (card(bench).state, card(bench).error) == ("failed", broken.message)
    weights.unlink()
    assert "is incomplete: its unet" in error(bench.generate(**SMALL)).message
    weights.write_bytes(good)
    bench.done(**SMALL)
    assert (card(bench).state, card(bench).error) == ("loaded", None)


def test_a_default_model_that_is_not_there_keeps_the_engine_from_starting(tmp_path: Path) -> None:
    models = [schema.ModelEntry(id="local/model", path=str(tmp_path / "model"))]
    with pytest.raises(ImageError, match="local/model .* its folder does not exist"):
        Bench(models=models, default_model="local/model").start()


def test_a_folder_that_appears_later_is_found(tmp_path: Path) -> None:
    bench = bench_of(tmp_path / "model")
    assert card(bench).state == "absent"
    missing = error(bench.generate(**SMALL))
    assert missing.kind == "model_load_failed" and "does not exist" in missing.message
    checkpoints.stable_diffusion(tmp_path / "model")
    bench.done(**SMALL)
    assert card(bench).limits.max_size == 128


def test_memory_that_runs_out_in_a_load_is_tried_again_without_the_idle_models(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [
        schema.ModelEntry(id="local/model", path=str(folder)),
        schema.ModelEntry(id="local/other", path=str(checkpoints.stable_diffusion(tmp_path / "other"))),
    ]
    bench = Bench(models=models).start()
    bench.done(**SMALL)
    load = loading.load_pipeline

    def crowded(*arguments: Any) -> Any:
        if "local/model" in bench.engine.snapshot().resident:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return load(*arguments)

    monkeypatch.setattr("starweave_image.engine.models.load_pipeline", crowded)
    bench.done(**(SMALL | {"model": "local/other"}))
    assert bench.engine.snapshot().resident == ["local/other"]

    def full(*arguments: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("starweave_image.engine.models.load_pipeline", full)
    refused = error(bench.generate(**SMALL))
    assert (refused.kind, refused.retryable) == ("out_of_memory", False)


@pytest.mark.parametrize(
    ("make", "divided"),
    [
        (checkpoints.stable_diffusion, {"attention": "sliced", "vae": "tiled"}),
        (checkpoints.flux, {"vae": "tiled"}),
        (checkpoints.qwen_image, {"vae": "tiled"}),
        (checkpoints.sana, {"vae": "tiled"}),
    ],
)
def test_networks_work_part_by_part_where_that_is_configured_and_known(
    checkpoint: Callable[[Callable[[Path], Path]], Path],
    make: Callable[[Path], Path],
    divided: dict[str, str],
) -> None:
    whole = bench_of(checkpoint(make), dtype="float32", attention="none", vae="none")
    parted = bench_of(checkpoint(make), dtype="float32", attention="sliced", vae="tiled")
    fields = SMALL | {"width": 128, "metadata": False, "reproducible": True}
    (plain, [one]), (done, [two]) = whole.done(**fields), parted.done(**fields)
    assert plain.parameters and done.parameters
    environment = done.parameters["environment"]
    assert environment == plain.parameters["environment"] | divided
    assert parted.done(**fields)[1] == [two]
    if make is checkpoints.stable_diffusion:
        assert 0 < difference([one], [two]) < 255
        small = fields | {"width": 64}
        assert 0 <= difference(whole.done(**small)[1], parted.done(**small)[1]) <= 1


def test_words_outside_the_vocabulary_are_told(folder: Path) -> None:
    vocabulary = {"words": ["a", "red", "apple"], "subjects": ["apple"]}
    (folder / "vocabulary.json").write_text(json.dumps(vocabulary))
    bench = bench_of(folder)
    assert bench.done(prompt="A red apple!", **SMALL)[0].notices == []
    [notice] = bench.done(prompt="a dog, a cat", **SMALL)[0].notices
    assert '"dog", "cat"' in notice
    assert "choose a larger model, such as stable-diffusion-v1-5/" in notice


def test_an_embedded_model_draws_at_its_scale_and_says_so(folder: Path) -> None:
    bench = Bench(models=[schema.ModelEntry(id="starweave/tiny", path=str(folder))]).start()
    done, _ = bench.done(prompt="a red apple", width=512, height=256, steps=2, seed=1)
    assert done.parameters is not None
    assert (done.parameters["width"], done.parameters["height"]) == (512, 256)
    assert (done.parameters["rendered_width"], done.parameters["rendered_height"]) == (96, 64)
    assert any(notice.startswith("Rendered at 96x64 and enlarged") for notice in done.notices)
    assert bench.done(width=64, height=64, steps=2, seed=1)[0].notices == []


def test_a_model_that_is_neither_here_nor_configured_is_absent(folder: Path) -> None:
    bench = bench_of(folder)
    assert card(bench, "stabilityai/sdxl-turbo").state == "absent"
    missing = error(bench.generate(model="stabilityai/sdxl-turbo"))
    assert (missing.kind, missing.field) == ("model_not_found", "model")


def test_offline_mode_never_downloads() -> None:
    entry = schema.ModelEntry(id="stabilityai/sdxl-turbo")
    assert card(Bench(models=[entry]), entry.id).state == "remote"
    bench = Bench(models=[entry], offline=True).start()
    assert card(bench, entry.id).state == "absent"
    refused = error(bench.generate(model=entry.id))
    assert refused.kind == "model_load_failed" and "offline" in refused.message


# The cache by itself: loads are under the test's control.


class Loads:
    def __init__(self) -> None:
        self.opened = Event()
        self.names: list[str] = []
        self.fail: ImageError | None = None

    def __call__(self, card: ModelCard, room: Callable[[int], AbstractContextManager[None]]) -> Model:
        self.names.append(card.id)
        with room(card.memory_bytes):
            assert self.opened.wait(PATIENCE_S)
            if self.fail:
                raise self.fail
            return Weighty(card)


class Weighty(Model):
    """A model that weighs what its card says."""

    def __init__(self, card: ModelCard) -> None:
        self.card = card
        self.bytes = card.memory_bytes
        self.load_s = 2.5
        self.moves: list[str] = []

    def park(self) -> None:
        self.moves.append("park")

    def unpark(self) -> None:
        self.moves.append("unpark")


SDXL, TURBO, TINY = (find(name, shipped()) for name in ("sdxl", "sdxl-turbo", "tiny"))


def patiently(model: Future[Model]) -> None:
    model.exception(PATIENCE_S)


def open_cache(budget: int) -> tuple[ModelCache, Loads]:
    loads = Loads()
    loads.opened.set()
    return ModelCache(loads, budget, lambda: None), loads


def test_a_model_that_is_still_on_its_way_does_not_keep_others_from_loading() -> None:
    arriving = Event()

    def load(card: ModelCard, room: Callable[[int], AbstractContextManager[None]]) -> Model:
        if card is SDXL:
            assert arriving.wait(PATIENCE_S)
        with room(card.memory_bytes):
            return Weighty(card)

    cache = ModelCache(load, 10**12, lambda: None)
    with pytest.raises(ImageError, match="gone"), cache.use(SDXL, leave):
        pass
    with cache.use(TINY, patiently) as model:
        assert model.card is TINY
    assert cache.state(SDXL.id) == ("loading", None)
    arriving.set()
    with cache.use(SDXL, patiently) as model:
        assert model.card is SDXL


def leave(model: Future[Model]) -> None:
    raise ImageError("cancelled", "gone")


def test_many_waiters_share_one_load_and_one_who_leaves_does_not_stop_it() -> None:
    cache, loads = open_cache(10**12)
    loads.opened.clear()

    with pytest.raises(ImageError, match="gone"), cache.use(TINY, leave):
        pass
    assert cache.state(TINY.id) == ("loading", None) and cache.loading()
    with pytest.raises(ImageError, match="in use"):
        cache.unload(TINY.id)
    loads.opened.set()
    with cache.use(TINY, patiently) as first, cache.use(TINY, patiently) as second:
        assert first is second
    assert loads.names == [TINY.id] and cache.resident() == [TINY.id]


def test_a_load_that_waits_for_its_turn_is_not_at_work() -> None:
    cache, loads = open_cache(10**12)
    loads.opened.clear()
    for card in (TINY, TURBO):
        with pytest.raises(ImageError, match="gone"), cache.use(card, leave):
            pass
        deadline = time.monotonic() + PATIENCE_S
        while card.id not in loads.names:
            assert time.monotonic() < deadline
    while len(at_work := cache.loads()) > 1 or not at_work[0].age_ms:
        assert time.monotonic() < deadline
    assert at_work[0].model == TINY.id
    loads.opened.set()
    with cache.use(TURBO, patiently):
        assert cache.loads() == []


def test_each_waiter_gets_the_error_of_the_load_they_shared() -> None:
    cache, loads = open_cache(10**12)
    loads.fail = ImageError("model_load_failed", "broken", retryable=True)
    for _ in range(2):
        with pytest.raises(ImageError, match="broken"), cache.use(TINY, patiently):
            pass
        assert cache.state(TINY.id) == ("failed", "broken")
    loads.fail = None
    with cache.use(TINY, patiently):
        assert cache.state(TINY.id) == ("loaded", None)


def test_the_longest_unused_leave_first_and_one_in_use_never() -> None:
    cache, _ = open_cache(SDXL.memory_bytes + 2 * TINY.memory_bytes)
    for card in (SDXL, TINY):
        with cache.use(card, patiently):
            pass
    with cache.use(TURBO, patiently):
        assert cache.resident() == sorted([TINY.id, TURBO.id])
        with cache.use(SDXL, patiently):
            assert cache.resident() == sorted([SDXL.id, TURBO.id])
    cache.unload(SDXL.id)
    cache.unload("nobody")
    assert cache.resident() == [TURBO.id]


def test_what_leaves_the_device_is_parked_while_main_memory_has_room_and_comes_back_without_a_load() -> None:
    loads = Loads()
    loads.opened.set()
    budget, aside = SDXL.memory_bytes + TINY.memory_bytes, SDXL.memory_bytes + 2 * TINY.memory_bytes
    cache = ModelCache(loads, budget, lambda: None, parked_budget=aside)
    with cache.use(SDXL, patiently) as sdxl:
        pass
    with cache.use(TINY, patiently):
        pass
    with cache.use(TURBO, patiently) as turbo:
        assert isinstance(sdxl, Weighty) and sdxl.moves == ["park"]
    report = cache.report(SDXL.id)
    assert report is not None and (report.parked, report.bytes, report.load_s) == (
        True,
        SDXL.memory_bytes,
        2.5,
    )
    with cache.use(SDXL, patiently) as again:
        assert again is sdxl and sdxl.moves == ["park", "unpark"]
        report = cache.report(SDXL.id)
        assert report is not None and (report.parked, report.idle_s) == (False, 0.0)
    assert isinstance(turbo, Weighty) and turbo.moves == ["park"]
    assert loads.names == [SDXL.id, TINY.id, TURBO.id]
    assert cache.report("nobody") is None


class Slow(Weighty):
    """One that is told when it may be parked."""

    def __init__(self, card: ModelCard) -> None:
        super().__init__(card)
        self.parking, self.may_park = Event(), Event()

    def park(self) -> None:
        super().park()
        self.parking.set()
        assert self.may_park.wait(PATIENCE_S)


def test_a_model_that_is_wanted_again_while_others_are_parked_for_a_load_does_not_stop_them() -> None:
    slow = Slow(TURBO)

    def load(card: ModelCard, room: Callable[[int], AbstractContextManager[None]]) -> Model:
        with room(card.memory_bytes):
            return slow if card is TURBO else Weighty(card)

    cache = ModelCache(load, SDXL.memory_bytes + TINY.memory_bytes, lambda: None, 10**12)
    for card in (TURBO, TINY):
        with cache.use(card, patiently):
            pass
    used: list[str] = []

    def use(card: ModelCard) -> None:
        with cache.use(card, patiently) as model:
            used.append(model.card.id)

    big = msgspec.structs.replace(SDXL, memory_bytes=SDXL.memory_bytes + TINY.memory_bytes)
    users = [Thread(target=use, args=(card,)) for card in (big, TINY)]
    users[0].start()
    assert slow.parking.wait(PATIENCE_S)
    # Marked as parked, though it is still there; and its turn comes after the load.
    users[1].start()
    with pytest.raises(ImageError, match="gone"), cache.use(TINY, leave_when_parked):
        pass
    slow.may_park.set()
    for user in users:
        user.join(PATIENCE_S)
        assert not user.is_alive()
    assert sorted(used) == sorted([SDXL.id, TINY.id])
    report = cache.report(TINY.id)
    assert report is not None and not report.parked


def leave_when_parked(model: Future[Model]) -> None:
    if not model.done():
        raise ImageError("cancelled", "gone")


def test_a_model_that_cannot_be_parked_is_loaded_again() -> None:
    class Stuck(Weighty):
        def park(self) -> None:
            raise MemoryError

    loads: list[str] = []

    def load(card: ModelCard, room: Callable[[int], AbstractContextManager[None]]) -> Model:
        with room(card.memory_bytes):
            loads.append(card.id)
            return Stuck(card) if card is TURBO else Weighty(card)

    cache = ModelCache(load, SDXL.memory_bytes, lambda: None, 10**12)
    for card in (TURBO, SDXL, TURBO):
        with cache.use(card, patiently):
            pass
    assert loads == [TURBO.id, SDXL.id, TURBO.id]


def test_main_memory_too_has_a_budget() -> None:
    loads = Loads()
    loads.opened.set()
    cache = ModelCache(loads, SDXL.memory_bytes, lambda: None, parked_budget=SDXL.memory_bytes)
    for card in (SDXL, TURBO, SDXL, TURBO):
        with cache.use(card, patiently):
            pass
    # One is on the device and the other aside: after the first round nothing is loaded again.
    assert loads.names == [SDXL.id, TURBO.id] and cache.resident() == sorted([SDXL.id, TURBO.id])
    with cache.use(TINY, patiently):
        pass
    # The last that left the device keeps its place aside; who was there before is gone.
    assert cache.resident() == sorted([TURBO.id, TINY.id])


@pytest.mark.parametrize("crowded", [True, False])
def test_what_does_not_fit_may_do_so_once_others_have_left(crowded: bool) -> None:
    def load(card: ModelCard, room: Callable[[int], AbstractContextManager[None]]) -> Model:
        with room(card.memory_bytes):
            if card is SDXL:
                raise RuntimeError("CUDA out of memory")
            return Weighty(card)

    cache = ModelCache(load, 10**12, lambda: None)
    with ExitStack() as others:
        if crowded:
            others.enter_context(cache.use(TINY, patiently))
        with (
            pytest.raises(ImageError, match="not enough device memory") as raised,
            cache.use(SDXL, patiently),
        ):
            pass
    assert (raised.value.kind, raised.value.retryable) == ("out_of_memory", crowded)


def test_a_pinned_model_stays() -> None:
    loads = Loads()
    loads.opened.set()
    cache = ModelCache(loads, SDXL.memory_bytes, lambda: None, pinned=[TINY.id])
    for card in (TINY, SDXL, TURBO):
        with cache.use(card, patiently):
            pass
    assert cache.resident() == sorted([TINY.id, TURBO.id])
    assert cache.make_room() and cache.resident() == [TINY.id]
    assert not cache.make_room()


def test_a_model_that_does_not_come_back_is_an_error_of_that_request_alone() -> None:
    class Stuck(Weighty):
        def unpark(self) -> None:
            if not self.moves.count("unpark"):
                self.moves.append("unpark")
                raise RuntimeError("CUDA out of memory")

    def load(card: ModelCard, room: Callable[[int], AbstractContextManager[None]]) -> Model:
        with room(card.memory_bytes):
            return Stuck(card)

    cache = ModelCache(load, SDXL.memory_bytes, lambda: None, parked_budget=10**12)
    for card in (SDXL, TURBO):
        with cache.use(card, patiently):
            pass
    with pytest.raises(ImageError) as refused, cache.use(SDXL, patiently):
        pass
    assert refused.value.kind == "out_of_memory"
    with cache.use(SDXL, patiently) as model:
        assert model.card is SDXL


def test_models_are_preloaded_in_order_and_one_that_fails_stops_no_other(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = bench_of(
        folder, preload=["local/model", "sdxl", "starweave/tiny"], pinned=["starweave/tiny"], capacity=3
    )
    bench.wait_for(lambda: bench.engine.snapshot().resident == ["local/model", "starweave/tiny"] or None)
    loaded = card(bench, "local/model")
    assert (loaded.state, loaded.parked) == ("loaded", False)
    assert loaded.bytes and loaded.load_ms is not None and loaded.idle_ms is not None
    assert "sdxl" in caplog.text and "was not preloaded" in caplog.text
    # Nothing of it is told to whoever sends requests.
    assert bench.said == []
    bench.engine.drain(PATIENCE_S)


def test_a_name_to_preload_that_nobody_knows_keeps_the_engine_from_starting(folder: Path) -> None:
    with pytest.raises(ImageError, match="model nobody is not known"):
        bench_of(folder, preload=["nobody"])


def test_a_copied_folder_is_another_model(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    models = [schema.ModelEntry(id="a", path=str(folder)), schema.ModelEntry(id="b", path=str(copied))]
    bench = Bench(models=models, default_model="a").start()
    records = [bench.done(**SMALL | {"model": id})[0].parameters or {} for id in ("a", "b")]
    assert records[0]["environment"] == records[1]["environment"]
    assert [record["model"] for record in records] == ["a", "b"]

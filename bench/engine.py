"""What the engine gives, as ratios against stock diffusers calls in the same process:

    bin/bench [FIGURE...]

Every figure is the median of pairs, ours and the baseline in turn. The baseline has the same weights, dtype, memory
format and thread settings unless the figure says otherwise. Tables go to standard output, plots to docs/.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import psutil
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from starweave_image import schema
from starweave_image.device import devices
from starweave_image.engine.engine import Engine
from starweave_image.weights.find import embedded_folder
from starweave_image.weights.load import quiet_libraries
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).parents[1]
TINY = embedded_folder("starweave/tiny")
PAIRS = 7
TINY_CALL = {"width": 64, "height": 64, "steps": 20, "guidance_scale": 4.0}
PROMPTS = (
    "a red apple",
    "a cat",
    "a blue square",
    "a rocket",
    "mountains at sunset",
    "a dog",
    "a tree",
    "a green star",
)


class Ours:
    """An engine in this process, and a way to wait for its requests."""

    def __init__(self, folder: Path | None = None, **config: Any) -> None:
        self._news = threading.Condition()
        self.ended: dict[str, tuple[float, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.steps: list[tuple[float, str, int]] = []
        models = [schema.ModelEntry(id="bench/model", path=str(folder))] if folder else []
        chosen = "bench/model" if folder else "starweave/tiny"
        self.engine = Engine(
            schema.Config(models=models, default_model=chosen, **config), self._emit, lambda: None
        )
        self.engine.start()
        self._count = 0

    def _emit(self, message: schema.Event) -> None:
        now = time.perf_counter()
        if isinstance(message, schema.Progress) and message.step:
            self.steps.append((now, message.id, message.step))
        if isinstance(message, schema.ImagePart):
            self.files[message.id] = bytes(message.data)
        if isinstance(message, (schema.Done, schema.Failed)) and message.id:
            with self._news:
                self.ended[message.id] = (now, message)
                self._news.notify_all()

    def submit(self, **fields: Any) -> str:
        self._count += 1
        id = f"r{self._count}"
        self.engine.generate(schema.Request(id=id, metadata=False, **({"prompt": PROMPTS[0]} | fields)))
        return id

    def wait(self, *ids: str) -> None:
        with self._news:
            self._news.wait_for(lambda: all(id in self.ended for id in ids))
        for id in ids:
            assert isinstance(self.ended[id][1], schema.Done), self.ended[id][1]

    def draw(self, requests: list[dict[str, Any]]) -> None:
        self.wait(*[self.submit(**fields) for fields in requests])


class Stock:
    """The plain pipeline, one call after the other."""

    def __init__(self, folder: Path, dtype: str, channels_last: bool = True) -> None:
        self.pipeline: Any = StableDiffusionPipeline.from_pretrained(str(folder), dtype=getattr(torch, dtype))
        self.pipeline.set_progress_bar_config(disable=True)
        if channels_last:
            self.pipeline.unet.to(memory_format=torch.channels_last)
            self.pipeline.vae.to(memory_format=torch.channels_last)

    def call(self, prompt: str = PROMPTS[0], seed: int = 0, steps: int = 20, **fields: Any) -> bytes:
        image = self.pipeline(
            prompt,
            num_inference_steps=steps,
            generator=torch.Generator("cpu").manual_seed(seed),
            **fields,
        ).images[0]
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        return file.getvalue()

    def draw(self, requests: list[dict[str, Any]]) -> None:
        for fields in requests:
            self.call(**fields)


Clock = Callable[[], float]


def seconds(work: Callable[[], Any], clock: Clock = time.perf_counter) -> float:
    begun = clock()
    work()
    return clock() - begun


def pairs(
    ours: Callable[[], Any],
    stock: Callable[[], Any],
    count: int = PAIRS,
    clock: Clock = time.perf_counter,
) -> tuple[float, float, float]:
    """Median seconds of ours, of the baseline, and the median of the ratios baseline / ours; in alternating order."""
    a, b = [], []
    ours()
    stock()
    for index in range(count):
        if index % 2:
            b.append(seconds(stock, clock))
            a.append(seconds(ours, clock))
        else:
            a.append(seconds(ours, clock))
            b.append(seconds(stock, clock))
    return (
        statistics.median(a),
        statistics.median(b),
        statistics.median(y / x for x, y in zip(a, b, strict=True)),
    )


def row(figure: str, ours: str, baseline: str, ratio: str, goal: str) -> None:
    print(f"| {figure} | {ours} | {baseline} | {ratio} | {goal} |", flush=True)


def timed(figure: str, measured: tuple[float, float, float], goal: str) -> None:
    ours, stock, ratio = measured
    row(figure, f"{ours:.2f} s", f"{stock:.2f} s", f"{ratio:.2f}x", goal)


def requests(count: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"prompt": PROMPTS[i % len(PROMPTS)], "seed": i} | fields for i in range(count)]


# The checkpoints


def sd15(folder: Path) -> Path:
    """A checkpoint with the sizes of Stable Diffusion 1.5 and random weights, in bfloat16: the sizes are those of the
    configuration files of stable-diffusion-v1-5/stable-diffusion-v1-5."""
    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    letters = [chr(c) for c in range(97, 123)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            projection_dim=768,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=768,
    )
    vae = AutoencoderKL(
        sample_size=512,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.bfloat16)
    pipeline.save_pretrained(str(folder))
    return folder


# The figures


def alone(work: Path, dtype: str) -> None:
    """One request at a time."""
    tiny, stock = Ours(dtype=dtype), Stock(TINY, dtype)
    one = requests(1, **TINY_CALL)
    timed(
        f"alone, tiny, {dtype}", pairs(lambda: tiny.draw(one), lambda: stock.draw(one), 3 * PAIRS), "≥ 0.98x"
    )
    folder = sd15(work / "sd15")
    large, stock = Ours(folder, dtype=dtype), Stock(folder, dtype)
    one = requests(1, width=256, height=256, steps=4, guidance_scale=7.5)
    timed(
        f"alone, SD 1.5-size, 256², {dtype}",
        pairs(lambda: large.draw(one), lambda: stock.draw(one)),
        "≥ 0.98x",
    )


def tiny(work: Path, dtype: str) -> None:
    """Throughput of the embedded model against concurrency."""
    ours, stock = Ours(dtype=dtype, capacity=16), Stock(TINY, dtype)
    points: dict[int, float] = {}
    for count in (1, 2, 4, 8, 16):
        many = requests(count, **TINY_CALL)
        measured = pairs(lambda many=many: ours.draw(many), lambda many=many: stock.draw(many))
        points[count] = measured[2]
        timed(f"tiny {dtype}, {count} at once, vs sequential stock", measured, "≥ 2.0x" if count == 8 else "")
    keep(work, "tiny", points)


def large(work: Path, dtype: str) -> None:
    """The same for a model of the size of Stable Diffusion 1.5 at 32×32 latents."""
    folder = sd15(work / "sd15")
    ours, stock = Ours(folder, dtype=dtype), Stock(folder, dtype)
    points: dict[int, float] = {}
    for count in (1, 2, 4, 8):
        many = requests(count, width=256, height=256, steps=8, guidance_scale=7.5)
        measured = pairs(lambda many=many: ours.draw(many), lambda many=many: stock.draw(many), 5)
        points[count] = measured[2]
        goal = "≥ 1.5x" if count == 4 else ""
        timed(f"SD 1.5-size {dtype}, 256², 8 steps, {count} at once, vs sequential stock", measured, goal)
    keep(work, "SD 1.5-size", points)


def defaults(work: Path, dtype: str) -> None:
    """One 512² request as a user gets it here, against the stock defaults, and what each part gives."""
    folder = sd15(work / "sd15")
    one = {"width": 512, "height": 512, "guidance_scale": 7.5}
    ours, base = Ours(folder), Stock(folder, "float32", channels_last=False)
    ways: dict[str, Callable[[int], Any]] = {
        "stock": lambda steps: base.call(steps=steps, **one),
        "our defaults": lambda steps: ours.draw([one | {"steps": steps}]),
    }
    for name, kind, last in (("bfloat16 alone", "bfloat16", False), ("channels_last alone", "float32", True)):
        other = Stock(folder, kind, last)
        ways[name] = lambda steps, other=other: other.call(steps=steps, **one)
    steps, took = 10, {name: [] for name in ways}
    for way in ways.values():
        way(1)
    for turn in range(3):
        for name in reversed(ways) if turn % 2 else ways:
            took[name].append(seconds(lambda name=name: ways[name](steps)))
    stock = took.pop("stock")
    for name, own in took.items():
        ratio = statistics.median(s / o for s, o in zip(stock, own, strict=True))
        timed(
            f"{name} vs stock defaults (float32), SD 1.5-size 512², {steps} steps and decode",
            (statistics.median(own), statistics.median(stock), ratio),
            "≥ 4x on an AMX CPU" if name == "our defaults" else "",
        )


def latency(work: Path, dtype: str) -> None:
    """Poisson arrivals at 80 % of what one stock call after the other can do; the same arrivals for both."""
    stock, ours = Stock(TINY, dtype), Ours(dtype=dtype, capacity=64)
    one = requests(1, **TINY_CALL)
    service = statistics.median(seconds(lambda: stock.draw(one)) for _ in range(7))
    ours.draw(requests(8, **TINY_CALL))
    rng = random.Random(0)
    p95s, curves = [], {}
    for _ in range(5):
        gaps = [rng.expovariate(0.8 / service) for _ in range(40)]
        waits = {"FIFO": fifo(stock, gaps), "ours": served(ours, gaps)}
        p95s.append(
            [quantile(waits[name], 0.95) for name in ("ours", "FIFO")]
            + [quantile(waits[name], 0.5) for name in ("ours", "FIFO")]
        )
        for name, values in waits.items():
            curves.setdefault(name, []).extend(values)
    a, b, c, d = (statistics.median(values) for values in zip(*p95s, strict=True))
    ratio95 = statistics.median(x[0] / x[1] for x in p95s)
    ratio50 = statistics.median(x[2] / x[3] for x in p95s)
    row(
        "latency p95, tiny, Poisson at 80 %, vs FIFO", f"{a:.2f} s", f"{b:.2f} s", f"{ratio95:.2f}x", "≤ 0.6x"
    )
    row("latency p50, the same", f"{c:.2f} s", f"{d:.2f} s", f"{ratio50:.2f}x", "")
    keep(work, "latency", {name: sorted(values) for name, values in curves.items()})


def fifo(stock: Stock, gaps: list[float]) -> list[float]:
    """Latencies of a worker that takes one request after the other."""
    waits, arrived, begun = [], 0.0, time.perf_counter()
    for index, gap in enumerate(gaps):
        arrived += gap
        early = begun + arrived - time.perf_counter()
        if early > 0:
            time.sleep(early)
        stock.call(prompt=PROMPTS[index % 8], seed=index, **TINY_CALL)
        waits.append(time.perf_counter() - begun - arrived)
    return waits


def served(ours: Ours, gaps: list[float]) -> list[float]:
    ids, arrived, begun = [], 0.0, time.perf_counter()
    due = []
    for index, gap in enumerate(gaps):
        arrived += gap
        early = begun + arrived - time.perf_counter()
        if early > 0:
            time.sleep(early)
        due.append(begun + arrived)
        ids.append(ours.submit(prompt=PROMPTS[index % 8], seed=index, **TINY_CALL))
    ours.wait(*ids)
    return [ours.ended[id][0] - arrival for id, arrival in zip(ids, due, strict=True)]


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def cancel(work: Path, dtype: str) -> None:
    """From the cancel of one of eight to its end."""
    ours = Ours(dtype=dtype)
    ours.draw(requests(8, **TINY_CALL))
    took, steps = [], []
    for _ in range(10):
        ids = [ours.submit(**fields) for fields in requests(8, **(TINY_CALL | {"steps": 60}))]
        ours.steps.clear()
        while sum(id == ids[3] for _, id, _ in ours.steps) < 5:
            time.sleep(0.002)
        own = [at for at, id, _ in ours.steps if id == ids[3]]
        steps.append(statistics.median(b - a for a, b in zip(own, own[1:], strict=False)))
        begun = time.perf_counter()
        ours.engine.cancel(ids[3])
        ours.wait(*(id for id in ids if id != ids[3]))
        took.append(ours.ended[ids[3]][0] - begun)
    over = max(t - s for t, s in zip(took, steps, strict=True))
    row(
        "cancel of one member of eight, tiny",
        f"{statistics.median(took) * 1000:.0f} ms, worst {max(took) * 1000:.0f} ms",
        f"a step: {statistics.median(steps) * 1000:.0f} ms",
        f"worst: a step {over * 1000:+.0f} ms",
        "≤ a step + 50 ms",
    )


def switch(work: Path, dtype: str) -> None:
    """Back to a model that is in memory, against loading it from disk; of the size of SD 1.5."""
    folder = sd15(work / "sd15")
    ours = Ours(folder, dtype=dtype)
    one = requests(1, width=64, height=64, steps=1)
    tiny_one = requests(1, model="starweave/tiny", **(TINY_CALL | {"steps": 1}))

    def from_disk() -> None:
        ours.draw(one)

    back, disk = [], []
    for _ in range(PAIRS):
        ours.draw(tiny_one)
        ours.engine.unload_model("u", "bench/model")
        disk.append(seconds(from_disk))
        ours.draw(tiny_one)
        back.append(seconds(from_disk))
    ratio = statistics.median(d / b for d, b in zip(disk, back, strict=True))
    row(
        "switch to a model in memory vs from disk, SD 1.5-size, with a picture of one step",
        f"{statistics.median(back):.2f} s",
        f"{statistics.median(disk):.2f} s",
        f"{ratio:.1f}x",
        "≥ 3x",
    )


def memory(work: Path, dtype: str) -> None:
    """Resident memory after many small images."""
    ours, process = Ours(dtype=dtype), psutil.Process()
    marks: dict[int, float] = {}
    for count in range(1, 1001):
        ours.draw(requests(1, **(TINY_CALL | {"steps": 4})))
        # What the bench itself keeps of a picture.
        for kept in (ours.ended, ours.files, ours.steps):
            kept.clear()
        if count in (100, 1000):
            marks[count] = process.memory_info().rss / 2**20
    growth = marks[1000] - marks[100]
    row(
        "RSS after 1,000 images vs after 100",
        f"{marks[1000]:.0f} MiB",
        f"{marks[100]:.0f} MiB",
        f"{growth:+.1f} MiB",
        "≤ +1 MB",
    )


def shared(work: Path, dtype: str) -> None:
    """One pipeline object shared by eight threads, as a service without an engine would have it: what comes out."""
    stock, ours = Stock(TINY, dtype), Ours(dtype=dtype)
    many = [fields | {"steps": 12 + i} for i, fields in enumerate(requests(8, **TINY_CALL))]
    right = [stock.call(**fields) for fields in many]
    wrong = failed = 0
    for _ in range(3):
        results = shared_by_threads(Stock(TINY, dtype), many)
        failed += results.count(None)
        wrong += sum(a is not None and a != b for a, b in zip(results, right, strict=True))
    ours_wrong = 0
    for _ in range(3):
        ids = [ours.submit(reproducible=True, **fields) for fields in many]
        ours.wait(*ids)
        ours_wrong += sum(ours.files[id] != file for id, file in zip(ids, right, strict=True))
    row(
        "24 requests, 8 at once: failed or wrong; baseline: one shared pipeline object and 8 threads",
        f"{ours_wrong} of 24",
        f"{failed} failed, {wrong} wrong",
        "",
        "",
    )


def shared_by_threads(stock: Stock, many: list[dict[str, Any]]) -> list[bytes | None]:
    results: list[bytes | None] = [None] * len(many)

    def draw(index: int) -> None:
        try:
            results[index] = stock.call(**many[index])
        except Exception:
            # That is what is counted here.
            pass

    threads = [threading.Thread(target=draw, args=(index,)) for index in range(len(many))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def openvino(work: Path, dtype: str) -> None:
    """The UNet through OpenVINO against PyTorch, in the same engine. In processor time too, for the two lose differently
    where others want the cores."""
    folder = sd15(work / "sd15")
    shutil.rmtree(work / "cache" / "openvino", ignore_errors=True)
    one = requests(1, width=256, height=256, steps=1, guidance_scale=7.5)
    stock, ours = Ours(folder, dtype=dtype), Ours(folder, dtype=dtype, backend="openvino")
    # The model is loaded by the first request; the second has what stays a part of it.
    loads = [
        seconds(lambda each=each: each.draw(one)) - seconds(lambda each=each: each.draw(one))
        for each in (ours, stock)
    ]
    timed("openvino, SD 1.5-size: the first load, with the conversion", (*loads, loads[1] / loads[0]), "")
    sizes = [(256, 8, 1, 5), (256, 4, 4, 3), (512, 2, 1, 3)]
    engines = {"SD 1.5-size": (ours, stock, sizes)}
    tiny = [Ours(dtype=dtype, backend=backend) for backend in ("openvino", "torch")]
    engines["tiny"] = (*tiny, [(64, 20, 1, PAIRS), (64, 20, 8, PAIRS)])
    for name, (ours, stock, sizes) in engines.items():
        for size, steps, count, times in sizes:
            many = requests(count, width=size, height=size, steps=steps, guidance_scale=7.5)
            both = [lambda many=many, each=each: each.draw(many) for each in (ours, stock)]
            figure = f"openvino vs torch, {dtype}, {name}, {size}², {steps} steps and decode, {count} at once"
            timed(figure, pairs(*both, times), "")
            timed("… in processor time", pairs(*both, times, time.process_time), "")


FIGURES: dict[str, Callable[[Path, str], None]] = {
    "alone": alone,
    "tiny": tiny,
    "large": large,
    "defaults": defaults,
    "latency": latency,
    "cancel": cancel,
    "switch": switch,
    "memory": memory,
    "shared": shared,
    "openvino": openvino,
}


def keep(work: Path, name: str, data: Any) -> None:
    """Leave what a plot needs."""
    path = work / "points.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | {name: data}))


def plot(work: Path, folder: Path) -> None:
    """Throughput against concurrency, and the distribution of latencies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = json.loads((work / "points.json").read_text())
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name in ("tiny", "SD 1.5-size"):
        if name in points:
            axes.plot([int(n) for n in points[name]], list(points[name].values()), marker="o", label=name)
    axes.axhline(1.0, color="gray", linestyle=":", label="stock calls, one after the other")
    axes.set(xlabel="requests at once", ylabel="throughput against stock", xscale="log", ylim=(0, None))
    axes.set_xticks([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(folder / "throughput.png", dpi=110, bbox_inches="tight")
    if "latency" in points:
        figure, axes = pyplot.subplots(figsize=(6, 4))
        for name, values in points["latency"].items():
            axes.plot(values, [i / len(values) for i in range(len(values))], label=name)
        axes.set(
            xlabel="seconds from arrival to picture", ylabel="share of requests", xlim=(0, None), ylim=(0, 1)
        )
        axes.legend()
        figure.savefig(folder / "latency.png", dpi=110, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "figures", nargs="*", metavar="FIGURE", help=f"of {', '.join(FIGURES)}; by default all"
    )
    parser.add_argument("--dtype", help="by default the one that the engine chooses here")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "starweave-bench")
    parser.add_argument("--plots", type=Path, help="folder for the plots; needs matplotlib")
    arguments = parser.parse_args()
    if unknown := set(arguments.figures) - set(FIGURES):
        parser.error(f"no figure {', '.join(sorted(unknown))}")
    os.environ["STARWEAVE_IMAGE_CACHE"] = str(arguments.work / "cache")
    arguments.work.mkdir(parents=True, exist_ok=True)
    quiet_libraries()
    choice = devices.choose(schema.Config(dtype=arguments.dtype or "auto"))
    print(
        f"{choice.device.name}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, "
        f"{choice.device.id}, {choice.dtype} ({choice.reason}), torch {torch.__version__}, "
        f"Python {platform.python_version()}, load {os.getloadavg()[0]:.1f} at the start\n"
    )
    print("| Figure | Ours | Baseline | Ratio | Goal |\n|---|---|---|---|---|", flush=True)
    for name in arguments.figures or FIGURES:
        FIGURES[name](arguments.work, choice.dtype)
    if arguments.plots:
        plot(arguments.work, arguments.plots)


if __name__ == "__main__":
    main()

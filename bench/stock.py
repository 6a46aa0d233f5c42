"""The baseline of bench/overhead.exs: the same request as one stock diffusers call in one Python process.

With `--serve` it answers each line on stdin with the milliseconds of one call, load and first call done before
`ready`; without, it makes one picture and ends, as a script would.
"""

from __future__ import annotations

import argparse
import io
import sys
import time

import torch
from diffusers import StableDiffusionPipeline

PROMPT = "a red apple"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--out")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--serve", action="store_true")
    args = parser.parse_args()

    pipeline = StableDiffusionPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype))
    pipeline.set_progress_bar_config(disable=True)
    if args.channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)

    def call(seed: int) -> bytes:
        image = pipeline(
            PROMPT,
            height=args.size,
            width=args.size,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1)
        return file.getvalue()

    if args.serve:
        call(0)
        print("ready", flush=True)
        for line in sys.stdin:
            start = time.perf_counter()
            call(int(line))
            print(f"{(time.perf_counter() - start) * 1000:.3f}", flush=True)
    else:
        data = call(0)
        if args.out:
            with open(args.out, "wb") as file:
                file.write(data)


if __name__ == "__main__":
    main()

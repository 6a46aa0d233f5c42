"""Image files that describe themselves.

Each file carries its parameters twice: as the "parameters" text that most tools of the field read (PNG text, EXIF
UserComment in JPEG and WebP), and as our own record, one JSON object (PNG iTXt `starweave_image`, EXIF
ImageDescription). Nothing in either varies between two runs of a request: the same request, the same bytes.
"""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image, ImageOps, PngImagePlugin

from .errors import ImageError

MAX_SIDE = 4096
_KEY = "starweave_image"
_IMAGE_DESCRIPTION = 0x010E
_EXIF_IFD = 0x8769
_USER_COMMENT = 0x9286
# A JPEG segment has a length of 16 bits, less 2 for itself and 6 for "Exif\0\0".
_MAX_EXIF = 65_535 - 8


def encode(image: Image.Image, format: str, quality: int, record: dict[str, Any] | None) -> bytes:
    """The image as a `png`, `jpeg` or `webp` file with `record` embedded, or nothing where it is None."""
    out = io.BytesIO()
    image = image.convert("RGB")
    if format == "png":
        chunks = PngImagePlugin.PngInfo()
        if record is not None:
            chunks.add_text("parameters", parameters_text(record))
            chunks.add_itxt(_KEY, _dump(record))
        image.save(out, "PNG", compress_level=1, pnginfo=chunks)
    else:
        exif = b"" if record is None else _exif(record, _MAX_EXIF if format == "jpeg" else None)
        image.save(out, format.upper(), quality=quality, **({"exif": exif} if exif else {}))
    return out.getvalue()


def read(data: bytes) -> dict[str, Any] | None:
    """The record that `encode` embedded, or None; raises `OSError` for what is no image."""
    with Image.open(io.BytesIO(data)) as image:
        # PNG text after the pixels is known only once they are read.
        image.load()
        text, exif = image.info.get(_KEY), image.getexif().get(_IMAGE_DESCRIPTION)
    try:
        if text is None and isinstance(exif, str):
            # Pillow reads EXIF text as latin-1; ours is UTF-8.
            text = exif.encode("latin-1").decode()
        record = json.loads(text) if text else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def decode(data: bytes, field: str) -> Image.Image:
    """The picture of a PNG, JPEG or WebP file in RGB, upright, what is transparent in it on white.

    Raises `invalid_request` naming `field` for one that is damaged or cut short, moves, or has more than `MAX_SIDE`
    pixels a side, which is seen before its pixels are unpacked.
    """
    image = _open(data, field)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def decode_mask(data: bytes, size: tuple[int, int]) -> Image.Image:
    """A mask in gray, of the `size` of its image: white may change, black and what is transparent stays."""
    mask = _open(data, "mask")
    if mask.size != size:
        raise ImageError(
            "invalid_request",
            f"mask must have the size of image, {size[0]}x{size[1]}, got {mask.width}x{mask.height}",
            "mask",
        )
    if "A" in mask.getbands() or "transparency" in mask.info:
        mask = mask.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask)
    return mask.convert("L")


def _open(data: bytes, field: str) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
        if max(image.size) > MAX_SIDE:
            raise ImageError(
                "invalid_request",
                f"{field} must be at most {MAX_SIDE}x{MAX_SIDE} pixels, got {image.width}x{image.height}",
                field,
            )
        if getattr(image, "n_frames", 1) > 1:
            raise ImageError("invalid_request", f"{field} must be a still picture", field)
        image.load()
        upright = ImageOps.exif_transpose(image)
        # Gray of 16 bits, which Pillow would cut off at 255 and not scale.
        return upright.point(lambda value: value / 256, "L") if upright.mode.startswith("I") else upright
    except ImageError:
        raise
    # What Pillow raises for a damaged file is anything from SyntaxError to struct.error.
    except Exception:
        raise ImageError(
            "invalid_request", f"{field} must be a whole PNG, JPEG or WebP file, and is damaged", field
        ) from None


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image at another size, what does not fit its shape cut off evenly on both sides."""
    if image.size == (width, height):
        return image
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def parameters_text(record: dict[str, Any]) -> str:
    """The widely read form: the prompt, the negative prompt, and a line of settings."""
    settings = {
        "Steps": record["steps"],
        "Sampler": record["scheduler"].removesuffix("Scheduler"),
        "CFG scale": f"{record['guidance_scale']:g}",
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model": record["model"],
    }
    if "variation_seed" in record:
        settings["Variation seed"] = record["variation_seed"]
        settings["Variation seed strength"] = f"{record['variation_strength']:g}"
    if "strength" in record:
        settings["Denoising strength"] = f"{record['strength']:g}"
    if checksum := record["environment"].get("checksum"):
        settings["Model hash"] = checksum[:10]
    settings["Version"] = f"{_KEY} {record['environment']['starweave_image']}"
    lines = [record["prompt"]]
    if record["negative_prompt"]:
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in settings.items())])


def _dump(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def _exif(record: dict[str, Any], limit: int | None) -> bytes:
    """Both forms, or the one that fits: prompts of control characters can outgrow a JPEG segment."""
    comment = b"UNICODE\0" + parameters_text(record).encode("utf-16-be")
    description = _dump(record).encode()
    for with_comment, with_description in ((True, True), (False, True), (True, False)):
        # Big-endian as the comment's text is: readers take the byte order of the whole for it.
        exif = Image.Exif()
        exif.endian = ">"
        if with_description:
            exif[_IMAGE_DESCRIPTION] = description
        if with_comment:
            exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = comment
        packed = exif.tobytes()
        if limit is None or len(packed) <= limit:
            return packed
    return b""

"""Image files that describe themselves.

Each file carries its parameters twice: as the "parameters" text that most tools of the field read (PNG text, EXIF
UserComment in JPEG and WebP), and as our own record, one JSON object (PNG iTXt `starweave_image`, EXIF
ImageDescription). Nothing in either varies between two runs of a request: the same request, the same bytes.
"""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image, PngImagePlugin

from .parameters import parameters_text

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
        # PNG text after the pixels is known only after they are read.
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


def _dump(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"), sort_keys=True)


def _exif(record: dict[str, Any], limit: int | None) -> bytes:
    """Both forms, or only the one that fits: prompts of control characters can exceed a JPEG segment."""
    comment = b"UNICODE\0" + parameters_text(record).encode("utf-16-be")
    description = _dump(record).encode()
    for with_comment, with_description in ((True, True), (False, True), (True, False)):
        # Big-endian like the comment's text, since readers use the byte order of the whole for it.
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

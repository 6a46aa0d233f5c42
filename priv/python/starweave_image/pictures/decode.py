"""Pictures from outside: a PNG, JPEG or WebP file as pixels that a pipeline can start from."""

from __future__ import annotations

import io

from PIL import Image

from ..errors import ImageError
from . import colours, containers
from .containers import Container

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data: bytes, field: str) -> Image.Image:
    """The picture of a PNG, JPEG or WebP file in sRGB, upright, what is transparent in it on white; of several pictures in
    a JPEG the first.

    Raises `invalid_request` naming `field` for one that is damaged or cut short, moves, has more than
    `containers.MAX_SIDE` pixels a side, or would take long to decode; all but damage is seen before a pixel is unpacked.
    """
    container, image, alpha = _open(data, field)
    image = colours.to_srgb(image, container)
    return image if alpha is None else Image.composite(image, Image.new("RGB", image.size, "white"), alpha)


def decode_mask(data: bytes, size: tuple[int, int]) -> Image.Image:
    """A mask in gray, of the `size` of its image: white may change, black and transparent stays. If all visible pixels are
    black, the opaque ones may change: such a mask was drawn only in its alpha channel."""
    _, image, alpha = _open(data, "mask")
    if image.size != size:
        raise ImageError(
            "invalid_request",
            f"mask must have the size of image, {size[0]}x{size[1]}, got {image.width}x{image.height}",
            "mask",
        )
    gray = image.convert("L")
    if alpha is None:
        return gray
    seen = Image.composite(gray, Image.new("L", size, 0), alpha)
    return alpha if seen.getextrema() == (0, 0) and alpha.getextrema() != (255, 255) else seen


def _open(data: bytes, field: str) -> tuple[Container, Image.Image, Image.Image | None]:
    """The parts of the file, its picture in gray, RGB or CMYK, and its alpha channel; both upright."""
    try:
        container = containers.read(data)
        with Image.open(io.BytesIO(container.data), formats=(container.format,)) as opened:
            if opened.size != (container.width, container.height):
                raise containers.Damaged
            opened.load()
            image, alpha = _channels(opened, container)
    except containers.Refused as refused:
        raise ImageError("invalid_request", f"{field} {refused}", field) from None
    except MemoryError:
        raise ImageError(
            "out_of_memory", f"there is not enough memory to read {field}", field, True
        ) from None
    # Pillow raises many types for a damaged file, from SyntaxError to struct.error.
    except Exception:
        raise ImageError(
            "invalid_request", f"{field} must be a whole PNG, JPEG or WebP file, and is damaged", field
        ) from None
    if (turn := _UPRIGHT.get(container.orientation)) is not None:
        image, alpha = image.transpose(turn), alpha and alpha.transpose(turn)
    return container, image, alpha


def _channels(image: Image.Image, container: Container) -> tuple[Image.Image, Image.Image | None]:
    alpha = None if container.key is None else _around(image, container.key, container.depth)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    if image.mode in ("LA", "RGBA"):
        alpha = image.getchannel("A")
        image = image.convert(image.mode.removesuffix("A"))
    if image.mode.startswith("I"):
        image = _of_16_bits(image)
    return (image if image.mode in ("L", "RGB", "CMYK") else image.convert("L")), alpha


def _of_16_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 bits in 8 bits; Pillow itself would clip at 255."""
    import numpy as np

    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _around(image: Image.Image, key: bytes, depth: int) -> Image.Image | None:
    """An alpha channel that is transparent where the picture has the colour `key`; None where that is no colour of it.

    Pillow compares the number in the file with values that it has widened to 8 bits, or narrowed to them.
    """
    import numpy as np

    channels = [int.from_bytes(key[i : i + 2], "big") & (2**depth - 1) for i in range(0, len(key), 2)]
    if len(channels) != len(image.getbands()):
        return None
    if depth == 16 and image.mode == "RGB":
        # Pillow keeps the upper half of each channel.
        channels = [value >> 8 for value in channels]
    elif depth < 8:
        channels = [value * 255 // (2**depth - 1) for value in channels]
    pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
    same = pixels == (channels if len(channels) > 1 else channels[0])
    if same.ndim == 3:
        same = same.all(axis=-1)
    return Image.fromarray(np.where(same, 0, 255).astype(np.uint8))

"""Pictures of any colour space as sRGB, which is what the models were trained on and draw in."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable

from PIL import Image, ImageCms

from .containers import Container

# Classes of profiles that describe pictures; others link two colour spaces or name colours.
_CLASSES = ("mntr", "scnr", "prtr", "spac")
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
# A difference up to this is rounding.
_SAME = 2
_SRGB_GAMMA = 45_455

# x and y of white, red, green and blue, by their numbers in ITU-T H.273.
_D65 = (31_270, 32_900)
_PRIMARIES = {
    1: (*_D65, 64_000, 33_000, 30_000, 60_000, 15_000, 6_000),
    9: (*_D65, 70_800, 29_200, 17_000, 79_700, 13_100, 4_600),
    12: (*_D65, 68_000, 32_000, 26_500, 69_000, 15_000, 6_000),
}


def to_srgb(image: Image.Image, container: Container) -> Image.Image:
    """The picture in RGB, read as its file says its colours are meant. `image` is gray, RGB or CMYK, upright or not.

    A profile that is broken, or is one for other channels than the picture has, is ignored.
    """
    # In PNG's order of precedence.
    if (told := _by_numbers(container)) is not None:
        return _converted(image.convert("RGB"), told)
    if container.profile is not None:
        return _converted(image, container.profile)
    if not container.is_srgb and (told := _by_gamma(container)) is not None:
        return _converted(image.convert("RGB"), told)
    return image.convert("RGB")


def _by_numbers(container: Container) -> bytes | None:
    """A profile for a cICP chunk; None without one, and for numbers that mean no RGB or an unknown one."""
    if container.cicp is None:
        return None
    primaries, transfer, matrix, is_full = container.cicp
    if primaries not in _PRIMARIES or transfer not in _TRANSFERS or (matrix, is_full) != (0, 1):
        return None
    return _profile(_PRIMARIES[primaries], _TRANSFERS[transfer])


def _by_gamma(container: Container) -> bytes | None:
    """A profile for the chunks gAMA and cHRM; None without a gamma, or for that of sRGB."""
    if not container.gamma:
        return None
    power = 100_000 / container.gamma
    if container.primaries is not None:
        return _profile(container.primaries, lambda value: value**power)
    # The values that PNG recommends beside sRGB; alone they mean sRGB too.
    if abs(container.gamma - _SRGB_GAMMA) < 500:
        return None
    return _profile(_PRIMARIES[1], lambda value: value**power)


def _converted(image: Image.Image, profile: bytes) -> Image.Image:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        core = source.profile
        if core.device_class in _CLASSES and core.xcolor_space.strip() == _SPACES[image.mode]:
            srgb = ImageCms.createProfile("sRGB")
            transform = ImageCms.buildTransform(source, srgb, image.mode, "RGB")
            if image.mode != "RGB" or _changes(transform):
                # In place if possible: a picture may have 16 million pixels.
                converted = ImageCms.applyTransform(image, transform, inPlace=image.mode == "RGB")
                return converted or image
    except (ImageCms.PyCMSError, OSError, ValueError):
        pass
    return image.convert("RGB")


def _changes(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether the profile changes any of 729 colours: most profiles are sRGB's, in many versions."""
    levels = bytes(range(0, 256, 32)) + b"\xff"
    colours = bytes(value for r in levels for g in levels for b in levels for value in (r, g, b))
    image = Image.frombytes("RGB", (729, 1), colours)
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return any(abs(a - b) > _SAME for a, b in zip(colours, converted.tobytes(), strict=True))


# Values of a file, 0 to 1, as light


def _srgb(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def _bt709(value: float) -> float:
    return value / 4.5 if value < 0.081 else ((value + 0.099) / 1.099) ** (1 / 0.45)


def _pq(value: float) -> float:
    """SMPTE ST 2084, with the white of ITU-R BT.2408, 203 of 10,000 cd/m², at 1."""
    root = math.pow(value, 1 / 78.84375)
    light = math.pow(max(root - 0.8359375, 0.0) / (18.8515625 - 18.6875 * root), 1 / 0.1593017578125)
    return light * 10_000 / 203


def _hlg(value: float) -> float:
    """ARIB STD-B67, with the white of ITU-R BT.2408, 75 % of the signal, at 1."""

    def scene(value: float) -> float:
        if value <= 0.5:
            return value * value / 3
        return (math.exp((value - 0.55991073) / 0.17883277) + 0.28466892) / 12

    return scene(value) / scene(0.75)


_TRANSFERS: dict[int, Callable[[float], float]] = {
    1: _bt709,
    4: lambda value: value**2.2,
    5: lambda value: value**2.8,
    6: _bt709,
    8: lambda value: value,
    13: _srgb,
    14: _bt709,
    15: _bt709,
    16: _pq,
    18: _hlg,
}


def _profile(primaries: tuple[int, ...], transfer: Callable[[float], float]) -> bytes | None:
    """An ICC profile (version 2, three primaries and a curve), or None for primaries that span no colours."""
    import numpy as np

    def xyz(x: int, y: int) -> list[float]:
        return [x / y, 1.0, (100_000 - x - y) / y]

    # Bradford's cones, in which the white of the file becomes that of the profile connection space, D50.
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    d50 = np.array([0.96420, 1.0, 0.82491])
    try:
        white, *columns = (xyz(*primaries[i : i + 2]) for i in range(0, 8, 2))
        matrix = np.array(columns).T
        matrix = matrix * np.linalg.solve(matrix, np.array(white))
        adapted = np.linalg.inv(bradford) @ np.diag(bradford @ d50 / (bradford @ np.array(white))) @ bradford
        numbers = np.rint((adapted @ matrix).T * 65_536).astype(int).tolist()
        light = [min(1.0, transfer(index / 1023)) for index in range(1024)]
        curve = b"curv" + bytes(4) + struct.pack(">I1024H", 1024, *(round(value * 65_535) for value in light))
        tags = {
            name.encode(): b"XYZ " + bytes(4) + struct.pack(">3i", *column)
            for name, column in zip(("rXYZ", "gXYZ", "bXYZ"), numbers, strict=True)
        }
    except (ZeroDivisionError, OverflowError, np.linalg.LinAlgError, struct.error):
        return None
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, 128 + 4 + 12 * len(tags) + len(body), len(content))
        body += content
    header = struct.pack(
        ">I4sI4s4s4s12x4s28x3i48x",
        128 + len(table) + len(body),
        b"",
        0x02400000,
        b"mntr",
        b"RGB ",
        b"XYZ ",
        b"acsp",
        *(round(value * 65_536) for value in d50.tolist()),
    )
    assert len(header) == 128
    return header + table + body

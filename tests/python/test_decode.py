"""Picture files of others: cameras, editors, and people who mean harm."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from starweave_image.errors import ImageError
from starweave_image.pictures import containers, images

RED = (200, 30, 30)
FORMATS = ["PNG", "JPEG", "WEBP"]


def plain(colour: tuple[int, int, int] = RED, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.new("RGB", size, colour)


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size[::-1], 3), np.uint8))


def saved(image: Image.Image, format: str, **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **({"lossless": True} if format == "WEBP" else {}), **how)
    return out.getvalue()


def chunk(name: bytes, content: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(name + content) if crc is None else crc
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", crc)


def png(
    size: tuple[int, int], depth: int, kind: int, rows: bytes, *extra: bytes, after: tuple[bytes, ...] = ()
) -> bytes:
    """`rows` have their filter bytes; kind 0 is gray, 2 RGB, 3 palette, 4 and 6 these with alpha."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    return containers.PNG + header + b"".join(extra) + pixels + b"".join(after) + chunk(b"IEND", b"")


def with_chunks(data: bytes, *chunks: bytes) -> bytes:
    """A PNG with further chunks behind its header."""
    return data[:33] + b"".join(chunks) + data[33:]


def with_segments(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG with further segments at its beginning."""
    return data[:2] + b"".join(struct.pack(">BBH", 255, m, len(d) + 2) + d for m, d in segments) + data[2:]


def with_riff(data: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A lossless WebP in the extended form, with further chunks."""
    width, height = Image.open(io.BytesIO(data)).size
    canvas = struct.pack("<I", 0x2C) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    parts = [(b"VP8X", canvas), (b"VP8L", data[20:]), *chunks]
    body = b"".join(n + struct.pack("<I", len(c)) + c + b"\0" * (len(c) % 2) for n, c in parts)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def near(picture: Image.Image, colour: tuple[int, ...], at: tuple[int, int] = (0, 0), by: int = 4) -> bool:
    value = picture.getpixel(at)
    assert isinstance(value, tuple)
    return all(abs(a - b) <= by for a, b in zip(value, colour, strict=True))


def refusal(data: bytes) -> str:
    with pytest.raises(ImageError) as refused:
        images.decode(data, "image")
    assert (refused.value.kind, refused.value.field) == ("invalid_request", "image")
    return refused.value.message


DAMAGED = "image must be a whole PNG, JPEG or WebP file, and is damaged"


# Several pictures in a file


def several() -> dict[str, bytes]:
    small = plain((0, 0, 255)).resize((32, 24))
    jpeg = saved(plain(), "JPEG")
    return {
        "MPO": saved(plain(), "MPO", save_all=True, append_images=[small, small]),
        "a JPEG and its preview": jpeg + saved(small, "JPEG"),
        "a JPEG and a video": jpeg + b"\0\0\0\x18ftypmp42" + bytes(1000),
        "a JPEG with a thumbnail": with_segments(jpeg, (0xE1, b"Exif\0\0MM\0*" + saved(small, "JPEG"))),
        "a PNG and what follows": saved(plain(), "PNG") + saved(small, "PNG"),
        "a PNG of one frame": saved(plain(), "PNG", save_all=True, append_images=[]),
        "a WebP and what follows": saved(plain(), "WEBP") + b"more",
        "an animation of one frame": one_frame(),
    }


def one_frame() -> bytes:
    still = saved(plain(), "WEBP")[12:]
    frame = bytes(6) + (63).to_bytes(3, "little") + (47).to_bytes(3, "little") + bytes(4) + still
    return with_riff(saved(plain(), "WEBP"), (b"ANIM", bytes(6)), (b"ANMF", frame))


@pytest.mark.parametrize("name", several())
def test_of_several_pictures_the_first_is_taken(name: str) -> None:
    picture = images.decode(several()[name], "image")
    assert picture.size == (64, 48) and near(picture, RED)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_what_moves_is_refused(format: str) -> None:
    moving = saved(plain(), format, save_all=True, append_images=[plain((0, 255, 0))], duration=100)
    assert refusal(moving) == "image must be a still picture"


# Metadata


def bomb() -> bytes:
    """An EXIF directory each of whose entries claims all of a megabyte."""
    entry = struct.pack(">HHII", 0x9999, 1, 800_000, 8)
    return b"MM\0*" + struct.pack(">IH", 8, 65_000) + entry * 65_000 + bytes(1_000_000)


def of_palette(colours: bytes, *extra: bytes, after: tuple[bytes, ...] = ()) -> bytes:
    return png((64, 48), 8, 3, bytes(48 * 65), chunk(b"PLTE", colours), *extra, after=after)


def inflating(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


ODD: dict[str, Callable[[], bytes]] = {
    "compressed text of megabytes": lambda: with_chunks(
        saved(plain(), "PNG"), chunk(b"zTXt", b"workflow\0\0" + inflating(50_000_000))
    ),
    "compressed text that is none": lambda: with_chunks(
        saved(plain(), "PNG"), chunk(b"iTXt", b"a\0\1\0\0\0junk")
    ),
    "text of 3 MB": lambda: with_chunks(
        saved(plain(), "PNG"), chunk(b"tEXt", b"prompt\0" + b"x" * 3_000_000)
    ),
    "ten thousand texts": lambda: with_chunks(saved(plain(), "PNG"), chunk(b"tEXt", b"a\0b") * 10_000),
    "a wrong checksum of a text": lambda: with_chunks(saved(plain(), "PNG"), chunk(b"tEXt", b"a\0b", 7)),
    "a profile that inflates": lambda: with_chunks(
        saved(plain(), "PNG"), chunk(b"iCCP", b"p\0\0" + inflating(1_000_000_000))
    ),
    "a profile of zeros": lambda: saved(plain(), "PNG", icc_profile=bytes(5000)),
    "a profile that is not compressed": lambda: with_chunks(
        saved(plain(), "PNG"), chunk(b"iCCP", b"p\0\0junk")
    ),
    "chunks too short": lambda: with_chunks(
        saved(plain(), "PNG"),
        *(chunk(n, b"\1") for n in (b"gAMA", b"cHRM", b"cICP", b"pHYs", b"tIME", b"acTL")),
    ),
    "an EXIF bomb in a PNG": lambda: with_chunks(saved(plain(), "PNG"), chunk(b"eXIf", bomb())),
    "no end": lambda: saved(plain(), "PNG")[:-12],
    "half a chunk at the end": lambda: saved(plain(), "PNG")[:-12] + chunk(b"tEXt", b"a\0b")[:9],
    "more colours than a byte can name": lambda: of_palette(bytes(RED) * 300),
    "two palettes": lambda: of_palette(bytes(RED), chunk(b"PLTE", bytes(3))),
    "transparency of more colours than there are": lambda: of_palette(
        bytes(RED), chunk(b"tRNS", b"\xff" * 999)
    ),
    "transparency that comes too late": lambda: of_palette(bytes(RED), after=(chunk(b"tRNS", b"\0"),)),
    "markers that are cut off": lambda: with_segments(
        saved(plain(), "JPEG"), (0xEE, b"Adobe"), (0xE0, b"JFIF\0")
    ),
    "EXIF that is none": lambda: with_segments(
        saved(plain(), "JPEG"), (0xE1, b"Exif\0\0MM\0*\xff\xff\xff\xff")
    ),
    "an index of pictures that is none": lambda: with_segments(saved(plain(), "JPEG"), (0xE2, b"MPF\0junk")),
    "editors' segments": lambda: with_segments(
        saved(plain(), "JPEG"), (0xED, b"Photoshop 3.0\0" + b"8BIM" * 9), (0xFE, b"\xff" * 65_533)
    ),
    "a part of a profile": lambda: with_segments(saved(plain(), "JPEG"), (0xE2, b"ICC_PROFILE\0\2\3junk")),
    "a profile of no parts": lambda: with_segments(saved(plain(), "JPEG"), (0xE2, b"ICC_PROFILE\0\1\1")),
    "zeros between segments": lambda: saved(plain(), "JPEG")[:2] + bytes(9) + saved(plain(), "JPEG")[2:],
    "an EXIF bomb in a WebP": lambda: with_riff(saved(plain(), "WEBP"), (b"EXIF", bomb())),
    "junk in a WebP": lambda: with_riff(
        saved(plain(), "WEBP"), (b"ICCP", b"junk"), (b"EXIF", b"junk"), (b"XMP ", b"<"), (b"what", b"?")
    ),
    "a chunk that is cut off": lambda: with_riff(saved(plain(), "WEBP"), (b"XMP ", b"x" * 99))[:-9],
}


@pytest.mark.parametrize("name", ODD)
def test_metadata_does_not_decide_over_sound_pixels(name: str) -> None:
    picture = images.decode(ODD[name](), "image")
    assert picture.size == (64, 48) and near(picture, RED)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_of_all_formats_are_turned_as_they_say(format: str, orientation: int) -> None:
    upright = plain((0, 0, 0), (64, 32))
    upright.paste((255, 255, 255), (0, 0, 32, 16))
    # How a camera holds it: the inverse of what EXIF says is to be done.
    turn = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "a camera", orientation
    held = upright if turn is None else upright.transpose(turn)
    picture = images.decode(saved(held, format, exif=exif), "image")
    assert picture.size == (64, 32)
    assert near(picture, (255, 255, 255), (4, 4), 8) and near(picture, (0, 0, 0), (60, 28), 8)


# Damage, and limits that are none


def cut_short() -> list[bytes]:
    picture = noise((64, 48))
    files = [saved(picture, format) for format in FORMATS]
    return [data[: len(data) * part // 8] for data in files for part in range(1, 8)]


def test_damage_is_told() -> None:
    whole = saved(plain(), "PNG")
    at = whole.index(b"IDAT") + 6
    files = [
        *cut_short(),
        saved(plain(), "JPEG")[:-2],
        whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
        with_chunks(whole, chunk(b"ABCD", b"a critical chunk that nobody knows")),
        png((8, 8), 5, 0, bytes(99)),
        png((8, 8), 8, 0, bytes(20)),
        png((0, 8), 8, 0, b""),
        png((1, 1), 8, 3, b"\0\0"),
        saved(plain(), "JPEG")[:2] + b"\xff\xd9",
        b"RIFF\x04\0\0\0WEBP",
        b"GIF89a" + bytes(99),
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
    ]
    assert {refusal(data) for data in files} == {DAMAGED}


@given(st.sampled_from(FORMATS), st.data())
def test_any_change_is_a_picture_or_one_clear_error(format: str, data: st.DataObject) -> None:
    changed = bytearray(saved(noise((16, 16)), format))
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(12, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert images.decode(bytes(changed), "image").mode == "RGB"
    except ImageError as error:
        assert error.kind == "invalid_request" and error.message.startswith("image must ")


def jpeg_of(width: int, height: int) -> bytes:
    data = saved(plain(), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (png((4097, 1), 8, 0, b""), "4097x1"),
        (png((65_535, 65_535), 1, 0, b""), "65535x65535"),
        (png((2**31 - 1, 1), 8, 6, b""), "2147483647x1"),
        (jpeg_of(20_000, 30_000), "20000x30000"),
        (
            b"RIFF\x1e\0\0\0WEBPVP8 \x0a\0\0\0\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 16_383, 16_383),
            "16383x16383",
        ),
        (b"RIFF\x12\0\0\0WEBPVP8L\x05\0\0\0\x2f\xff\xff\xff\x0f\0", "16384x16384"),
    ],
)
def test_a_size_is_told_as_a_size(data: bytes, size: str) -> None:
    assert refusal(data) == f"image must be at most 4096x4096 pixels, got {size}"


def many_scans(image: Image.Image, count: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more."""
    data = saved(image, "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    return data[:-2] + data[scan:-2] * count + data[-2:]


def test_a_jpeg_of_many_scans_is_refused_by_how_long_it_would_take() -> None:
    large = plain(size=(4096, 4096))
    assert refusal(many_scans(large, 1000)).startswith("image must be a JPEG of fewer scans, got ")
    assert "fewer scans" in refusal(many_scans(large.convert("L"), 100))
    assert "fewer scans" in refusal(many_scans(large.convert("CMYK").resize((3000, 3000)), 500))
    # As many in a small picture take no time.
    assert images.decode(many_scans(plain(), 1000), "image").size == (64, 48)
    assert images.decode(saved(large, "JPEG", progressive=True), "image").size == (4096, 4096)


def test_other_kinds_of_jpeg_and_too_many_parts_are_named() -> None:
    data = saved(plain(), "JPEG")
    assert refusal(data.replace(b"\xff\xc0", b"\xff\xc9", 1)) == (
        "image must be a baseline or progressive JPEG of 8 bits a channel"
    )
    assert "baseline or progressive" in refusal(
        data.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c", 1)
    )
    most = containers.MAX_PARTS
    assert refusal(with_chunks(saved(plain(), "PNG"), chunk(b"tEXt", b"a\0b") * most)).endswith(
        f"{most} chunks"
    )
    assert refusal(with_segments(data, *[(0xFE, b"")] * most)).endswith(f"{most} segments")
    assert refusal(with_riff(saved(plain(), "WEBP"), *[(b"none", b"")] * most)).endswith(f"{most} chunks")


# Transparency

WHITE = (255, 255, 255)


@pytest.mark.parametrize(
    ("depth", "kind", "pixels", "key", "other"),
    [
        # Two pixels each; the first has the colour that is transparent.
        (1, 0, b"\x80", (1,), (0, 0, 0)),
        (2, 0, b"\x60", (1,), (170,) * 3),
        (4, 0, b"\x38", (3,), (136,) * 3),
        (8, 0, b"\x03\x80", (3,), (128,) * 3),
        # They differ in their lower halves alone.
        (16, 0, b"\x80\x01\x80\x02", (0x8001,), (128,) * 3),
        (8, 2, b"\x01\x02\x03\xc8\x1e\x1e", (1, 2, 3), RED),
        (16, 2, b"\x01\x00\x02\x00\x03\x00\xc8\x00\x1e\x00\x1e\x00", (0x100, 0x200, 0x300), RED),
    ],
)
def test_the_colour_that_is_transparent_is_found_at_every_depth(
    depth: int, kind: int, pixels: bytes, key: tuple[int, ...], other: tuple[int, int, int]
) -> None:
    data = png((2, 1), depth, kind, b"\0" + pixels, chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)))
    picture = images.decode(data, "image")
    assert (picture.getpixel((0, 0)), picture.getpixel((1, 0))) == (WHITE, other)
    mask = images.decode_mask(data, (2, 1))
    assert mask.getpixel((0, 0)) == 0
    # Where the only other pixel is black, it is the alpha channel that tells.
    assert mask.getpixel((1, 0)) == (Image.new("RGB", (1, 1), other).convert("L").getpixel((0, 0)) or 255)


def test_palettes_and_alpha_channels_are_laid_on_white() -> None:
    palette = chunk(b"PLTE", bytes(RED) + b"\0\xff\0")
    half = png((2, 1), 8, 3, b"\0\0\1", palette, chunk(b"tRNS", b"\x80"))
    picture = images.decode(half, "image")
    assert near(picture, (227, 142, 142)) and picture.getpixel((1, 0)) == (0, 255, 0)
    assert images.decode(png((1, 1), 16, 4, b"\0\0\0\0\0"), "image").getpixel((0, 0)) == WHITE
    assert images.decode(png((1, 1), 8, 6, b"\0\0\0\0\0"), "image").getpixel((0, 0)) == WHITE
    for mode in ("LA", "RGBA"):
        clear = saved(Image.new(mode, (8, 8)), "WEBP", exact=True)
        assert images.decode(clear, "image").getpixel((0, 0)) == WHITE
    lossy = io.BytesIO()
    Image.new("RGBA", (8, 8), (*RED, 0)).save(lossy, "WEBP", quality=80)
    assert images.decode(lossy.getvalue(), "image").getpixel((0, 0)) == WHITE


def test_a_key_of_the_wrong_length_hides_nothing() -> None:
    data = png((1, 1), 8, 2, b"\0\1\2\3", chunk(b"tRNS", b"\0\1"))
    assert images.decode(data, "image").getpixel((0, 0)) == (1, 2, 3)


def test_a_mask_may_be_drawn_in_its_alpha_channel_alone() -> None:
    for mode in ("RGBA", "LA"):
        brush = Image.new(mode, (8, 8))
        brush.paste((*(0,) * (len(mode) - 1), 255), (4, 0, 8, 8))
        told = images.decode_mask(saved(brush, "PNG"), (8, 8))
        assert (told.getpixel((0, 0)), told.getpixel((7, 0))) == (0, 255)
    # Nothing is transparent in these: they say that nothing may change.
    assert images.decode_mask(
        saved(Image.new("RGBA", (8, 8), (0, 0, 0, 255)), "PNG"), (8, 8)
    ).getextrema() == (0, 0)
    assert images.decode_mask(saved(Image.new("L", (8, 8)), "PNG"), (8, 8)).getextrema() == (0, 0)


# Colours


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    at, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, at + len(body), len(content))
        body += content
    white = struct.pack(">3i", 63_190, 65_536, 54_061)
    head = (
        struct.pack(">I4xI4s4s4s", at + len(body), 0x02400000, kind, space, pcs)
        + bytes(12)
        + b"acsp"
        + bytes(28)
    )
    return (head + white).ljust(128, b"\0") + table + body


def numbers(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(f">{len(values)}i", *(round(value * 65_536) for value in values))


def power(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


# The columns are those that the makers of the spaces publish, adapted to D50.
ADOBE = profile(
    b"RGB ",
    {
        b"rXYZ": numbers(0.60974, 0.31111, 0.01947),
        b"gXYZ": numbers(0.20528, 0.62567, 0.06087),
        b"bXYZ": numbers(0.14919, 0.06322, 0.74457),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), power(2.19921875)),
    },
)
DISPLAY_P3 = profile(
    b"RGB ",
    {
        b"rXYZ": numbers(0.51512, 0.24120, -0.00105),
        b"gXYZ": numbers(0.29198, 0.69225, 0.04189),
        b"bXYZ": numbers(0.15710, 0.06657, 0.78407),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), power(2.2)),
    },
)
GRAY = profile(b"GRAY", {b"wtpt": numbers(0.9642, 1.0, 0.82491), b"kTRC": power(1.0)})


def inks() -> bytes:
    """Inks that are all of one hue: paper is white in L*a*b*, and each full ink dark green."""
    corners = b"".join(b"\xff\x80\x80" if not inks else b"\x40\x40\xa0" for inks in range(16))
    ramp = bytes(range(256))
    identity = b"".join(struct.pack(">i", 65_536 if i % 4 == 0 else 0) for i in range(9))
    lut = b"mft1" + bytes(4) + b"\x04\x03\x02\0" + identity + ramp * 4 + corners + ramp * 3
    return profile(b"CMYK", {b"A2B0": lut, b"wtpt": numbers(0.9642, 1.0, 0.82491)}, b"prtr", b"Lab ")


@pytest.mark.parametrize("format", FORMATS)
def test_wide_colours_become_srgb(format: str) -> None:
    # Computed apart from all of this: to light, through the published columns of both spaces, and back.
    shown = images.decode(saved(plain((100, 200, 100)), format, icc_profile=DISPLAY_P3), "image")
    assert near(shown, (43, 204, 85))
    shown = images.decode(saved(plain((100, 200, 100)), format, icc_profile=ADOBE), "image")
    assert near(shown, (0, 201, 92))


def test_inks_and_gray_have_profiles_of_their_own() -> None:
    paper = Image.new("CMYK", (16, 16), (0, 0, 0, 0))
    ink = Image.new("CMYK", (16, 16), (128, 0, 0, 0))
    assert near(images.decode(saved(paper, "JPEG", icc_profile=inks()), "image"), WHITE)
    # Half of the way between the two in L*a*b*, the darker of which is this profile's black.
    assert near(images.decode(saved(ink, "JPEG", icc_profile=inks()), "image"), (102, 155, 121), by=8)
    # Without a profile it is the plain inverse.
    assert near(images.decode(saved(ink, "JPEG"), "image"), (127, 255, 255))
    # Half of the light is far more than half of the value.
    for format in ("PNG", "JPEG"):
        shown = images.decode(saved(Image.new("L", (16, 16), 128), format, icc_profile=GRAY), "image")
        assert near(shown, (188, 188, 188))


def test_a_transparent_picture_keeps_its_alpha_beside_its_profile() -> None:
    picture = Image.new("RGBA", (2, 1), (100, 200, 100, 255))
    picture.putpixel((1, 0), (100, 200, 100, 0))
    shown = images.decode(saved(picture, "PNG", icc_profile=DISPLAY_P3), "image")
    assert near(shown, (43, 204, 85)) and shown.getpixel((1, 0)) == WHITE


def test_a_profile_for_other_channels_is_ignored() -> None:
    for image, other in (
        (plain(), GRAY),
        (plain(), inks()),
        (Image.new("L", (8, 8), 77), ADOBE),
        (plain(), ADOBE[:-99]),
        (plain(), ADOBE.replace(b"mntr", b"link")),
    ):
        expected = image.convert("RGB").getpixel((0, 0))
        assert images.decode(saved(image, "PNG", icc_profile=other), "image").getpixel((0, 0)) == expected


def test_a_picture_in_srgb_is_left_as_it_is() -> None:
    from PIL import ImageCms

    picture = noise((64, 48))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for data in (
        saved(picture, "PNG", icc_profile=srgb),
        with_chunks(saved(picture, "PNG"), chunk(b"gAMA", struct.pack(">I", 45_455))),
        with_chunks(saved(picture, "PNG"), chunk(b"cICP", b"\1\x0d\0\1")),
        with_chunks(saved(picture, "PNG"), chunk(b"sRGB", b"\0"), chunk(b"gAMA", struct.pack(">I", 100_000))),
        # Numbers that mean nothing here, or are too far out.
        with_chunks(saved(picture, "PNG"), chunk(b"cICP", b"\xfe\xfe\0\1")),
        with_chunks(saved(picture, "PNG"), chunk(b"cICP", b"\x09\x10\x09\0")),
        with_chunks(saved(picture, "PNG"), chunk(b"gAMA", bytes(4)), chunk(b"cHRM", bytes(32))),
        with_chunks(saved(picture, "PNG"), chunk(b"gAMA", b"\0\0\xff\xff"), chunk(b"cHRM", bytes(32))),
        with_chunks(saved(picture, "PNG"), chunk(b"gAMA", b"\0\0\xff\xff"), chunk(b"cHRM", b"\xff" * 32)),
    ):
        assert np.array_equal(np.asarray(images.decode(data, "image")), np.asarray(picture))


def test_a_png_tells_its_colours_by_numbers_too() -> None:
    green = saved(plain((100, 200, 100)), "PNG")
    linear = with_chunks(saved(plain((128, 128, 128)), "PNG"), chunk(b"gAMA", struct.pack(">I", 100_000)))
    assert near(images.decode(linear, "image"), (188, 188, 188))
    p3 = with_chunks(green, chunk(b"cICP", b"\x0c\x0d\0\1"))
    assert near(images.decode(p3, "image"), (45, 203, 86))
    # What stands above, decides.
    both = with_chunks(
        green, chunk(b"iCCP", b"a\0\0" + zlib.compress(ADOBE)), chunk(b"cICP", b"\x0c\x0d\0\1")
    )
    assert near(images.decode(both, "image"), (45, 203, 86))
    adobe = [31_270, 32_900, 64_000, 33_000, 21_000, 71_000, 15_000, 6_000]
    told = with_chunks(
        green, chunk(b"gAMA", struct.pack(">I", 45_455)), chunk(b"cHRM", struct.pack(">8I", *adobe))
    )
    assert near(images.decode(told, "image"), (0, 201, 92))
    # White of 203 cd/m², and brighter than that.
    hdr = [with_chunks(saved(plain((v, v, v)), "PNG"), chunk(b"cICP", b"\x09\x10\0\1")) for v in (148, 255)]
    for data in hdr:
        assert near(images.decode(data, "image"), WHITE, by=6)
    hlg = with_chunks(saved(plain((191, 191, 191)), "PNG"), chunk(b"cICP", b"\x09\x12\0\1"))
    assert near(images.decode(hlg, "image"), WHITE, by=6)


def test_colours_of_a_mask_are_numbers() -> None:
    mask = saved(Image.new("L", (8, 8), 128), "PNG", icc_profile=GRAY)
    assert images.decode_mask(mask, (8, 8)).getpixel((0, 0)) == 128


def test_text_of_a_file_is_no_reason_to_refuse_it_either() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("note", "x" * 2_000_000, zip=True)
    assert near(images.decode(saved(plain(), "PNG", pnginfo=info), "image"), RED)

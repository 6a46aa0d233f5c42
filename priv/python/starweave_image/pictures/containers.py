"""What an image file consists of, read from its container without unpacking a pixel.

`read` walks the chunks of a PNG or WebP and the markers of a JPEG. It refuses what would take long to decode, and gives
back a file with the pixels alone: whatever else is in there, broken or hostile as it may be, has no say over
them. The few facts that do have one are returned beside it.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

MAX_SIDE = 4096
MAX_PARTS = 65_536
"""Chunks of a PNG or WebP, segments of a JPEG."""
MAX_PROFILE = 4 * 1024 * 1024
"""Bytes of a colour profile; a larger one is left out."""
MAX_BLOCKS = 2**24
"""Blocks of 8x8 values that all scans of a JPEG may visit together: even an almost empty scan visits all blocks of its
components, and a core visits about 20 million a second."""

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8"


class Refused(Exception):
    """The file is sound but not accepted; the message says what it must be, and follows the name of a field."""


class Damaged(Exception):
    """The file is broken, or cut short."""


@dataclass(frozen=True)
class Container:
    """A picture that may be decoded. Sizes are in pixels, before `orientation` (1 to 8, as in EXIF) is applied."""

    format: str
    width: int
    height: int
    data: bytes
    orientation: int = 1
    profile: bytes | None = None
    """An ICC profile, which may be broken."""
    # Only PNG has the fields below.
    depth: int = 8
    key: bytes | None = None
    """In gray or RGB: the one colour that is transparent, 16 bits a channel of which `depth` count."""
    cicp: tuple[int, ...] | None = None
    """Primaries, transfer, matrix and range by the numbers of ITU-T H.273."""
    is_srgb: bool = False
    gamma: int | None = None
    """The exponent by which light became the file's values, in 1/100,000."""
    primaries: tuple[int, ...] | None = None
    """x and y of white, red, green and blue, in 1/100,000."""


def read(data: bytes) -> Container:
    """The picture in a PNG, JPEG or WebP file: of several, the first. Raises `Refused` or `Damaged`."""
    try:
        if data.startswith(PNG):
            return _read_png(data)
        if data.startswith(JPEG):
            return _read_jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _read_webp(data)
    except (struct.error, IndexError):
        raise Damaged from None
    raise Damaged


def _check_size(width: int, height: int) -> None:
    if min(width, height) < 1:
        raise Damaged
    if max(width, height) > MAX_SIDE:
        raise Refused(f"must be at most {MAX_SIDE}x{MAX_SIDE} pixels, got {width}x{height}")


# PNG

_PALETTE = 3


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Each chunk's name, content and all its bytes, without ancillary chunks of a wrong checksum and without a chunk that is
    cut off after the pixels. Whether the pixels are complete shows when they are unpacked."""
    at, pixels = len(PNG), False
    for _ in range(MAX_PARTS):
        header, name = data[at : at + 8], data[at + 4 : at + 8]
        end = at + 12 + int.from_bytes(header[:4], "big")
        if len(header) < 8 or end > len(data):
            if pixels and name != b"IDAT":
                return
            raise Damaged
        whole = data[at:end]
        if int.from_bytes(whole[-4:], "big") == zlib.crc32(whole[4:-4]):
            yield name, whole[8:-4], whole
        elif _is_critical(name):
            raise Damaged
        if name == b"IEND":
            return
        at, pixels = end, pixels or name == b"IDAT"
    raise Refused(f"must have at most {MAX_PARTS} chunks")


def _png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _is_critical(name: bytes) -> bool:
    return not name[0] & 0x20


def _read_png(data: bytes) -> Container:
    chunks = _chunks(data)
    name, content, whole = next(chunks)
    if name != b"IHDR":
        raise Damaged
    width, height, depth, kind = struct.unpack_from(">IIBB", content)
    _check_size(width, height)
    header, pixels, facts = whole, list[bytes](), dict[bytes, bytes]()
    for name, content, whole in chunks:
        if name == b"IDAT":
            pixels.append(whole)
        elif _is_critical(name) and name not in (b"PLTE", b"IEND"):
            raise Damaged
        elif name == b"acTL" and not pixels and int.from_bytes(content[:4], "big") > 1:
            raise Refused("must be a still picture")
        # The first of several counts. A palette or a transparent colour counts only before the pixels.
        elif not pixels or name not in (b"PLTE", b"tRNS"):
            facts.setdefault(name, content)
    key, palette = facts.get(b"tRNS"), b""
    if kind == _PALETTE:
        if not facts.get(b"PLTE"):
            raise Damaged
        # More colours than a byte can index are useless, and an error to most readers.
        palette, key = _png_chunk(b"PLTE", facts[b"PLTE"][:768]), None
        palette += _png_chunk(b"tRNS", facts[b"tRNS"][:256]) if facts.get(b"tRNS") else b""
    gamma, primaries, cicp = (facts.get(name, b"") for name in (b"gAMA", b"cHRM", b"cICP"))
    return Container(
        "PNG",
        width,
        height,
        b"".join([PNG, header, palette, *pixels, _png_chunk(b"IEND", b"")]),
        _orientation(facts.get(b"eXIf", b"")),
        _inflated(facts[b"iCCP"]) if b"iCCP" in facts else None,
        depth=depth,
        key=key,
        cicp=tuple(cicp) if len(cicp) == 4 else None,
        is_srgb=b"sRGB" in facts,
        gamma=int.from_bytes(gamma, "big") if len(gamma) == 4 else None,
        primaries=struct.unpack(">8I", primaries) if len(primaries) == 32 else None,
    )


def _inflated(content: bytes) -> bytes | None:
    """The profile of an iCCP chunk: a name that ends with NUL, a method, and the compressed rest."""
    packed = content[content.find(b"\0") + 2 :]
    unpacking = zlib.decompressobj()
    try:
        profile = unpacking.decompress(packed, MAX_PROFILE)
    except zlib.error:
        return None
    return profile if unpacking.eof else None


# JPEG

# After any number of FF bytes as padding. 00 marks an FF as data, D0 to D7 divide data, 01 has no meaning.
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
_OTHER_FRAMES = frozenset({0xC3, *range(0xC5, 0xD0)} - {0xC8, 0xCC})
_TABLES = frozenset({0xC4, 0xDB, 0xDD})


def _segments(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Each marker with its parameters and, for a scan, its data; ends with the first picture."""
    at = 2
    for _ in range(MAX_PARTS):
        found = _MARKER.search(data, at)
        if found is None:
            return
        marker, at = found[1][0], found.end()
        if marker == _END:
            yield marker, b"", b""
            return
        if marker == _START:
            continue
        end = at + int.from_bytes(data[at : at + 2], "big")
        if end < at + 2 or end > len(data):
            raise Damaged
        parameters, at = data[at + 2 : end], end
        if marker == _SCAN:
            behind = _MARKER.search(data, at)
            end = behind.start() if behind else len(data)
            yield marker, parameters, data[at:end]
            at = end
        else:
            yield marker, parameters, b""
    raise Refused(f"must have at most {MAX_PARTS} segments")


def _read_jpeg(data: bytes) -> Container:
    kept, width, height, scans, visits = [JPEG], 0, 0, 0, 0
    blocks: dict[int, int] = {}
    exif, profile = b"", dict[int, bytes]()
    for marker, parameters, scan in _segments(data):
        if marker == _END:
            kept.append(b"\xff\xd9")
            break
        if marker in _OTHER_FRAMES or (marker in _FRAMES and parameters[0] != 8):
            raise Refused("must be a baseline or progressive JPEG of 8 bits a channel")
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", parameters, 1)
            _check_size(width, height)
            blocks = _blocks(width, height, parameters[6:])
        elif marker == _SCAN:
            scans += 1
            visits += sum(blocks.get(parameters[1 + 2 * i], 0) for i in range(parameters[0]))
            if visits > MAX_BLOCKS:
                raise Refused(
                    f"must be a JPEG of fewer scans, got {scans} or more of {width}x{height} pixels"
                )
        elif marker == 0xE1 and parameters.startswith(b"Exif\0\0"):
            exif = exif or parameters
        elif marker == 0xE2 and parameters.startswith(b"ICC_PROFILE\0"):
            # Its parts are numbered from 1, and each has their total number.
            profile.setdefault(parameters[12], parameters[13:])
        # It says how to read the channels; one that is too short is ignored.
        known = (marker == 0xE0 and parameters.startswith(b"JFIF\0") and len(parameters) >= 14) or (
            marker == 0xEE and parameters.startswith(b"Adobe") and len(parameters) >= 12
        )
        if known or marker in _TABLES or marker in _FRAMES or marker == _SCAN:
            kept += [struct.pack(">BBH", 0xFF, marker, len(parameters) + 2), parameters, scan]
    if not scans or not width:
        raise Damaged
    return Container("JPEG", width, height, b"".join(kept), _orientation(exif), _joined(profile))


def _blocks(width: int, height: int, components: bytes) -> dict[int, int]:
    """How many blocks each component has, by its id."""
    sampled = [
        (components[i], components[i + 1] >> 4, components[i + 1] & 15) for i in range(0, len(components), 3)
    ]
    across, down = max(h for _, h, _ in sampled), max(v for _, _, v in sampled)
    if not across or not down:
        raise Damaged
    return {id: -(-width * h // (8 * across)) * -(-height * v // (8 * down)) for id, h, v in sampled}


def _joined(parts: dict[int, bytes]) -> bytes | None:
    whole = all(part and part[0] == len(parts) for part in parts.values())
    profile = b"".join(parts[number][1:] for number in sorted(parts)) if whole else b""
    return profile if 0 < len(profile) <= MAX_PROFILE else None


# WebP


def _riff(data: bytes, at: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of each complete chunk."""
    for _ in range(MAX_PARTS):
        name, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if at + 8 + length > end:
            return
        yield name, data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
    raise Refused(f"must have at most {MAX_PARTS} chunks")


def _read_webp(data: bytes) -> Container:
    found: dict[bytes, bytes] = {}
    frames = 0
    for name, content in _riff(data, 12, len(data)):
        frames += name == b"ANMF"
        if frames > 1:
            raise Refused("must be a still picture")
        if name == b"ANMF":
            # Position, size, duration and flags; then chunks as in a file of its own.
            for inner, inside in _riff(content, 16, len(content)):
                found.setdefault(inner, inside)
        else:
            found.setdefault(name, content)
    if (lossy := found.get(b"VP8 ")) is not None:
        if lossy[3:6] != b"\x9d\x01\x2a":
            raise Damaged
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", lossy, 6))
        _check_size(width, height)
        kept = _chunk(b"VP8 ", lossy)
        if (alpha := found.get(b"ALPH")) is not None:
            canvas = (
                struct.pack("<I", 0x10)
                + (width - 1).to_bytes(3, "little")
                + (height - 1).to_bytes(3, "little")
            )
            kept = _chunk(b"VP8X", canvas) + _chunk(b"ALPH", alpha) + kept
    elif (lossless := found.get(b"VP8L")) is not None:
        if lossless[:1] != b"\x2f":
            raise Damaged
        bits = int.from_bytes(lossless[1:5], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        _check_size(width, height)
        kept = _chunk(b"VP8L", lossless)
    else:
        raise Damaged
    file = b"RIFF" + struct.pack("<I", 4 + len(kept)) + b"WEBP" + kept
    profile = found.get(b"ICCP", b"")
    profile = profile if len(profile) <= MAX_PROFILE else b""
    return Container("WEBP", width, height, file, _orientation(found.get(b"EXIF", b"")), profile or None)


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


# EXIF

_ORIENTATION = 0x0112
_MAX_TAGS = 1000


def _orientation(exif: bytes) -> int:
    """The orientation in the first directory of a TIFF structure; 1, upright, if it has none."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        [start] = struct.unpack_from(order + "I", tiff, 4)
        [count] = struct.unpack_from(order + "H", tiff, start)
        for index in range(min(count, _MAX_TAGS)):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * index)
            if tag == _ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1

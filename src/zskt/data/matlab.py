"""Numeric arrays in MATLAB's level 5 files, read in Python: SciPy's compiled reader crashes on some damaged ones.

Format: "MAT-File Format", The MathWorks. After 128 bytes of header come elements: a tag, which is two words (type and
length in bytes) and is followed by that many bytes, up to a multiple of 8; or, for up to 4 bytes, one word (length in
its upper half, type in its lower) and the bytes at once. A compressed element holds another.
"""

import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
MATRIX, COMPRESSED = 14, 15
NUMERIC = range(6, 16)  # the classes of arrays that are of numbers; others are cells, structures, text
COMPLEX = 0x800
MOST = 2**31
"""Bytes that a compressed element may hold: the largest part of SVHN has 1.6 GB."""


def read_arrays(data: bytes, names: list[str]) -> dict[str, NDArray[Any]]:
    """The arrays of these names in a file's content, by name; raises ValueError for what is no such file."""
    if len(data) < 128 or data[124:128] != b"\x00\x01IM":
        raise ValueError("no little-endian MAT file of level 5")
    found = {}
    for kind, body in elements(memoryview(data)[128:]):
        if kind == COMPRESSED:
            ((kind, body),) = elements(inflated(body))
        if kind != MATRIX:
            raise ValueError(f"element of type {kind}")
        parts = elements(body)
        (_, flags), (_, sizes), (_, name) = (next(parts, (0, b"")) for _ in range(3))
        if bytes(name).decode("latin1") not in names:
            continue
        (word, _), shape = np.frombuffer(flags, "<u4"), np.frombuffer(sizes, "<i4").tolist()
        kind, values = next(parts, (0, memoryview(b"")))
        if word & 0xFF not in NUMERIC or word & COMPLEX or kind not in NUMBERS or min(shape, default=-1) < 0:
            raise ValueError(f"{bytes(name)!r} is not an array of real numbers")
        array = np.frombuffer(values, f"<{NUMBERS[kind]}")
        if math.prod(shape) != len(array):
            raise ValueError(f"{bytes(name)!r} has {len(array):,} numbers for the shape {shape}")
        found[bytes(name).decode("latin1")] = array.reshape(shape, order="F")
    return found


def elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Type and bytes of each element."""
    at = 0
    while at < len(data):
        tag = int.from_bytes(data[at : at + 4], "little")
        kind, length, start, after = tag, int.from_bytes(data[at + 4 : at + 8], "little"), at + 8, at + 8
        if tag >> 16:
            kind, length, start = tag & 0xFFFF, tag >> 16, at + 4
        else:
            after += length if kind == COMPRESSED else -(-length // 8) * 8
        if start + length > len(data) or (tag >> 16 and length > 4):
            raise ValueError(f"an element of {length:,} bytes, of which {max(0, len(data) - start):,} are there")
        yield kind, data[start : start + length]
        at = after


def inflated(body: memoryview) -> memoryview:
    """The content of a compressed element; raises ValueError if it is longer than MOST or not whole."""
    reader = zlib.decompressobj()
    try:
        content = reader.decompress(body, MOST)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not reader.eof:
        raise ValueError("a compressed element is not whole")
    return memoryview(content)

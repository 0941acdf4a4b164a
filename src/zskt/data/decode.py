"""Image files as bytes (N, C, H, W), decoded in groups that fit into memory, resized and converted if asked."""

import io
import math
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from zskt.data.arrays import Pixels
from zskt.data.sources import Member, Notice
from zskt.errors import UsageError, ZsktError, failing
from zskt.networks.models import Size

Progress = Callable[[int, int], None]  # (images done, total)

_DECODERS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not EPS, for which Pillow starts Ghostscript
_CHANNELS = {"1": 1, "L": 1, "LA": 1, "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "CMYK": 3, "YCbCr": 3}  # 8-bit modes
_GROUP, _GROUP_BYTES = 256, 2**27  # most images decoded at once, and most bytes of their files, and of their pixels
_MOST_PIXELS = 2**26  # of an image; while it is decoded it takes up to eight bytes for each
_LARGE = 2**22  # pixels from which on images are decoded one at a time
_ONE_AT_A_TIME = threading.Lock()


def check_size(size: Size | None) -> None:
    """Raise UsageError for a size to resize to that no image has."""
    if size is not None and (len(size) != 3 or size[0] not in (1, 3) or min(size) < 1):
        raise UsageError(f"expected a size (C, H, W) with C 1 or 3, found {size}; correct it")


def in_memory(write: Callable[[IO[bytes]], list[str]], notice: Notice) -> Pixels:
    """The array that `write` writes."""
    memory = io.BytesIO()
    for line in write(memory):
        notice(line)
    memory.seek(0)
    images: Pixels = np.load(memory)
    return images


def decode(file: IO[bytes], files: list[Member], size: Size | None, progress: Progress | None) -> list[str]:
    """Write the images as one .npy array (N, C, H, W) uint8; returns notices about what was changed."""
    changes: Counter[str] = Counter()
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        shape = size or _native(_opened(files[0], files[0].read()))
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), *shape)}
        np.lib.format.write_array_header_1_0(file, header)
        done = 0
        for group in _groups(files, _GROUP_BYTES // math.prod(shape)):
            contents = [member.read() for member in group]  # in one thread, as archives are not thread-safe
            like = None if size else files[0]
            for pixels, changed in pool.map(partial(_fit, shape=shape, like=like), group, contents):
                file.write(pixels.tobytes())
                changes.update(changed)
            done += len(group)
            if progress:
                progress(done, len(files))
    return [f"{count:,} of {len(files):,} images {change}" for change, count in changes.items()]


def _groups(files: list[Member], most: int) -> Iterator[list[Member]]:
    """The files in order, in groups that fit into memory: by their own bytes, and at most `most` decoded ones."""
    group: list[Member] = []
    for member in files:
        if group and (len(group) >= min(most, _GROUP) or sum(each.size for each in [*group, member]) > _GROUP_BYTES):
            yield group
            group = []
        group.append(member)
    yield group


def _opened(member: Member, content: bytes) -> Image.Image:
    """An image of which only the header was read; raises ZsktError if it is none, or too large."""
    with failing(f"{member} cannot be decoded", "replace or remove it"):
        try:
            image: Image.Image = Image.open(io.BytesIO(content), formats=_DECODERS)
        except UnidentifiedImageError:
            raise ZsktError(f"{member} is not an image of a known format; replace or remove it") from None
    if image.mode not in _CHANNELS:
        raise ZsktError(f"{member}: expected 8 bits per channel, found mode {image.mode}; convert it")
    if image.width * image.height > _MOST_PIXELS:
        raise ZsktError(
            f"{member}: expected at most {_MOST_PIXELS:,} pixels, found {image.height} x {image.width}; resize it"
        )
    return image


def _native(image: Image.Image) -> Size:
    return _CHANNELS[image.mode], image.height, image.width


def _fit(member: Member, content: bytes, shape: Size, like: Member | None) -> tuple[Pixels, list[str]]:
    """One image as `shape` = (C, H, W) uint8, and what was changed: nothing may be if it must be `like` the first."""
    image = _opened(member, content)
    native = _native(image)
    if like is not None and native != shape:
        found = f"{shape} in {like} and {native} in {member}"
        raise ZsktError(f"expected images of one size (C, H, W), found {found}; resize them or give --input-size")
    if image.width * image.height <= _LARGE:
        return _fitted(member, image, shape)
    with _ONE_AT_A_TIME:
        return _fitted(member, image, shape)


def _fitted(member: Member, image: Image.Image, shape: Size) -> tuple[Pixels, list[str]]:
    native = _native(image)
    with failing(f"{member} cannot be decoded", "replace or remove it"):
        image.load()
    channels, height, width = shape
    changes = []
    if image.has_transparency_data:
        image = image.convert("RGBA")  # because Pillow warns about palette to RGB
        changes.append("lost their transparency")
    image = image.convert("L" if channels == 1 else "RGB")
    if native[0] != channels:
        changes.append("converted from greyscale to colour" if channels == 3 else "converted from colour to greyscale")
    if native[1:] != (height, width):
        scaled = (native[2] * height // native[1], height)  # (width, height): the height fits, the width is cropped
        if scaled[0] < width:
            scaled = (width, native[1] * width // native[2])
        if scaled[0] * scaled[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ZsktError(
                f"{member}: {native[1]} x {native[2]} is too elongated to be resized to {height} x {width}; "
                "crop or remove it"
            )
        left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
        image = image.resize(scaled, Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
        changes.append(f"resized and centre-cropped to {height} x {width}")
    pixels = np.asarray(image)  # (H, W) or (H, W, 3)
    return (pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)), changes

"""Labelled images, for training a teacher and for measuring.

sources -> members (files in folders, zips, tars) -> images as split/class/file | IDX | CIFAR | SVHN -> Dataset
File names determine split and class; the content is checked. Nothing is unpacked to disk, no pickle can run code.
N images, C channels, H x W pixels, K classes.
"""

import errno
import hashlib
import io
import json
import math
import os
import re
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from zskt.data.arrays import Pixels, Split, find_arrays, read_arrays
from zskt.data.sources import IMAGE_NAME, Member, Notice, members_of
from zskt.errors import UsageError, ZsktError, failing, to_stderr, unknown
from zskt.files import expanded, read_json, regular, replacing, write_json
from zskt.networks.models import Size

Progress = Callable[[int, int], None]  # (images done, total)

_DIGITS = tuple("0123456789")
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm"""


@dataclass(frozen=True)
class Dataset:
    """One split of a labelled image set."""

    images: Tensor  # (N, C, H, W) uint8; may be memory-mapped
    labels: Tensor  # (N,) int64 in [0, K)
    class_names: tuple[str, ...]  # K
    name: str  # a key of KNOWN if recognised, else "images"


@dataclass(frozen=True)
class KnownSet:
    """Constants of a well-known image set."""

    size: Size
    class_names: tuple[str, ...]  # K, in label order
    mean: tuple[float, ...]  # C, per channel, of pixels in [0, 1]
    std: tuple[float, ...]  # C, same scale as mean
    horizontal_flip: bool  # whether a flipped image keeps its class
    files: str  # what to pass as --data


_IDX_FILES = "the path of a folder with {train,t10k}-{images-idx3,labels-idx1}-ubyte, plain or .gz"
_CIFAR_FILES = "a path: the authors' Python or binary .tar.gz or its folder, or zips or folders of split/class/file"
_SVHN_FILES = "the path of a folder with {train,test}_32x32.mat"
KNOWN: dict[str, KnownSet] = {
    # over all 1,797 images, scaled as in `digits`; test_data.py recomputes them
    "digits": KnownSet((1, 8, 8), _DIGITS, (0.3053,), (0.3759,), False, "digits alone"),
    # over the 60,000 training images, as in PyTorch's MNIST example
    "mnist": KnownSet((1, 28, 28), _DIGITS, (0.1307,), (0.3081,), False, _IDX_FILES),
    # over the 60,000 training images, as commonly quoted
    "fashion-mnist": KnownSet((1, 28, 28), _FASHION, (0.2860,), (0.3530,), True, _IDX_FILES),
    # The ZSKT authors' values. Their std is the mean of the per-image stds; .2470 .2435 .2616, over all pixels, is also
    # in use. A network trained with one is wrong with the other, so a teacher's folder stores its own.
    "cifar10": KnownSet((3, 32, 32), _CIFAR10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), True, _CIFAR_FILES),
    # over the 50,000 training images, as commonly quoted
    "cifar100": KnownSet(
        (3, 32, 32), tuple(_CIFAR100.split()), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), True, _CIFAR_FILES
    ),
    # the ZSKT authors' values
    "svhn": KnownSet((3, 32, 32), _DIGITS, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), False, _SVHN_FILES),
}

_IMAGE = re.compile(  # [top/]split/class/file; non-greedy, because CIFAR-100 has a class called train
    rf"(?:[^/]+/)??(train|test|val|valid|validation)/([^/]+)/{IMAGE_NAME.pattern}", re.IGNORECASE | re.DOTALL
)
_DECODERS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not EPS, for which Pillow starts Ghostscript
_CHANNELS = {"1": 1, "L": 1, "LA": 1, "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "CMYK": 3, "YCbCr": 3}  # 8-bit modes
_GROUP, _GROUP_BYTES = 256, 2**27  # most images decoded at once, and most bytes of their files, and of their pixels
_MOST_PIXELS = 2**26  # of an image; while it is decoded it takes up to eight bytes for each
_LARGE = 2**22  # pixels from which on images are decoded one at a time
_ONE_AT_A_TIME = threading.Lock()


def _read_images(
    members: list[Member], split: Split, size: Size | None, progress: Progress | None, notice: Notice
) -> Dataset:
    splits: dict[str, dict[str, list[Member]]] = {}  # split -> class -> images
    for member in members:
        if match := _IMAGE.fullmatch(member.name):
            splits.setdefault(match[1].lower(), {}).setdefault(match[2], []).append(member)
    usable = ("train",) if split == "train" else ("test", "val", "valid", "validation")
    part = next((name for name in usable if name in splits), "")
    if not part:
        raise ZsktError(f"expected images of split {split}, found only {', '.join(splits)}; add the source that has it")
    if part != split:
        notice(f"no split {split} found, using {part}")
    classes = splits[part]
    class_names = tuple(sorted(splits.get("train", classes)))
    if strange := sorted(set(classes) - set(class_names)):
        raise ZsktError(f"{part} has a class {strange[0]!r} that train lacks; correct the class folders")
    files = [member for name in class_names for member in classes.get(name, [])]
    labels = [label for label, name in enumerate(class_names) for _ in classes.get(name, [])]

    key = hashlib.sha256(json.dumps([part, class_names, size]).encode())
    seen: dict[bytes, Member] = {}
    for member in files:
        digest = hashlib.sha256(json.dumps(member.name).encode() + member.read()).digest()
        if (other := seen.setdefault(digest, member)) is not member:
            raise ZsktError(f"{member} is the same image as {other}; give each source once")
        key.update(digest)
    root = os.environ.get("ZSKT_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "zskt")
    decode = partial(_decode, files=files, size=size, progress=progress)
    images = _cached(Path(root, f"{key.hexdigest()}.npy"), decode, notice)
    name = next((name for name in ("cifar10", "cifar100") if KNOWN[name].class_names == class_names), "images")
    return Dataset(torch.from_numpy(images), torch.tensor(labels), class_names, name)


def _cached(path: Path, decode: Callable[[IO[bytes]], list[str]], notice: Notice) -> Pixels:
    """The array that `decode` writes: memory-mapped from the cache at `path`, which is filled if missing or damaged."""
    about = path.with_suffix(".json")
    stored = _stored(path, about)
    if stored is None:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            notice(f"decoded images are not cached: {path.parent} is not writable ({error.strerror}); set ZSKT_CACHE")
            return _in_memory(decode, notice)
        try:
            with replacing(path) as file:
                lines = decode(file)
        except ZsktError as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.ENOSPC:
                raise
            notice(f"decoded images are not cached: no space left for {path.parent}; set ZSKT_CACHE")
            return _in_memory(decode, notice)
        write_json(about, {"sha256": _file_digest(path), "notices": lines})
        stored = _stored(path, about)
        if stored is None:
            raise ZsktError(f"{path} changed while it was written; try again")
    images, lines = stored
    for line in lines:
        notice(line)
    return images


def _stored(path: Path, about: Path) -> tuple[Pixels, list[str]] | None:
    """An entry of the cache, memory-mapped, and its notices; None if it is missing, damaged or no array of bytes."""
    try:
        found = read_json(about)
        if found["sha256"] != _file_digest(path):
            return None
        images: Pixels = np.load(path, mmap_mode="c")  # copy on write, because torch wants writable memory
        lines = [str(line) for line in found["notices"]]
    except (ZsktError, OSError, ValueError, LookupError, TypeError):
        return None
    return (images, lines) if images.dtype == np.uint8 and images.ndim == 4 else None


def _file_digest(path: Path) -> str:
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _in_memory(decode: Callable[[IO[bytes]], list[str]], notice: Notice) -> Pixels:
    memory = io.BytesIO()
    for line in decode(memory):
        notice(line)
    memory.seek(0)
    images: Pixels = np.load(memory)
    return images


def _resized(data: Dataset, size: Size | None, progress: Progress | None, notice: Notice) -> Dataset:
    """The images at `size`; they pass through the decoder as in-memory PGM or PPM files, a header and raw pixels."""
    channels, height, width = data.images.shape[1:]
    if size in (None, (channels, height, width)):
        return data
    header = f"P{5 if channels == 1 else 6} {width} {height} 255\n".encode()
    pixels = data.images.permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, C)
    loads = [partial(bytes, header + image.tobytes()) for image in pixels]
    files = [Member(Path(data.name), f"image {index}", 0, load) for index, load in enumerate(loads)]
    images = _in_memory(partial(_decode, files=files, size=size, progress=progress), notice)
    return replace(data, images=torch.from_numpy(images))


def _decode(file: IO[bytes], files: list[Member], size: Size | None, progress: Progress | None) -> list[str]:
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


def read(
    sources: Sequence[str],
    split: Split,
    *,
    size: Size | None = None,
    progress: Progress | None = None,
    notice: Notice = to_stderr,
) -> Dataset:
    """One split of the data in `sources`: paths of folders, zips, tars and files, or ["digits"].

    With `size` = (C, H, W), images of another size are resized (shorter side, antialiased bilinear), centre-cropped and
    converted between greyscale and colour, with one `notice` each; without it, all must have the same size.
    `progress` is called from this thread. Image files are sorted by class, then name, so shuffle before taking a few;
    other formats keep the order of their files. Decoded image files are cached in $ZSKT_CACHE, else
    $XDG_CACHE_HOME/zskt, else ~/.cache/zskt, by a hash of their content; that folder may be deleted at any time.

    Raises UsageError for a name that is neither a path nor "digits", ZsktError for missing or broken data.
    """
    sources = [sources] if isinstance(sources, str) else [str(source) for source in sources]
    if split not in ("train", "test"):
        raise unknown("split", split, ("train", "test"))
    if size is not None and (len(size) != 3 or size[0] not in (1, 3) or min(size) < 1):
        raise UsageError(f"expected a size (C, H, W) with C 1 or 3, found {size}; correct it")
    if sources == ["digits"]:
        return _resized(digits()[split == "test"], size, progress, notice)
    paths = [_existing(source) for source in sources]
    members = sorted((m for path in paths for m in members_of(path, notice)), key=lambda member: member.name)
    images = [member for member in members if _IMAGE.fullmatch(member.name)]
    layout, arrays = ("images", {}) if images else find_arrays(members)
    used = images or list(arrays.values())
    if not used:
        found = f"only files such as {members[0]}" if members else "nothing"
        wanted = "images as split/class/file (test/cat/1.png), or the files of MNIST, CIFAR or SVHN"
        raise ZsktError(f"expected {wanted} in {', '.join(sources) or 'a path'}, found {found}; correct the path")
    if idle := [path for path in paths if path not in {member.source for member in used}]:
        raise ZsktError(f"expected data of one format, found nothing like {used[0]} in {idle[0]}; give only one")
    if images:
        return _read_images(images, split, size, progress, notice)
    return _resized(_dataset(*read_arrays(layout, arrays, split)), size, progress, notice)


def digits(split_seed: int = 0) -> tuple[Dataset, Dataset]:
    """scikit-learn's 1,797 handwritten digits (Alpaydin & Kaynak 1998, UCI): 1,257 to train, 540 to test.

    Images (N, 1, 8, 8): counts 0..16 scaled to 0..255. The split is random by `split_seed` and stratified by class.
    Raises ZsktError if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ZsktError('the digits need scikit-learn, which is not installed: pip install "zskt[demo]"') from error
    counts, labels = load_digits(return_X_y=True)  # (1797, 64) float in 0..16, (1797,)
    images = np.rint(counts * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    parts = train_test_split(images, labels, test_size=0.3, stratify=labels, random_state=split_seed)
    return _dataset(parts[0], parts[2], "digits"), _dataset(parts[1], parts[3], "digits")


def _existing(source: str) -> Path:
    path = expanded(source)
    if os.path.exists(path):  # Path.exists raises if a parent folder is not readable
        return path
    if source in KNOWN:
        raise UsageError(f"{source}: nothing is downloaded, give {KNOWN[source].files}")
    if path.suffix or len(path.parts) > 1:
        raise ZsktError(f"expected data at {source}, found no such file or folder; check the path")
    raise unknown("data set", source, KNOWN)


def _dataset(images: Pixels, labels: NDArray[Any], name: str) -> Dataset:
    """Arrays (N, C, H, W) and (N,) as a data set; raises ZsktError if they cannot be one."""
    highest = int(labels.max(initial=0))
    known = KNOWN.get(name)
    class_names = known.class_names if known else tuple(str(label) for label in range(highest + 1))
    if images.dtype != np.uint8 or images.ndim != 4 or (known and images.shape[1:] != known.size):
        raise ZsktError(
            f"expected uint8 images of {name}, found shape {images.shape} of {images.dtype}; fetch the files again"
        )
    if not 0 < len(images) == len(labels) or labels.min() < 0 or highest >= len(class_names):
        found = f"{len(images)} images and {len(labels)} labels up to {highest}"
        raise ZsktError(f"expected one label below {len(class_names)} per image, found {found}; fetch the files again")
    return Dataset(torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64)), class_names, name)

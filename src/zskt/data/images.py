"""Labelled images, for training a teacher and for measuring.

sources -> members (files in folders, zips, tars) -> images as split/class/file | IDX | CIFAR | SVHN -> Dataset
File names determine split and class; the content is checked. Nothing is unpacked to disk, no pickle can run code.
N images, C channels, H x W pixels, K classes.
"""

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zskt.data.arrays import Pixels, Split, find_arrays, read_arrays
from zskt.data.decode import Progress, check_size, decode, in_memory
from zskt.data.sources import IMAGE_NAME, Member, Notice, members_of
from zskt.errors import UsageError, ZsktError, to_stderr, unknown
from zskt.files import expanded, read_json, regular, replacing, write_json
from zskt.networks.models import Size

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
    write = partial(decode, files=files, size=size, progress=progress)
    images = _cached(Path(root, f"{key.hexdigest()}.npy"), write, notice)
    name = next((name for name in ("cifar10", "cifar100") if KNOWN[name].class_names == class_names), "images")
    return Dataset(torch.from_numpy(images), torch.tensor(labels), class_names, name)


def _cached(path: Path, write: Callable[[IO[bytes]], list[str]], notice: Notice) -> Pixels:
    """The array that `write` writes: memory-mapped from the cache at `path`, which is filled if missing or damaged."""
    about = path.with_suffix(".json")
    stored = _stored(path, about)
    if stored is None:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        except OSError as error:
            notice(f"decoded images are not cached: {path.parent} is not writable ({error.strerror}); set ZSKT_CACHE")
            return in_memory(write, notice)
        try:
            with replacing(path) as file:
                lines = write(file)
        except ZsktError as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.ENOSPC:
                raise
            notice(f"decoded images are not cached: no space left for {path.parent}; set ZSKT_CACHE")
            return in_memory(write, notice)
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


def _resized(data: Dataset, size: Size | None, progress: Progress | None, notice: Notice) -> Dataset:
    """The images at `size`; they pass through the decoder as in-memory PGM or PPM files, a header and raw pixels."""
    channels, height, width = data.images.shape[1:]
    if size in (None, (channels, height, width)):
        return data
    header = f"P{5 if channels == 1 else 6} {width} {height} 255\n".encode()
    pixels = data.images.permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, C)
    loads = [partial(bytes, header + image.tobytes()) for image in pixels]
    files = [Member(Path(data.name), f"image {index}", 0, load) for index, load in enumerate(loads)]
    images = in_memory(partial(decode, files=files, size=size, progress=progress), notice)
    return replace(data, images=torch.from_numpy(images))


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
    check_size(size)
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


def read_unlabelled(
    source: str | Path, size: Size, *, progress: Progress | None = None, notice: Notice = to_stderr
) -> Tensor:
    """All images in a folder or archive, whatever its folders mean: (M, *size) uint8, in the order of their names.

    They are resized and converted as `read` does it. Raises ZsktError if there are none.
    """
    check_size(size)
    path = expanded(source)
    if not os.path.exists(path):
        raise ZsktError(f"expected a folder or archive of images at {source}, found nothing; check the path")
    files = [member for member in members_of(path, notice) if IMAGE_NAME.fullmatch(member.name)]
    if not files:
        raise ZsktError(f"expected PNG, JPEG or similar images in {source}, found none; give the folder that has them")
    files.sort(key=lambda member: member.name)
    return torch.from_numpy(in_memory(partial(decode, files=files, size=size, progress=progress), notice))


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

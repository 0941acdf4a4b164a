"""Image sets in array files: MNIST's IDX, CIFAR's batches, SVHN's .mat. No pickle can run code."""

import io
import math
import pickle
import pickletools
import re
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from zskt.data import matlab
from zskt.data.sources import Member
from zskt.errors import ZsktError, failing

Split = Literal["train", "test"]
Pixels = NDArray[np.uint8]
_ARRAY = re.compile(
    r"(?P<idx>(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?)"
    r"|(?P<cifar>(data_batch_[1-5]|test_batch|train|test)(\.bin)?)|(?P<svhn>(train|test)_32x32\.mat)"
)
# The first labels of train and test tell these two apart: they share format, size and file names.
_MNIST = ("5041921314", "7210414959")
_FASHION_MNIST = ("9003027255", "9211614657")
Arrays = tuple[Pixels, NDArray[Any], str]  # images (N, C, H, W), labels (N,), name


def find_arrays(members: list[Member]) -> tuple[str, dict[str, Member]]:
    """The array format found, or "", and its files by name without .gz."""
    formats: dict[str, dict[str, Member]] = {}
    for member in members:
        folder, _, name = member.name.rpartition("/")
        if match := _ARRAY.fullmatch(name):
            files = formats.setdefault(str(match.lastgroup), {})
            first = files.setdefault(name.removesuffix(".gz").replace(".idx", "-idx"), member)
            if (first.source, first.name.rpartition("/")[0]) != (member.source, folder):
                raise ZsktError(f"expected one data set, found {first} and {member}; give only one of them")
    if len(formats) > 1:
        raise ZsktError(f"expected one data set, found files of {' and '.join(formats)}; give only one of them")
    return formats.popitem() if formats else ("", {})


def _take(files: dict[str, Member], names: list[str]) -> list[Member]:
    if missing := [name for name in names if name not in files]:
        raise ZsktError(f"expected {', '.join(names)}, found only {', '.join(files)}; add {', '.join(missing)}")
    return [files[name] for name in names]


def _read_idx(files: dict[str, Member], split: Split) -> Arrays:
    """Two zero bytes, 8 (uint8), the number of dimensions, the size of each as big-endian uint32, the values."""
    prefix = "train" if split == "train" else "t10k"
    arrays: list[Pixels] = []
    for member in _take(files, [f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"]):
        data, dimensions = member.read(), 1 if arrays else 3
        start = 4 + 4 * dimensions
        shape = np.frombuffer(data[4:start].ljust(start - 4, b"\0"), ">u4").tolist()
        if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != start + math.prod(shape):
            found = f"first bytes {data[:4].hex()}, shape {shape}, {len(data):,} bytes in total"
            raise ZsktError(
                f"{member}: expected a complete IDX file of {dimensions} dimensions, found {found}; fetch it again"
            )
        arrays.append(np.frombuffer(data, np.uint8, offset=start).reshape(shape))
    images, labels = arrays  # (N, H, W), (N,)
    first = "".join(map(str, labels[:10])) if images.shape[1:] == (28, 28) else ""
    name = "mnist" if first in _MNIST else "fashion-mnist" if first in _FASHION_MNIST else "images"
    return images[:, None], labels, name


def _read_cifar(files: dict[str, Member], split: Split) -> Arrays:
    """The authors' Python version (pickled dictionaries) or binary version (records: label bytes, 3072 pixels)."""
    if len({("batch" in name, name.endswith(".bin")) for name in files}) > 1:
        raise ZsktError(f"expected one version of one CIFAR set, found {', '.join(files)}; give only one of them")
    ten, binary = "batch" in next(iter(files)), next(iter(files)).endswith(".bin")
    batches = [f"data_batch_{number}" for number in range(1, 6)] if split == "train" else ["test_batch"]
    label = 0 if ten else 1  # index of the label byte; CIFAR-100's coarse label comes first
    images, labels = [], []
    for member in _take(files, [name + ".bin" * binary for name in (batches if ten else [split])]):
        data = member.read()
        with failing(f"{member} is not a complete CIFAR batch", "fetch it again"):
            if binary:
                records = np.frombuffer(data, np.uint8).reshape(-1, label + 1 + 3072)
                batch = {b"data": records[:, label + 1 :], b"labels": records[:, label]}
            else:
                _check_memo(data)
                batch = _CifarUnpickler(io.BytesIO(data), encoding="bytes").load()
            images.append(batch[b"data"].reshape(-1, 3, 32, 32))
            labels.append(np.array(batch[b"labels" if ten or binary else b"fine_labels"], np.int64))
    return np.concatenate(images), np.concatenate(labels), "cifar10" if ten else "cifar100"


def _check_memo(data: bytes) -> None:
    """Refuse a memo index beyond the file's length: the unpickler would allocate all the slots below it."""
    for code, argument, _ in pickletools.genops(data):
        if "PUT" in code.name and int(argument or 0) > len(data):
            raise pickle.UnpicklingError(f"it asks for {argument:,} memo slots")


class _CifarUnpickler(pickle.Unpickler):
    """Reads containers, numbers, strings and uint8 arrays; a pickle can call only the functions below."""

    def find_class(self, module: str, name: str) -> Any:
        match module.replace("._core", ".core"), name:  # NumPy 2 added the underscore
            case "numpy.core.multiarray", "_reconstruct":
                return lambda *_: np.empty(0, np.uint8)
            case "numpy", "ndarray":
                return "ndarray"  # only ever an argument of _reconstruct
            case "numpy", "dtype":
                return lambda *_: np.dtype(np.uint8)  # a built-in instance, which ignores pickled state
            case "_codecs", "encode":
                return lambda text, _: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _read_svhn(files: dict[str, Member], split: Split) -> Arrays:
    """MATLAB arrays X (32, 32, 3, N) and y (N, 1), whose 10 is the digit 0."""
    (member,) = _take(files, [f"{split}_32x32.mat"])
    with failing(f"{member} is not an SVHN file of cropped digits", "fetch it again"):
        content = matlab.read_arrays(member.read(), ["X", "y"])
        images, labels = content["X"].transpose(3, 2, 0, 1), content["y"].reshape(-1)  # (N, 3, 32, 32), (N,)
        if images.dtype != np.uint8:
            raise ValueError(f"pixels of type {images.dtype}")
    return images, np.where(labels == 10, 0, labels), "svhn"


def read_arrays(layout: str, files: dict[str, Member], split: Split) -> Arrays:
    """One split of what `find_arrays` found."""
    return {"idx": _read_idx, "cifar": _read_cifar, "svhn": _read_svhn}[layout](files, split)

"""Files that are either complete or absent; nothing is pickled: safetensors, JSON, JSON lines and TOML."""

import contextlib
import itertools
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

from zskt.errors import UsageError, ZsktError, short, system_errors


def expanded(path: str | Path) -> Path:
    """A path with `~` expanded, or unchanged where it names an unknown user; raises UsageError if it is not UTF-8."""
    found = os.path.expanduser(path)
    try:
        os.fspath(found).encode()
    except UnicodeEncodeError as error:  # which reports, settings and libraries in C++ cannot hold
        raise UsageError(f"the path {short(found)!r} is not UTF-8; rename that file or folder") from error
    return Path(found)


MOST_TEXT = 2**26  # bytes of a text file; the longest log of a published recipe has half as many
MOST_BYTES = 2**40  # bytes of any other file
MOST_NESTED = 100  # levels of a JSON text


def regular(path: Path, most: int = MOST_BYTES) -> Path:
    """`path`, if a regular file of at most `most` bytes is there: a device or a pipe may have no end, or no beginning.

    Every file that a user names, or that a folder of a stranger's holds, is opened behind this check.
    """
    with system_errors("read", path):
        found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a device, pipe or socket"
        raise ZsktError(f"expected a file at {path}, found {kind}; give an ordinary file")
    if found.st_size > most:
        raise ZsktError(f"expected at most {most:,} bytes in {path}, found {found.st_size:,}; check what it is")
    return path


def strict_json(text: str) -> Any:
    """The value of a JSON text; raises ValueError if it is invalid, and for what no file of ours holds.

    That is: NaN, infinity, whole numbers beyond 64 bits, halves of surrogate pairs, and more than MOST_NESTED levels.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level: list[Any] = [value]
    for _ in range(MOST_NESTED):
        level = [item for outer in level for item in _inside(outer)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def _inside(value: Any) -> Iterable[Any]:
    """What a JSON value contains; raises ValueError unless it is sound itself."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, list):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a finite number")
    if isinstance(value, int) and value.bit_length() > 63:
        raise ValueError(f"a number of {value.bit_length():,} bits")
    if isinstance(value, str) and not value.isascii():
        value.encode()  # a UnicodeEncodeError is a ValueError
    return ()


TEMPORARY = ".*.tmp"  # names of files that are not whole yet


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that replaces `path` once it is complete (temporary file, fsync, rename), and not on any error."""
    if path.exists() and not path.is_file():  # a rename would replace a device
        raise ZsktError(f"cannot write {path}: it is a folder or device; choose another place with --out")
    with system_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.umask(mask := os.umask(0))  # the only way to read the umask
            os.chmod(temporary, 0o666 & ~mask)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Make a file, or a rename in a folder, durable where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A path for a new file or folder, moved to `path` only if the work succeeds; raises ZsktError if `path` exists."""
    if os.path.lexists(path):
        raise ZsktError(f"{path} already exists; choose another --out or remove it")
    with system_errors("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")
        place = Path(scratch) / path.name
        try:
            yield place
            for file in (place, *place.rglob("*")):
                _sync(file)
            os.rename(place, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, completely or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document; NaN and infinity are refused, as JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_text(path: Path) -> str:
    """The content of a text file."""
    try:
        with system_errors("read", path):
            return regular(path, MOST_TEXT).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ZsktError(f"{path} is not UTF-8 text; save or fetch it again") from error


def read_json(path: Path) -> Any:
    """Read a JSON document."""
    try:
        return strict_json(read_text(path))
    except ValueError as error:
        raise ZsktError(f"{path} is not valid JSON ({error}); save or fetch it again") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of any device and memory format as one safetensors file, in C order."""
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with replacing(path) as file:
        file.write(safetensors.torch.save(plain, dict(metadata or {})))


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with system_errors("read", path), safetensors.safe_open(regular(path), framework="pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ZsktError(f"{path} is not a complete safetensors file ({error}); save or fetch it again") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata."""
    with _open_safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a safetensors file, from its header alone."""
    with _open_safetensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def fresh_folder(parent: Path, name: str) -> Path:
    """`parent`/`name`-N with the lowest number that is free."""
    return next(path for n in itertools.count(1) if not (path := parent / f"{name}-{n}").exists())

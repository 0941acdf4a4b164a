"""Files that are either complete or absent, with checksums; nothing is pickled: safetensors, JSON and text."""

import contextlib
import errno
import hashlib
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
        make_folder(path.parent)
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


_HELD: set[Path] = set()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within, a folder that somebody takes away is not made anew: it would hold half of a run, and look like one."""
    _HELD.add(folder)
    try:
        yield
    finally:
        _HELD.discard(folder)


def make_folder(path: Path) -> None:
    """Create a folder, and those above it, where they are missing; what is new is durable. Not one that is `held`."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    if gone := _HELD.intersection(missing):
        raise ZsktError(f"{gone.pop()} is gone; put it back and resume, or start again")
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)  # another process may make it at the same time
        _sync(folder.parent)


def _sync(path: Path) -> None:
    """Make a file, or a rename in a folder, durable where the file system can."""
    if os.name == "nt" and path.is_dir():  # which Windows does not open
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        tolerated = [errno.EINVAL, errno.ENOTSUP, errno.EACCES]  # no fsync of folders, or not readable
        if os.name == "nt":
            tolerated.append(errno.EBADF)  # Windows syncs only what is open for writing
        if error.errno not in tolerated:
            raise


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A path for a new file or folder, moved to `path` only if the work succeeds; raises ZsktError if `path` exists."""
    if os.path.lexists(path):
        raise ZsktError(f"{path} already exists; choose another --out or remove it")
    with system_errors("write", path):
        make_folder(path.parent)
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


def remove(path: Path) -> None:
    """Delete a file or a folder with all that it holds, if it is there."""
    with system_errors("remove", path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink(missing_ok=True)


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


CHECKSUM = "zskt.sha256"
"""Entry of a JSON object, or of a safetensors file's metadata: the SHA-256 of all the rest."""


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with a checksum of its entries, which `read_sealed` verifies; first, so that its line can go."""
    return {CHECKSUM: _entries_digest(document)} | {name: value for name, value in document.items() if name != CHECKSUM}


def read_sealed(path: Path) -> Any:
    """Read a JSON document; raises ZsktError if it has a checksum and its entries are not those that were written."""
    document = read_json(path)
    if isinstance(document, dict) and CHECKSUM in document and document[CHECKSUM] != _entries_digest(document):
        raise ZsktError(
            f'{path} is not as it was written; restore it or, if the change is meant, delete its line "{CHECKSUM}"'
        )
    return document


def _entries_digest(document: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps({name: value for name, value in document.items() if name != CHECKSUM}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def digest(path: Path, size: int | None = None) -> str:
    """SHA-256 of a file, or of its first `size` bytes."""
    with system_errors("read", path), regular(path).open("rb") as file:
        if size is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(file.read(size)).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of any device and memory format as one safetensors file, in C order, with a checksum."""
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    metadata = dict(metadata or {})
    metadata[CHECKSUM] = _tensors_digest(plain, metadata)
    with replacing(path) as file:
        file.write(safetensors.torch.save(plain, metadata))


def _tensors_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of all that a reader sees: names, dtypes, shapes and bytes of tensors on the CPU, and metadata."""
    entries = {name: text for name, text in metadata.items() if name != CHECKSUM}
    described = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in tensors.items()}
    found = hashlib.sha256(json.dumps([entries, described], sort_keys=True).encode())
    for name in sorted(tensors):
        found.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with system_errors("read", path), safetensors.safe_open(regular(path), framework="pt") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ZsktError(f"{path} is not a complete safetensors file ({error}); save or fetch it again") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata.

    Raises ZsktError if the file has a checksum of ours and is not as it was written.
    """
    with _open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    recorded = metadata.get(CHECKSUM)
    if recorded is not None and recorded != _tensors_digest(tensors, metadata):
        raise ZsktError(f"{path} is damaged: it does not match its checksum; restore it from a copy")
    return tensors, {name: text for name, text in metadata.items() if name != CHECKSUM}


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a safetensors file, from its header alone."""
    with _open_safetensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def fresh_folder(parent: Path, name: str) -> Path:
    """`parent`/`name`-N with the lowest number that is free."""
    return next(path for n in itertools.count(1) if not (path := parent / f"{name}-{n}").exists())

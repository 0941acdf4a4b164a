"""Files that are either whole or absent, and the errors a user sees.

Nothing in this package writes a pickle: tensors go to safetensors, everything else to JSON, JSON lines or TOML.
"""

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

from zskt.errors import ZsktError, cannot


def expanded(path: str | Path) -> Path:
    """A path with `~` in its place; one that begins with the name of no user stays as it is."""
    return Path(os.path.expanduser(path))


TEMPORARY = ".*.tmp"
"""Names of files that are not whole yet."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` only once it is complete: temporary file, fsync, rename.

    On any error the temporary file is removed and what stood at `path` before is untouched.
    """
    temporary = None
    if path.exists() and not path.is_file():
        raise ZsktError(f"cannot write {path}: a folder or a device is there; choose another place with --out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.umask(mask := os.umask(0))  # there is no other way to read it
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
        temporary = None
        _sync(path.parent)
    except OSError as error:
        raise cannot("write", path, error) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _sync(path: Path) -> None:
    """Make a file or a rename in a folder durable; file systems that cannot sync a folder are left as they are."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A place for a new file or folder that becomes `path` only once the work on it has succeeded.

    The place lies in a temporary folder beside `path`; all of it is removed at the end. Raises ZsktError where
    something stands at `path` already.
    """
    if os.path.lexists(path):
        raise ZsktError(f"{path} is there already; choose another --out or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise cannot("write", path, error) from error
    try:
        yield Path(scratch) / path.name
        for file in (Path(scratch) / path.name, *(Path(scratch) / path.name).rglob("*")):
            _sync(file)
        os.rename(Path(scratch) / path.name, path)
        _sync(path.parent)
    except OSError as error:
        raise cannot("write", path, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, or nothing."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write one JSON document; NaN and infinities are refused so that the file stays valid JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_text(path: Path) -> str:
    """A whole text file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise cannot("read", path, error) from error
    except UnicodeDecodeError as error:
        raise ZsktError(f"{path} is not UTF-8 text; write it anew or fetch it again") from error


def read_json(path: Path) -> Any:
    """Read one JSON document."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ZsktError(f"{path} is not valid JSON ({error}); write it anew or fetch it again") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of any device and memory format as one safetensors file, values in C order."""
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    with replacing(path) as file:
        file.write(safetensors.torch.save(plain, dict(metadata or {})))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its string metadata."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except OSError as error:
        raise cannot("read", path, error) from error
    except safetensors.SafetensorError as error:
        raise ZsktError(f"{path} is not a whole safetensors file ({error}); fetch or write it again") from error


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a safetensors file, read off its header."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise cannot("read", path, error) from error
    except safetensors.SafetensorError as error:
        raise ZsktError(f"{path} is not a whole safetensors file ({error}); fetch or write it again") from error


def fresh_folder(parent: Path, name: str) -> Path:
    """`parent`/`name`-N with the first number that is not taken."""
    return next(path for n in itertools.count(1) if not (path := parent / f"{name}-{n}").exists())

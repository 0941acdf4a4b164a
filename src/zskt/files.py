"""Files that are either whole or absent, and the errors a user sees.

Nothing in this package writes a pickle: tensors go to safetensors, everything else to JSON, JSON lines or TOML.
"""

import contextlib
import difflib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor


class ZsktError(Exception):
    """The work cannot go on: one line saying what was expected, what was found and what to do. Exit status 1."""


class UsageError(ZsktError):
    """The request itself is wrong: an unknown name, a mistyped or contradictory value. Exit status 2."""


def unknown(what: str, name: str, valid: Iterable[str]) -> UsageError:
    """An error for a name that is not among `valid`, with the nearest ones first."""
    valid, name = list(valid), short(name)
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(near)}? " if near else ""
    return UsageError(f"unknown {what} {name!r}: {advice}valid are {', '.join(valid)}")


def printable(text: object) -> str:
    """A text as one line that no terminal obeys, whatever names of files, classes and tensors it quotes."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))


def short(text: object, most: int = 80) -> str:
    """A text of somebody else's, to be quoted inside a line of ours."""
    line = printable(text)
    return line if len(line) <= most else f"{line[:most]}..."


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, on one line and short enough to stand inside a line of ours."""
    lines = str(error).strip().splitlines()
    return printable(lines[0][:150]) if lines else type(error).__name__


def to_stderr(line: str) -> None:
    """One line for the user."""
    print(printable(line), file=sys.stderr, flush=True)


def expanded(path: str | Path) -> Path:
    """A path with `~` in its place; one that begins with the name of no user stays as it is."""
    return Path(os.path.expanduser(path))


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
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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


def cannot(verb: str, path: Path, error: OSError) -> ZsktError:
    """The one-line form of an operating system error."""
    reason = error.strerror or str(error)
    remedy = {
        28: "free some space or choose another place with --out",  # ENOSPC
        13: "check the permissions or choose another place with --out",  # EACCES
        30: "choose a writable place with --out",  # EROFS
        2: "check the path",  # ENOENT
        17: "part of the path is a file; choose another place with --out",  # EEXIST
        20: "part of the path is a file; choose another place with --out",  # ENOTDIR
    }.get(error.errno or 0, "check the path and try again")
    return ZsktError(f"cannot {verb} {path}: {reason}; {remedy}")


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

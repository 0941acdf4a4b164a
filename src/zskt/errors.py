"""The errors a user sees: one line saying what was expected, what was found and what to do."""

import contextlib
import difflib
import errno
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path


class ZsktError(Exception):
    """The work cannot continue. Exit status 1."""


class UsageError(ZsktError):
    """The request itself is wrong: an unknown name, an invalid or contradictory value. Exit status 2."""


def unknown(what: str, name: str, valid: Iterable[str]) -> UsageError:
    """An error for a name that is not among `valid`; close matches come first."""
    valid, name = list(valid), short(name)
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(near)}? " if near else ""
    return UsageError(f"unknown {what} {name!r}: {advice}valid are {', '.join(valid)}")


def printable(text: object) -> str:
    """Text as one line without control characters: names of files, classes and tensors may contain any."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))


def short(text: object, most: int = 80) -> str:
    """Foreign text, cut to a length that can be quoted in an error message."""
    line = printable(text)
    return line if len(line) <= most else f"{line[:most]}..."


def first_line(error: BaseException) -> str:
    """The first line of a foreign exception's message, or its type, short enough to quote."""
    lines = str(error).strip().splitlines()
    return printable(lines[0][:150]) if lines else type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether a foreign exception says that there was not enough memory, on the host or a device."""
    return bool(re.search("OutOfMemory|out of memory|can't allocate|MemoryError|overflowed", f"{type(error)} {error}"))


def cannot(verb: str, path: Path, error: OSError) -> ZsktError:
    """An operating system error as one line: the system's own words and a remedy."""
    obstructed = "part of the path is a file; choose another place with --out"
    remedy = {
        errno.ENOSPC: "free some space or choose another place with --out",
        errno.EACCES: "check the permissions or choose another place with --out",
        errno.EROFS: "choose a writable place with --out",
        errno.ENOENT: "check the path",
        errno.EEXIST: obstructed,
        errno.ENOTDIR: obstructed,
    }.get(error.errno or 0, "check the path and try again")
    return ZsktError(f"cannot {verb} {path}: {error.strerror or error}; {remedy}")


@contextlib.contextmanager
def system_errors(verb: str, path: Path) -> Iterator[None]:
    """The boundary at which operating system errors inside become `cannot`."""
    try:
        yield
    except OSError as error:
        raise cannot(verb, path, error) from error


@contextlib.contextmanager
def failing(
    what: str, advice: str, *, named: bool = False, kinds: tuple[type[BaseException], ...] = (Exception, SystemExit)
) -> Iterator[None]:
    """Whatever fails inside becomes "`what` (its first line, after its type if `named`); `advice`"; ours passes."""
    try:
        yield
    except ZsktError:
        raise
    except kinds as error:
        reason = f"{type(error).__name__}: {first_line(error)}" if named else first_line(error)
        raise ZsktError(f"{what} ({reason}); {advice}") from error


def to_stderr(line: str) -> None:
    """One line for the user."""
    print(printable(line), file=sys.stderr, flush=True)

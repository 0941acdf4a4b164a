"""The errors a user sees: one line saying what was expected, what was found and what to do."""

import difflib
import sys
from collections.abc import Iterable
from pathlib import Path


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


def to_stderr(line: str) -> None:
    """One line for the user."""
    print(printable(line), file=sys.stderr, flush=True)

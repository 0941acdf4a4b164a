"""The command of a run, kept in its folder, so that `zskt distill --resume --out DIR` is enough to go on."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zskt.cli.teachers import Foreign
from zskt.errors import UsageError, failing
from zskt.files import CHECKSUM, expanded, read_sealed, sealed, write_json
from zskt.networks.factories import is_factory
from zskt.run.lifecycle import Event

FILE = "command.json"
OPTIONS = {field.name: field.default for field in dataclasses.fields(Foreign) if field.name != "trust"}


def remember(out: Path, words: Mapping[str, Any], foreign: Foreign) -> Callable[[Event], None]:
    """A callback that writes what was given to the command, without --trust, to the folder of the run."""
    found = dict(words) | {name: getattr(foreign, name) for name in OPTIONS}
    given = {name: value for name, value in found.items() if value not in (None, (), "")}
    document = {name: value if name == "teacher_key" else _plain(value) for name, value in given.items()}
    path = expanded(out) / FILE

    def callback(event: Event) -> None:
        if event.step == 1 or not path.exists():  # one that is there at the first step is an earlier beginning's
            write_json(path, sealed(document))

    return callback


def _plain(value: Any) -> Any:
    """A value as JSON has it, paths from the root: the next command may be given elsewhere."""
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    if isinstance(value, str | Path):
        place = expanded(Path(value))
        return str(place.resolve()) if place.exists() else str(value)
    return value


def recall(out: Path, trust: bool) -> tuple[dict[str, Any], Foreign]:
    """What was given to the command of the run in `out`. Raises UsageError if it would run code that nobody named now.

    A folder may come from a stranger, and naming a factory is consent to run it; here only --trust is.
    """
    path = expanded(out) / FILE
    if not path.exists():
        raise UsageError(f"expected a teacher and --student, found neither, nor {path}; give the whole command")
    words = read_sealed(path)
    with failing(f"{path} is damaged", "give the whole command", kinds=(TypeError, ValueError, AttributeError)):
        words.pop(CHECKSUM, None)
        options = {name: words.pop(name) for name in OPTIONS if name in words}
        if wrong := {"teacher", "student"} - set(words) or set(words) - _WORDS:
            raise ValueError(f"entry {min(wrong)}")
        for name, value in (words | options).items():
            several = isinstance(value, list)
            if several is not (name in _SEVERAL) or not all(
                isinstance(each, str | int | float) for each in (value if several else [value])
            ):
                raise ValueError(f"entry {name}")
        for name in _SEVERAL & set(words | options):
            (words if name in words else options)[name] = tuple((words | options)[name])
        for name in _PATHS & set(options):
            options[name] = Path(options[name])
    code = [words[name] for name in ("teacher", "student", "method") if is_factory(str(words.get(name, "")))]
    if code and not trust:
        raise UsageError(f"{path} names {code[0]}, whose code would run; give --trust, or the whole command")
    return words, Foreign(**options, trust=trust)


_WORDS = {"teacher", "student", "student_args", "method", "evaluate", "images", "log"}
_SEVERAL = {"student_args", "evaluate", "teacher_args", "input_size", "mean", "std"}
_PATHS = {"teacher_weights"}

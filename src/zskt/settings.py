"""Settings as frozen dataclasses, from TOML and `key=value`, changed by dotted name; errors name what is accepted."""

import contextlib
import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import tomli_w

from zskt.errors import UsageError, short, unknown
from zskt.runtime import LARGEST

T = TypeVar("T")


def check_bounds(name: str, value: Any) -> None:
    """Raise UsageError for a whole number beyond LARGEST, or one that float32 arithmetic makes 0 or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} = {value!r}: expected a finite number")
    if isinstance(value, float) and value and not 1e-30 <= abs(value) <= 1e30:
        raise UsageError(f"{name} = {value!r}: expected 0 or a number from 1e-30 to 1e30")
    if type(value) is int and abs(value) > LARGEST:
        raise UsageError(f"{name} = {short(value)}: expected at most {LARGEST:,}")


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """All values by dotted name, in order of definition."""
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            values |= flat(value, f"{prefix}{entry.name}.")
        else:
            values[prefix + entry.name] = value
    return values


def replace(settings: T, changes: Mapping[str, Any]) -> T:
    """A copy with values changed by dotted name; raises UsageError for unknown names and wrong types."""
    tree = dataclasses.asdict(typing.cast(Any, settings))
    valid = flat(settings)
    for name, value in changes.items():
        if name not in valid:
            raise unknown_setting(type(settings), name, valid)
        *sections, last = name.split(".")
        branch = tree
        for section in sections:
            branch = branch[section]
        branch[last] = value
    return build(type(settings), tree)


def unknown_setting(kind: type, name: str, valid: Iterable[str]) -> UsageError:
    """The error for a name that `kind` does not have, or no longer has (`kind.RENAMED`)."""
    if new := getattr(kind, "RENAMED", {}).get(name):
        return UsageError(f"setting {name} is now {new}")
    return unknown("setting", name, valid)


def from_text(assignment: str, option: str = "--set") -> tuple[str, Any]:
    """`key=value` from the command line, the value as TOML or a bare word; `option` is quoted in errors."""
    name, equals, text = assignment.partition("=")
    if not equals:
        raise UsageError(
            f"{option} {short(assignment)!r}: expected key=value, as in {option} student.learning_rate=1e-3"
        )
    try:
        return name.strip(), tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        with contextlib.suppress(ValueError):
            return name.strip(), float(text)  # .5 is not a number in TOML
        return name.strip(), text.strip()
    except (RecursionError, ValueError) as error:  # a number of thousands of digits
        raise UsageError(f"{option} {short(assignment)!r}: expected a shorter or less nested value") from error


def from_toml(kind: type[T], text: str, where: str) -> T:
    """A `kind` from TOML that holds differences from its defaults; `where` is its name in errors."""
    try:
        return build(kind, tomllib.loads(text))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not valid TOML: {error}") from error
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def changes_of(text: str, where: str) -> dict[str, Any]:
    """The values in TOML text by dotted name; `where` is its name in errors."""
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not valid TOML: {error}") from error

    def leaves(branch: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in branch.items():
            found |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return found

    return leaves(tree, "")


def without(text: str, gone: Mapping[str, Any], where: str) -> str:
    """TOML without the values of dotted names that are those in `gone`; as it is, if there are none."""
    found, tree = changes_of(text, where), None
    for name in (name for name, value in gone.items() if found.get(name) == value):
        *sections, last = name.split(".")
        tree = tomllib.loads(text) if tree is None else tree
        section = tree
        for each in sections:
            section = section[each]
        del section[last]
    return text if tree is None else tomli_w.dumps(tree)


def to_toml(settings: Any) -> str:
    """All settings as TOML, defaults included."""
    return tomli_w.dumps(dataclasses.asdict(settings))


def build(kind: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """An instance of the dataclass `kind` from nested mappings, strictly."""
    hints = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        full = prefix + name
        if name not in hints:
            raise unknown_setting(kind, full, [prefix + hint for hint in hints])
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise UsageError(
                    f"{full} = {short(repr(value))}: expected a section; set a value in it, as in {full}.name=..."
                )
            arguments[name] = build(typing.cast(type[Any], hints[name]), value, f"{full}.")
        else:
            arguments[name] = _typed(full, value, hints[name])
    return kind(**arguments)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as type `hint`, strictly; whole numbers are accepted as floats, lists as tuples."""
    choices: list[str] = []
    origin = typing.get_origin(hint)
    for option in typing.get_args(hint) if origin in (types.UnionType, typing.Union) else (hint,):
        if typing.get_origin(option) is Literal:
            choices += typing.get_args(option)
            if value in choices:
                return value
        elif typing.get_origin(option) is tuple:
            if str in typing.get_args(option):
                choices.append("a list of words")
                if isinstance(value, str):
                    return tuple(word.strip() for word in value.split(",") if word.strip())
                if isinstance(value, (list, tuple)) and all(type(item) is str for item in value):
                    return tuple(value)
                continue
            choices.append("a list of numbers")
            if isinstance(value, (list, tuple)) and all(type(item) in (int, float) for item in value):
                return tuple(float(item) for item in value)
        else:
            choices.append({int: "a whole number", float: "a number", bool: "true or false", str: "a word"}[option])
            if type(value) is option or (option is float and type(value) is int):
                return option(value)
    raise UsageError(f"{name} = {short(repr(value))}: expected {' or '.join(choices)}")

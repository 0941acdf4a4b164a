"""Networks made by a function of the user's own: `package.module:factory` or `file.py:factory`, with arguments.

Importing and calling it runs the user's code. Nothing else in this package does, and nothing here runs unasked.
"""

import contextlib
import importlib
import importlib.util
import inspect
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from zskt.errors import UsageError, ZsktError, first_line, short, unknown
from zskt.settings import from_text

_ORIGIN = "_zskt_factory"
"""Attribute of a network that remembers which factory made it."""


def parse_arguments(assignments: Sequence[str], option: str) -> dict[str, Any]:
    """`key=value` strings -> arguments of a factory, values in TOML or bare words; `option` names them in errors."""
    arguments: dict[str, Any] = {}
    for assignment in assignments:
        if "=" not in assignment:
            raise UsageError(f"{option} {short(assignment)!r}: expected key=value, as in {option} depth=20")
        name, value = from_text(assignment, option)
        if not name.isidentifier() or name in arguments:
            raise UsageError(f"{option} {short(assignment)!r}: expected the name of an argument, once, before the =")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"{option} {short(assignment)!r}: expected what JSON can hold, as it is kept beside the student, found "
                f"{short(repr(value))}; give it as a word in quotes, or another value"
            ) from error
        arguments[name] = value
    return arguments


def is_factory(spec: str) -> bool:
    """Whether a spelling names a factory: something, a colon, and the name of a function or class."""
    place, colon, name = spec.rpartition(":")
    return bool(place and colon) and all(part.isidentifier() for part in name.split("."))


def find_function(spec: str) -> Callable[..., Any]:
    """The function or class at `package.module:name` or `file.py:name`; finding it runs that code.

    A module is looked for as Python does, and in the current folder; a file's own folder is importable from it. Raises
    UsageError for a wrong specifier, ZsktError where the code fails.
    """
    place, _, name = spec.rpartition(":")
    if not is_factory(spec):
        raise UsageError(f"{spec!r}: expected package.module:function or file.py:function")
    path = _file_of(spec)
    if path is not None and not path.is_file():
        raise ZsktError(f"expected a Python file at {path}, found none; check the path before the colon")
    with _importable(spec):
        try:
            found: Any = _load_file(path) if path is not None else importlib.import_module(place)
            for part in name.split("."):
                if not hasattr(found, part):
                    raise unknown(f"function in {place}", part, _callables(found))
                found = getattr(found, part)
        except UsageError:
            raise
        except (Exception, SystemExit) as error:  # the user's code may fail in any way
            raise ZsktError(
                f"cannot import {place} for {spec} ({type(error).__name__}: {first_line(error)}); check the spelling, "
                "the current folder and the file itself"
            ) from error
    if not callable(found):
        raise ZsktError(f"expected a function or class at {spec}, found {type(found).__name__}; name another")
    function: Callable[..., Any] = found
    return function


def call_factory(spec: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The network that `package.module:factory` or `file.py:factory` returns for these keyword arguments.

    Raises what `find_function` raises, and ZsktError where the factory fails or returns something else.
    """
    factory = find_function(spec)
    with _importable(spec):
        try:
            network = factory(**(arguments or {}))
        except (Exception, SystemExit) as error:
            with contextlib.suppress(TypeError, ValueError):  # some callables have no signature
                inspect.signature(factory).bind(**(arguments or {}))
                raise ZsktError(f"{spec} failed with {type(error).__name__}: {first_line(error)}; mend it") from error
            raise ZsktError(
                f"{spec} does not take these arguments ({first_line(error)}); it takes {_signature(factory)}"
            ) from error
    if not isinstance(network, nn.Module):
        raise ZsktError(f"expected {spec} to return a torch.nn.Module, found {type(network).__name__}; mend it")
    path = _file_of(spec)
    absolute = spec if path is None else f"{path.resolve()}:{spec.rpartition(':')[2]}"
    vars(network)[_ORIGIN] = {"factory": absolute, "arguments": dict(arguments or {})}  # its __setattr__ may refuse
    return network


def factory_of(module: nn.Module) -> dict[str, Any] | None:
    """The factory and arguments that made this network or the one it is a copy of, if `call_factory` did."""
    made: dict[str, Any] | None = getattr(module, _ORIGIN, None)
    return made


def _file_of(spec: str) -> Path | None:
    place = spec.rpartition(":")[0]
    return Path(place) if place.endswith(".py") else None


@contextlib.contextmanager
def _importable(spec: str) -> Iterator[None]:
    """What lies beside a specifier's file, or here, can be imported for a while, after everything that is installed."""
    path = _file_of(spec)
    folder = str(path.resolve().parent if path is not None else Path.cwd())
    sys.path.append(folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the code may have removed it
            sys.path.remove(folder)


def _load_file(path: Path) -> types.ModuleType:
    """A Python file as a module named after it, known to pickling and to `inspect` as any other."""
    name = f"zskt_factory_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path.resolve())
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _callables(holder: Any) -> list[str]:
    return [name for name, value in vars(holder).items() if callable(value) and not name.startswith("_")]


def _signature(factory: Any) -> str:
    try:
        return str(inspect.signature(factory))
    except (TypeError, ValueError):
        return "other ones"

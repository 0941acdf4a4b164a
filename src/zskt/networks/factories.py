"""Networks from a function of the user's, `package.module:factory` or `file.py:factory`: on request, as code runs."""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from zskt.errors import UsageError, ZsktError, failing, first_line, short, unknown
from zskt.settings import from_text

_ORIGIN = "_zskt_factory"  # attribute of a network that records its factory


def parse_arguments(assignments: Sequence[str], option: str) -> dict[str, Any]:
    """`key=value` strings -> arguments of a factory, with TOML values or bare words; `option` names them in errors."""
    arguments: dict[str, Any] = {}
    for assignment in assignments:
        if "=" not in assignment:
            raise UsageError(f"{option} {short(assignment)!r}: expected key=value, as in {option} depth=20")
        name, value = from_text(assignment, option)
        if not name.isidentifier() or name in arguments:
            raise UsageError(f"{option} {short(assignment)!r}: expected an argument's name before =, each once")
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"{option} {short(assignment)!r}: expected a value that student.json can hold, found "
                f"{short(repr(value))}; quote it or give another value"
            ) from error
        arguments[name] = value
    return arguments


def is_factory(spec: str) -> bool:
    """Whether a specifier names a factory: a place, a colon, and the name of a function or class."""
    place, colon, name = spec.rpartition(":")
    return bool(place and colon) and all(part.isidentifier() for part in name.split("."))


def find_function(spec: str) -> Callable[..., Any]:
    """The function or class at `package.module:name` or `file.py:name`; finding it runs that code.

    Modules are also found in the current folder; a file can import from its own. Raises UsageError for an invalid
    specifier, ZsktError if the code fails.
    """
    place, _, name = spec.rpartition(":")
    if not is_factory(spec):
        raise UsageError(f"{spec!r}: expected package.module:function or file.py:function")
    path = _file_of(spec)
    if path is not None and not path.is_file():
        raise ZsktError(f"expected a Python file at {path}, found none; check the path before the colon")
    advice = "check its name, the current folder and the code"
    with _importable(spec), failing(f"cannot import {place} for {spec}", advice, named=True):
        found: Any = _load_file(path) if path is not None else importlib.import_module(place)
        for part in name.split("."):
            if not hasattr(found, part):
                names = [name for name, value in vars(found).items() if callable(value) and name[0] != "_"]
                raise unknown(f"function in {place}", part, names)
            found = getattr(found, part)
    if not callable(found):
        raise ZsktError(f"expected a function or class at {spec}, found {type(found).__name__}; give another name")
    function: Callable[..., Any] = found
    return function


def call_factory(spec: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """The network that a factory returns for these arguments; raises ZsktError if it fails or returns another thing."""
    factory = find_function(spec)
    with _importable(spec):
        try:
            network = factory(**(arguments or {}))
        except (Exception, SystemExit) as error:
            takes = "others"
            with contextlib.suppress(TypeError, ValueError):  # some callables have no signature
                takes = str(inspect.signature(factory))
                inspect.signature(factory).bind(**(arguments or {}))
                raise ZsktError(f"{spec} failed with {type(error).__name__}: {first_line(error)}; fix it") from error
            raise ZsktError(f"{spec} does not take these arguments ({first_line(error)}); it takes {takes}") from error
    if not isinstance(network, nn.Module):
        raise ZsktError(f"expected {spec} to return a torch.nn.Module, found {type(network).__name__}; fix it")
    path = _file_of(spec)
    absolute = spec if path is None else f"{path.resolve()}:{spec.rpartition(':')[2]}"
    vars(network)[_ORIGIN] = {"factory": absolute, "arguments": dict(arguments or {})}  # as __setattr__ may refuse
    return network


def factory_of(module: nn.Module) -> dict[str, Any] | None:
    """The factory and arguments of a network, or of the one it was copied from, if `call_factory` made it."""
    made: dict[str, Any] | None = getattr(module, _ORIGIN, None)
    return made


def _file_of(spec: str) -> Path | None:
    place = spec.rpartition(":")[0]
    return Path(place) if place.endswith(".py") else None


@contextlib.contextmanager
def _importable(spec: str) -> Iterator[None]:
    """Make modules next to a specifier's file, or here, importable inside; installed modules come first."""
    path = _file_of(spec)
    folder = str(path.resolve().parent if path is not None else Path.cwd())
    sys.path.append(folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the code may have removed it
            sys.path.remove(folder)


def _load_file(path: Path) -> types.ModuleType:
    """A Python file as a module; it is in `sys.modules` so that pickle and `inspect` find it."""
    name = f"zskt_factory_{path.stem}"
    loader = importlib.machinery.SourceFileLoader(name, str(path.resolve()))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

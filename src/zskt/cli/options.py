"""Command-line options from the dataclasses that hold settings: one per value, None unless given."""

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from zskt.networks.models import Size
from zskt.settings import flat

Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="")]
File = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
Time = Annotated[str | None, tyro.conf.arg(metavar="TIME", help_behavior_hint="")]
Number = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
Real = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
Reals = Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT...", help_behavior_hint="")]
Words = Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT...", help_behavior_hint="")]
Assignments = Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE...", help_behavior_hint="")]
ImageSize = Annotated[Size | None, tyro.conf.arg(metavar="C H W", help_behavior_hint="")]
"""Optional arguments whose default is not shown."""


@functools.cache
def documentation(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, on one line."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(tree, ast.ClassDef)
    names = {field.name for field in dataclasses.fields(kind)}
    texts: dict[str, str] = {}
    for before, node in itertools.pairwise(tree.body):
        name = before.target.id if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name) else ""
        if name in names and isinstance(node, ast.Expr):
            texts[name] = " ".join(str(ast.literal_eval(node.value)).split())
    return texts


def options(
    kind: type,
    note: str,
    *,
    leave_out: Collection[str] = (),
    shortcuts: Mapping[str, str] | None = None,
    notes: Mapping[str, str] | None = None,
    prefix: str = "",
) -> Any:
    """A dataclass like `kind` for tyro, in which every field defaults to None.

    The help shows `note` in place of a default, or `notes` by dotted name. `leave_out` lists dotted names that get no
    option; `shortcuts` maps top-level options to dotted names.
    """
    hints, texts = typing.get_type_hints(kind), documentation(kind)
    fields: list[Any] = []
    for short, name in (shortcuts or {}).items():
        section, _, last = name.partition(".")
        inner = typing.get_type_hints(kind)[section]
        fields.append(_field(short, typing.get_type_hints(inner)[last], documentation(inner)[last], note))
    sections = []
    for field in dataclasses.fields(kind):
        full, hint = prefix + field.name, hints[field.name]
        if full in leave_out:
            continue
        if dataclasses.is_dataclass(hint):
            left_out = {*leave_out, *(shortcuts or {}).values()}
            inner = options(typing.cast(type, hint), note, leave_out=left_out, notes=notes, prefix=f"{full}.")
            sections.append((field.name, inner, dataclasses.field(default_factory=inner)))
        else:
            fields.append(_field(field.name, hint, texts[field.name], (notes or {}).get(full, note)))
    return dataclasses.make_dataclass(f"{kind.__name__}Options", [*fields, *sections], frozen=True)


def typed(given: Any, shortcuts: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The values that were given, by dotted name."""
    return {(shortcuts or {}).get(name, name): value for name, value in flat(given).items() if value is not None}


def _field(name: str, hint: Any, text: str, note: str) -> tuple[str, Any, Any]:
    argument = tyro.conf.arg(metavar=_metavar(hint), help=text, help_behavior_hint=f"({note})")
    return name, Annotated[hint | None, argument], dataclasses.field(default=None)


def _metavar(hint: Any) -> str:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return "|".join(_metavar(each) for each in typing.get_args(hint) if each is not type(None))
    if typing.get_origin(hint) is Literal:
        words = typing.get_args(hint)
        return str(words[0]) if len(words) == 1 else "{" + ",".join(map(str, words)) + "}"
    if typing.get_origin(hint) is tuple:
        return _metavar(typing.get_args(hint)[0]) + "..."
    return {bool: "{True,False}", str: "TEXT"}.get(hint, str(hint.__name__).upper())

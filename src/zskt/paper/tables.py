"""A table or a figure as cells: each a number from a part for every seed, beside what was published."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zskt.files import replacing, write_json, write_text
from zskt.paper.jobs import Part, in_order

Read = Callable[[Path, Part], float | None]
"""(folder of all parts, part) -> a number of it, or None while the part is not finished"""


@dataclass(frozen=True)
class Cell:
    """One number of a table: a part for each seed and what is read of it."""

    row: str
    column: str
    parts: tuple[Part, ...]
    read: Read
    paper: str | None = None
    percent: bool = True

    def values(self, root: Path) -> list[float]:
        """What was measured so far, one number per finished seed."""
        return [value for part in self.parts if (value := self.read(root, part)) is not None]

    def facts(self, root: Path) -> dict[str, Any]:
        """For JSON: values, mean, sample standard deviation, the published number."""
        values = self.values(root)
        return {
            "row": self.row,
            "column": self.column,
            "values": values,
            "mean": statistics.fmean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "paper": self.paper,
        }

    def text(self, root: Path, failed: Mapping[str, str] | None = None) -> str:
        """Mean ± std, or why there is none; `failed` has part -> why it could not be made."""
        values = [100 * value if self.percent else value for value in self.values(root)]
        if not values:
            return "failed" if any(part.name in (failed or {}) for part in self.parts) else "not run"
        digits = 2 if self.percent else 3
        text = f"{statistics.fmean(values):.{digits}f}"
        if len(values) > 1:
            text += f" ± {statistics.stdev(values):.{digits}f}"
        missing = len(self.parts) - len(values)
        return text + (f" ({len(values)} of {len(self.parts)} seeds)" if missing else "")


def measured(key: str) -> Read:
    """Reads one measure of a finished part."""

    def read(root: Path, part: Part) -> float | None:
        return (part.measured(root) or {}).get(key)

    return read


@dataclass(frozen=True)
class Reproduction:
    """A table or a figure: its cells and, where there is something to draw, its PNG."""

    name: str
    title: str
    cells: tuple[Cell, ...]
    draw: Callable[[Path, str], bytes | None] = lambda root, note: None
    """(folder, what to stamp on it) -> the PNG, or None while nothing of it is there"""

    @property
    def parts(self) -> list[Part]:
        """All that it is made of."""
        return [part for cell in self.cells for part in cell.parts]


def write_result(
    made: Reproduction,
    root: Path,
    *,
    scale: float = 1.0,
    failed: Mapping[str, str] | None = None,
    circumstances: Mapping[str, Any],
) -> dict[str, Any]:
    """Write NAME.json, NAME.md and, where there is something to draw, NAME.png; returns what the JSON holds.

    `failed` has part -> why it could not be made; `circumstances` what the result depends on, `seeds` among it.
    """
    stamp = "" if scale == 1 else f" (scale {scale:g})"
    budgets = {part.name: {"units": part.units, "unit": part.unit} for part in in_order(made.parts)}
    result = {
        "name": made.name,
        "title": made.title + stamp,
        "finished": all(len(cell.values(root)) == len(cell.parts) for cell in made.cells),
        **({} if scale == 1 else {"scale": scale}),
        "cells": [cell.facts(root) for cell in made.cells],
        **({"failed": dict(failed)} if failed else {}),
        **circumstances,
    }
    write_json(root / f"{made.name}.json", result | {"parts": budgets})
    picture = made.draw(root, stamp)
    if picture is not None:
        with replacing(root / f"{made.name}.png") as file:
            file.write(picture)
    lines = [f"# {made.title}{stamp}", "", *markdown_table(made.cells, root, failed), ""]
    if picture is not None:
        lines += [f"![{made.title}]({made.name}.png)", ""]
    for name, why in (failed or {}).items():
        lines += [f"Failed: {name}: {why}", ""]
    work = sorted({f"{part.units:,} {part.unit} ({part.pace})" for part in in_order(made.parts) if part.units})
    seeds = ", ".join(map(str, circumstances["seeds"]))
    lines += [f"Mean ± sample standard deviation over seeds {seeds}; last iterate, measured on test images.", ""]
    lines += ["Work per part: " + "; ".join(work) + ".", ""]
    versions = ", ".join(f"{name} {version}" for name, version in circumstances["versions"].items())
    lines += [
        f"{circumstances['date']}, `{circumstances['command']}`, commit {circumstances.get('commit', 'unknown')},"
    ]
    threads = "one thread" if circumstances["threads"] == 1 else f"{circumstances['threads']} threads"
    lines += [f"{circumstances['precision']}, {circumstances['hardware']}, {threads}, {versions}."]
    write_text(root / f"{made.name}.md", "\n".join(lines) + "\n")
    return result


def markdown_table(cells: Sequence[Cell], root: Path, failed: Mapping[str, str] | None = None) -> list[str]:
    """The lines of a table: ours, and the paper's beside it in every column that it has numbers for."""
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*((c.row, c.column) for c in cells), strict=True))
    at = {(cell.row, cell.column): cell for cell in cells}
    published = {column for column in columns if any(c.paper for c in cells if c.column == column)}
    head = [""]
    for column in columns:
        head += [column, "paper"] if column in published else [column]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        texts = [row]
        for column in columns:
            cell = at.get((row, column))
            texts.append("" if cell is None else cell.text(root, failed))
            if column in published:
                texts.append("" if cell is None else cell.paper or "")
        lines.append("| " + " | ".join(texts) + " |")
    return lines

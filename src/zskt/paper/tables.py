"""A table or figure as cells: one number per seed, each measured by a job, beside the published number."""

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zskt.files import replacing, write_json, write_text
from zskt.paper.jobs import Job, in_order

Read = Callable[[Path, Job], float | None]
"""(folder of all jobs, job) -> one of its numbers, or None until it has finished"""


@dataclass(frozen=True)
class Cell:
    """One number of a table: one job per seed, and which of its measurements to read."""

    row: str
    column: str
    jobs: tuple[Job, ...]
    read: Read
    paper: str | None = None
    percent: bool = True

    def values(self, root: Path) -> list[float]:
        """One number per finished seed."""
        return [value for job in self.jobs if (value := self.read(root, job)) is not None]

    def to_json(self, root: Path) -> dict[str, Any]:
        """Values, mean, sample standard deviation and the published number."""
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
        """Mean ± std, or why there is none; `failed` maps jobs to the reason of their failure."""
        values = [100 * value if self.percent else value for value in self.values(root)]
        if not values:
            return "failed" if any(job.name in (failed or {}) for job in self.jobs) else "not run"
        digits = 2 if self.percent else 3
        text = f"{statistics.fmean(values):.{digits}f}"
        if len(values) > 1:
            text += f" ± {statistics.stdev(values):.{digits}f}"
        missing = len(self.jobs) - len(values)
        return text + (f" ({len(values)} of {len(self.jobs)} seeds)" if missing else "")


def measured(key: str) -> Read:
    """A reader of one measurement of a finished job."""
    return lambda root, job: (job.measured(root) or {}).get(key)


@dataclass(frozen=True)
class Reproduction:
    """A table or figure: its cells and, for a figure, how to draw it."""

    name: str
    title: str
    cells: tuple[Cell, ...]
    draw: Callable[[Path, str], bytes | None] = lambda root, note: None
    """(folder of all jobs, note for the title) -> the PNG, or None if no job it shows has finished"""

    @property
    def jobs(self) -> list[Job]:
        return [job for cell in self.cells for job in cell.jobs]


def write_result(
    made: Reproduction,
    root: Path,
    *,
    scale: float = 1.0,
    failed: Mapping[str, str] | None = None,
    circumstances: Mapping[str, Any],
) -> dict[str, Any]:
    """Write NAME.json, .md, .tex, .csv and, if there is something to draw, NAME.png; returns the content of the JSON.

    `failed` maps jobs to the reason of their failure; `circumstances` (with `seeds`) is what the result depends on.
    """
    stamp = "" if scale == 1 else f" (scale {scale:g})"
    budgets = {job.name: {"units": job.units, "unit": job.unit} for job in in_order(made.jobs)}
    result = {
        "name": made.name,
        "title": made.title + stamp,
        "finished": all(len(cell.values(root)) == len(cell.jobs) for cell in made.cells),
        **({} if scale == 1 else {"scale": scale}),
        "cells": [cell.to_json(root) for cell in made.cells],
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
    work = sorted({f"{job.units:,} {job.unit} ({job.pace})" for job in in_order(made.jobs) if job.units})
    seeds = ", ".join(map(str, circumstances["seeds"]))
    lines += [f"Mean ± sample standard deviation over seeds {seeds}; last iterate, measured on test images.", ""]
    lines += ["Work per job: " + "; ".join(work) + ".", ""]
    lines += provenance(circumstances)
    write_text(root / f"{made.name}.md", "\n".join(lines) + "\n")
    write_text(root / f"{made.name}.tex", latex(*texts_of(made.cells, root, failed), note=made.title + stamp))
    write_text(root / f"{made.name}.csv", comma_separated(made.cells, root))
    return result


def provenance(circumstances: Mapping[str, Any]) -> list[str]:
    """Two lines of Markdown: date, command and commit; precision if given, hardware, threads and versions."""
    threads = "one thread" if circumstances["threads"] == 1 else f"{circumstances['threads']} threads"
    how = [*([circumstances["precision"]] if "precision" in circumstances else []), circumstances["hardware"], threads]
    versions = [f"{name} {version}" for name, version in circumstances["versions"].items()]
    return [
        f"{circumstances['date']}, `{circumstances['command']}`, commit {circumstances.get('commit', 'unknown')},",
        ", ".join(how + versions) + ".",
    ]


def markdown_table(cells: Sequence[Cell], root: Path, failed: Mapping[str, str] | None = None) -> list[str]:
    """The lines of a table: our numbers, with the paper's beside them in every column that it published."""
    return markdown(*texts_of(cells, root, failed))


def texts_of(
    cells: Sequence[Cell], root: Path, failed: Mapping[str, str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """A table's head and rows as texts."""
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*((c.row, c.column) for c in cells), strict=True))
    at = {(cell.row, cell.column): cell for cell in cells}
    published = {column for column in columns if any(c.paper for c in cells if c.column == column)}
    head = [""]
    for column in columns:
        head += [column, "paper"] if column in published else [column]
    lines = []
    for row in rows:
        texts = [row]
        for column in columns:
            cell = at.get((row, column))
            texts.append("" if cell is None else cell.text(root, failed))
            if column in published:
                texts.append("" if cell is None else cell.paper or "")
        lines.append(texts)
    return head, lines


def comma_separated(cells: Sequence[Cell], root: Path) -> str:
    """One line for each seed of each cell, fractions as in the JSON."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["row", "column", "job", "value"])
    for cell in cells:
        found = ((job.name, cell.read(root, job)) for job in cell.jobs)
        lines.writerows([cell.row, cell.column, name, value] for name, value in found if value is not None)
    return out.getvalue()


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]


def latex(head: Sequence[str], rows: Sequence[Sequence[str]], *, note: str = "") -> str:
    """A LaTeX tabular for the package booktabs; `note` becomes a comment above it."""
    lines = [f"% {' '.join(note.split())}"] if note else []
    lines += [r"\begin{tabular}{l" + "r" * (len(head) - 1) + "}", r"\toprule"]
    lines += [" & ".join(map(escaped, head)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(escaped, row)) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def escaped(text: str) -> str:
    """Text as LaTeX shows it unchanged."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {letter: f"\\{letter}" for letter in "&%$#_{}"}
    return "".join(special.get(letter, letter) for letter in text)

"""The tables of a sweep: a row for each setting, mean and standard deviation over its seeds, at the last iterate."""

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zskt.files import write_json, write_text
from zskt.paper.jobs import Job
from zskt.paper.tables import latex, markdown, provenance
from zskt.run.checkpoint import read_finished
from zskt.run.without_data import KINDS, read_inspected

MEASURES = {
    "teacher_accuracy": ("teacher, %", 100, 2),
    "accuracy": ("student, %", 100, 2),
    "agreement": ("agreement, %", 100, 2),
    "kl_teacher_student": ("KL, nats", 1, 3),
    "pseudo": ("disagreements on 100 fresh pseudo images", 1, 1),
    "noise": ("on 100 of noise", 1, 1),
    "seconds": ("seconds", 1, 1),
}
"""Key of a number -> name of its column, factor, digits."""


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed alone."""

    labels: Mapping[str, str]
    """teacher, student, recipe"""
    settings: Mapping[str, Any]
    """of the recipe, as JSON values; also those that all rows share"""
    jobs: tuple[Job, ...]
    """one for each seed"""

    def to_json(self, root: Path, failed: Mapping[str, str]) -> dict[str, Any]:
        """Labels, runs, and for each number that all finished runs have: values, mean, sample standard deviation."""
        found = [numbers for job in self.jobs if (numbers := numbers_of(job, root)) is not None]
        steps = sorted({int(numbers.pop("steps")) for numbers in found})
        measures = {}
        for key in MEASURES:
            if found and all(key in numbers for numbers in found):
                values = [numbers[key] for numbers in found]
                std = statistics.stdev(values) if len(values) > 1 else None
                measures[key] = {"values": values, "mean": statistics.fmean(values), "std": std}
        return {
            **self.labels,
            "settings": dict(self.settings),
            "jobs": [job.name for job in self.jobs],
            "runs": len(found),
            "of": len(self.jobs),
            "failed": sum(job.name in failed for job in self.jobs),
            "steps": steps,  # several, where time decided how many there are
            "measures": measures,
        }


def numbers_of(job: Job, root: Path) -> dict[str, float] | None:
    """The numbers of a finished run at its last iterate: its steps, measures, disagreements without data, seconds."""
    if job.measured(root) is None:
        return None
    folder = job.folder(root)
    facts, inspected = read_finished(folder), (read_inspected(folder) or {}).get("teacher", {})
    differs = {kind: numbers["per_100"] for kind, numbers in inspected.items()}
    known = facts["measured"] | differs | {"seconds": facts["seconds"]}
    return {"steps": facts["steps"]} | {key: known[key] for key in MEASURES if key in known}


def write_sweep(
    rows: Sequence[Row], root: Path, *, failed: Mapping[str, str], circumstances: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Write sweep.json, .csv, .md and .tex in `root`; returns the content of the JSON and the Markdown table.

    `failed` maps jobs to the reason of their failure. A setting that differs between rows has a column.
    """
    found = [row.to_json(root, failed) for row in rows]
    result = {
        "finished": all(row["runs"] == row["of"] for row in found),
        "rows": found,
        **({"failed": dict(failed)} if failed else {}),
        **circumstances,
    }
    write_json(root / "sweep.json", result)
    shown = [{**row.labels, **{name: label(value) for name, value in row.settings.items()}} for row in rows]
    fixed = {name: shown[0][name] for name in rows[0].settings if len({each[name] for each in shown}) == 1}
    labels = [name for name in shown[0] if name not in fixed]
    keys = [key for key in MEASURES if any(key in row["measures"] for row in found)]
    if "accuracy" in keys:
        keys = [key for key in keys if key not in KINDS]  # which matter where nothing else is known
    head = [*labels, "runs", *(MEASURES[key][0] for key in keys)]
    texts = [
        [*(names[name] for name in labels), runs_text(row), *(text(row, key) for key in keys)]
        for names, row in zip(shown, found, strict=True)
    ]
    table = markdown(head, texts)
    seeds = ", ".join(map(str, circumstances["seeds"]))
    measured = "on test images" if "data" in circumstances else "without data: no number here is an accuracy"
    note = f"Mean ± sample standard deviation over seeds {seeds}; last iterate, measured {measured}."
    lines = ["# Sweep", "", *table, ""]
    for name, why in failed.items():
        lines += [f"Failed: {name}: {why}", ""]
    if any(len(row["steps"]) > 1 for row in found):  # one row's runs have to be alike, or it must be said
        sized = [f"{row['steps'][0]:,} to {row['steps'][-1]:,}" for row in found if row["steps"]]
        note += f" Steps, as many as fitted the time of each run, from row to row: {'; '.join(sized)}."
    same = ", ".join(f"{name} = {value}" for name, value in fixed.items())
    lines += [note, *([f"All runs: {same}."] if fixed else []), "", *provenance(circumstances)]
    write_text(root / "sweep.md", "\n".join(lines) + "\n")
    write_text(root / "sweep.tex", latex(head, texts, note=note))
    write_text(root / "sweep.csv", comma_separated(shown, found, labels, keys))
    return result, table


def label(value: object) -> str:
    """A setting's value in a name or table: words as they are, others as in JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def runs_text(row: Mapping[str, Any]) -> str:
    """The number of runs behind a row, and what is missing."""
    text = f"{row['runs']}" if row["runs"] == row["of"] else f"{row['runs']} of {row['of']}"
    return text + (f", {row['failed']} failed" if row["failed"] else "")


def text(row: Mapping[str, Any], key: str) -> str:
    """Mean ± std of a number, or that it was not measured."""
    _, factor, digits = MEASURES[key]
    found = row["measures"].get(key)
    if found is None:
        return "failed" if row["failed"] else "not run"
    spread = "" if found["std"] is None else f" ± {factor * found['std']:.{digits}f}"
    return f"{factor * found['mean']:.{digits}f}{spread}"


def comma_separated(
    shown: Sequence[Mapping[str, str]], rows: Sequence[Mapping[str, Any]], labels: Sequence[str], keys: Sequence[str]
) -> str:
    """One line for each row, fractions as in the JSON; nothing where there is no number."""
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow([*labels, "runs", "of", "failed", *(name for key in keys for name in (key, f"{key}_std"))])
    for names, row in zip(shown, rows, strict=True):
        numbers = (row["measures"].get(key, {}).get(part) for key in keys for part in ("mean", "std"))
        lines.writerow([*(names[name] for name in labels), *(row[name] for name in ("runs", "of", "failed")), *numbers])
    return out.getvalue()

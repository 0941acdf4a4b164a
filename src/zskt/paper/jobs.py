"""The jobs behind tables and figures: each has a folder, runs once, resumes, and refuses results of other settings."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zskt.errors import UsageError, ZsktError
from zskt.files import read_json, write_json
from zskt.run.checkpoint import Interrupted
from zskt.runtime import arithmetic, seeded

Show = Callable[[int, int, str], None]  # called with (units done, total units, text to show beside them)
Bar = Callable[[str, str], contextlib.AbstractContextManager[Show]]  # (job name, unit) -> a progress bar


@dataclass(frozen=True)
class Job:
    """One network or comparison, and how to produce it."""

    name: str  # also the name of its folder
    settings: Mapping[str, Any]  # what the result depends on besides `needs`: JSON values
    units: int  # amount of work
    unit: str  # what `units` counts
    pace: str  # jobs of the same pace take equally long per unit
    trial: Callable[[], Callable[[], Any] | float]  # a function that does one unit of this work, on noise, or its time
    run: Callable[[Path, str | None, Show], bool]  # go on in a folder, within a time limit; whether it has finished
    needs: tuple["Job", ...] = ()  # jobs that must finish first

    def folder(self, root: Path) -> Path:
        return root / "parts" / self.name

    def measured(self, root: Path) -> dict[str, Any] | None:
        """Its measurements at the last iterate; None until it has finished."""
        for name in ("teacher.json", "student.json", "belief.json"):
            path = self.folder(root) / name
            if path.exists():
                found: dict[str, Any] = read_json(path)
                return found if name == "belief.json" else found["measured"] | {"parameters": found["parameters"]}
        return None


def in_order(jobs: Sequence[Job]) -> list[Job]:
    """The jobs and everything they need, each once, dependencies first."""
    found: dict[str, Job] = {}
    for job in jobs:
        found |= {each.name: each for each in in_order(job.needs)}
        found[job.name] = job
    return list(found.values())


def check_settings(jobs: Sequence[Job], root: Path) -> None:
    """Raise ZsktError if `root` holds results of one of these jobs that were made with other settings."""
    for job in jobs:
        path = root / "parts" / f"{job.name}.json"
        if not path.exists() or not job.folder(root).exists():
            continue
        there, wanted = read_json(path), {**job.settings, "units": job.units}
        different = [
            f"{key} = {there.get(key)!r}, now {wanted[key]!r}" for key in wanted if there.get(key) != wanted[key]
        ]
        if different:
            raise ZsktError(
                f"{job.folder(root)} was made with other settings ({'; '.join(different)}); "
                "give the same ones or choose another --out"
            )


def run_jobs(jobs: Sequence[Job], root: Path, seconds: float, bar: Bar) -> dict[str, str]:
    """Run the unfinished jobs in order until the time is up; returns failed job -> reason, also for what needs it."""
    deadline = time.monotonic() + seconds
    failed: dict[str, str] = {}
    for job in jobs:
        if job.measured(root) is not None:
            continue
        if reason := hindered(job, failed):
            failed[job.name] = reason
            continue
        left = deadline - time.monotonic()
        if left <= 0:
            break
        try:
            with bar(job.name, job.unit) as show:
                finished = perform(job, root, left, show)
        except (Interrupted, UsageError):
            raise
        except ZsktError as error:
            failed[job.name] = str(error)
            continue
        if not finished:
            break
    return failed


def hindered(job: Job, failed: Mapping[str, str]) -> str | None:
    """Why a job cannot run: something that it needs is among the `failed`."""
    return next((f"needs {need.name}" for need in job.needs if need.name in failed), None)


def perform(job: Job, root: Path, left: float, show: Show) -> bool:
    """Go on with one job for at most `left` seconds, its settings on disk first; returns whether it has finished."""
    write_json(root / "parts" / f"{job.name}.json", {**job.settings, "units": job.units})
    return job.run(job.folder(root), None if math.isinf(left) else f"{max(left, 0.001):.3f}s", show)


def time_jobs(jobs: Sequence[Job], root: Path, seconds: float = 20.0) -> dict[str, float]:
    """Seconds per unit for each pace that unfinished jobs have: measured on noise, in about `seconds` in total."""
    missing = [job for job in jobs if job.measured(root) is None and job.units]
    paces = {job.pace: job.trial for job in missing}
    found = {}
    with arithmetic(), seeded(0):
        for pace, trial in paces.items():
            work = trial()
            if isinstance(work, float):
                found[pace] = work
                continue
            work()  # warm-up
            begun, units = time.perf_counter(), 0
            while not units or time.perf_counter() - begun < seconds / len(paces) / 2:
                work()
                units += 1
            found[pace] = (time.perf_counter() - begun) / units
    return found

"""What tables and figures are made of: parts with a folder each, made once and gone on with where they stopped.

A part that stands there but was made with other settings is refused, never reused in silence.
"""

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

Show = Callable[[int, int, str], None]
"""called with (units done, units in all, what to show beside them)"""
Bar = Callable[[str, str], contextlib.AbstractContextManager[Show]]
"""(what is made, unit) -> a progress bar"""


@dataclass(frozen=True)
class Part:
    """One network or comparison, and how it is made."""

    name: str
    """of its folder"""
    settings: Mapping[str, Any]
    """what it depends on besides the parts it needs: JSON values"""
    units: int
    """how much work it is"""
    unit: str
    """what that is counted in"""
    pace: str
    """parts with the same pace take as long for a unit"""
    trial: Callable[[], Callable[[], Any]]
    """makes a function that does a unit of such work, on noise"""
    make: Callable[[Path, str | None, Show], bool]
    """makes it in a folder, or goes on with it there, until a time is up; returns whether it is finished"""
    needs: tuple["Part", ...] = ()

    def folder(self, root: Path) -> Path:
        """Where it is kept."""
        return root / "parts" / self.name

    def measured(self, root: Path) -> dict[str, Any] | None:
        """What was measured of it at the last iterate; None while it is not finished."""
        for name in ("teacher.json", "student.json", "belief.json"):
            path = self.folder(root) / name
            if path.exists():
                facts: dict[str, Any] = read_json(path)
                return facts if name == "belief.json" else facts["measured"] | {"parameters": facts["parameters"]}
        return None


def in_order(parts: Sequence[Part]) -> list[Part]:
    """The parts and all that they need, each once, what is needed first."""
    found: dict[str, Part] = {}
    for part in parts:
        found |= {each.name: each for each in in_order(part.needs)}
        found[part.name] = part
    return list(found.values())


def check_settings(parts: Sequence[Part], root: Path) -> None:
    """Raise ZsktError where a part stands under `root` that was made with other settings."""
    for part in parts:
        path = root / "parts" / f"{part.name}.json"
        if not path.exists() or not part.folder(root).exists():
            continue
        there, wanted = read_json(path), {**part.settings, "units": part.units}
        different = [
            f"{key} = {there.get(key)!r}, now {wanted[key]!r}" for key in wanted if there.get(key) != wanted[key]
        ]
        if different:
            raise ZsktError(
                f"{part.folder(root)} was made with other settings ({'; '.join(different)}); "
                "give the same ones or choose another --out"
            )


def make_parts(parts: Sequence[Part], root: Path, seconds: float, bar: Bar) -> dict[str, str]:
    """Make what is missing, in order, until the time is up; returns name -> why, for those that could not be made.

    A part that fails does not stop the others, only those that need it.
    """
    deadline = time.monotonic() + seconds
    failed: dict[str, str] = {}
    for part in parts:
        if part.measured(root) is not None:
            continue
        if missing := [need.name for need in part.needs if need.name in failed]:
            failed[part.name] = f"needs {missing[0]}"
            continue
        left = deadline - time.monotonic()
        if left <= 0:
            break
        write_json(root / "parts" / f"{part.name}.json", {**part.settings, "units": part.units})
        try:
            with bar(part.name, part.unit) as show:
                finished = part.make(part.folder(root), None if math.isinf(left) else f"{max(left, 0.001):.3f}s", show)
        except (Interrupted, UsageError):
            raise
        except ZsktError as error:
            failed[part.name] = str(error)
            continue
        if not finished:
            break
    return failed


def time_parts(parts: Sequence[Part], root: Path, seconds: float = 20.0) -> dict[str, float]:
    """Seconds per unit of every pace that is still needed: measured on noise, in about `seconds` altogether."""
    missing = [part for part in parts if part.measured(root) is None and part.units]
    paces = {part.pace: part.trial for part in missing}
    found = {}
    with arithmetic(), seeded(0):
        for pace, trial in paces.items():
            work = trial()
            work()  # the first one is slow
            begun, units = time.perf_counter(), 0
            while not units or time.perf_counter() - begun < seconds / len(paces) / 2:
                work()
                units += 1
            found[pace] = (time.perf_counter() - begun) / units
    return found

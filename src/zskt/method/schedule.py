"""Learning rate schedules."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from zskt.errors import UsageError

RISE = 0.2
"""Fraction of a one-cycle schedule in which the rate rises."""


@dataclass(frozen=True)
class Schedule:
    """How learning rates change over a run."""

    kind: Literal["cosine", "one_cycle", "multistep", "constant"] = "cosine"
    """cosine: to 0 over the run [paper, code]; one_cycle: linearly up for a fifth of it, then a cosine to 0; multistep:
    multiplied by `factor` at each milestone"""
    milestones: tuple[float, ...] = ()
    """fractions of the run at which multistep changes the rate"""
    factor: float = 0.1
    """what multistep multiplies the rate by"""
    clock: Literal["step", "update"] = "step"
    """whether the rate changes after each step [code] or each update"""

    def __post_init__(self) -> None:
        if (self.kind == "multistep") != bool(self.milestones):
            raise UsageError("schedule.milestones and schedule.kind = multistep go together: set both or neither")
        if list(self.milestones) != sorted(self.milestones) or not all(0 < m < 1 for m in self.milestones):
            raise UsageError(f"schedule.milestones = {list(self.milestones)}: expected increasing fractions of the run")


def learning_rate(schedule: Schedule, initial: float, steps: int, updates: int = 1) -> Callable[[int], float]:
    """A function t -> rate at update t, for `updates` per step in a run of `steps`; `initial` is the highest rate."""
    milestones = [max(1, math.floor(steps * fraction + 1e-9)) for fraction in schedule.milestones]

    def rate(t: int) -> float:
        step = t // updates if schedule.clock == "step" else t / updates
        progress = step / steps
        if schedule.kind == "cosine":
            return initial * (1 + math.cos(math.pi * progress)) / 2
        if schedule.kind == "one_cycle" and progress < RISE:
            return initial * max(progress / RISE, 0.01)
        if schedule.kind == "one_cycle":
            return initial * (1 + math.cos(math.pi * (progress - RISE) / (1 - RISE))) / 2
        return initial * schedule.factor ** sum(step >= milestone for milestone in milestones)

    return rate

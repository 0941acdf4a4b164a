"""Conversion of mean and standard deviation, given for [0, 1] or 0..255, to pixels in [0, 1]."""

import math
from collections.abc import Sequence
from pathlib import Path

from zskt.errors import UsageError, ZsktError, short

_Values = Sequence[float]


def unit_normalisation(
    mean: _Values, std: _Values, *, white: float | None = None, where: Path | str | None = None
) -> tuple[_Values, _Values, tuple[str, ...]]:
    """Mean and standard deviation of pixels in [0, 1], one each per channel, and notices for the user.

    `white` is the value of a white pixel on their scale; None means 255 if values exceed 1. `where` is what they were
    read from, None for --mean and --std. Raises ZsktError, UsageError for options, for numbers that fit neither scale
    or do not match.
    """
    values = (*mean, *std)
    if where is None:
        given = f"--mean {' '.join(f'{value:g}' for value in mean)} --std {' '.join(f'{value:g}' for value in std)}"
    else:
        given = short(f"{where}: mean {list(mean)} and std {list(std)}", 300)
    kind = UsageError if where is None else ZsktError
    if len(mean) != len(std) or not all(abs(value) < math.inf for value in values):  # rejects NaN, too
        raise kind(f"{given}: expected as many numbers in both, one per channel; correct them")
    notices: tuple[str, ...] = ()
    if white is None:
        white = 1 if max(values, default=0) <= 1 else 255
        if white == 255 and any(0 < value < 1 or not 0 <= value <= 255 for value in values):
            raise kind(f"{given}: expected all in [0, 1] or all in 0..255, found both or neither")
        if white == 255:
            notices = (f"{given} read as 0..255 and divided by 255",)
    if white != 1:
        mean, std = [value / white for value in mean], [value / white for value in std]
    if not all(0 <= value <= 1 for value in mean) or not all(1e-6 <= value <= 1 for value in std):
        raise kind(f"{given}: expected mean in [0, 1] and std in (0, 1] for pixels in [0, 1]; correct them")
    return mean, std, notices

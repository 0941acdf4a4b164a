"""The stages of teacher and student that attention transfer compares: by resolution, or as named by the user."""

import itertools
import math
from collections.abc import Sequence

from torch import nn

from zskt.errors import UsageError, ZsktError, unknown
from zskt.networks.classifier import Classifier
from zskt.networks.observe import Resolution, find_stages, stage_resolutions

Names = tuple[str, ...]


def stage_pairs(teacher: Classifier, student: nn.Module, named: Sequence[str] = ()) -> tuple[Names, Names]:
    """The teacher's and the student's stages to compare, pair by pair, finest first.

    `named` holds "TEACHER=STUDENT" names; without it stages pair up by resolution. Raises UsageError for a name that is
    not a stage, ZsktError if nothing pairs up.
    """
    size = teacher.input_size
    networks = {"teacher": teacher.module, "student": student}
    if named:
        halves = [pair.split("=") for pair in named]
        if any(len(half) != 2 for half in halves):
            raise UsageError(
                f"student.loss.stages = {list(named)}: expected TEACHER=STUDENT, as in layer1=block1,layer2=block2"
            )
        ours, theirs = (tuple(half[side].strip() for half in halves) for side in (0, 1))
        for (who, module), names in zip(networks.items(), (ours, theirs), strict=True):
            _check_names(who, module, names, size)
        return ours, theirs
    found = [find_stages(module, size) for module in networks.values()]
    sizes = [stage_resolutions(module, names, size) for module, names in zip(networks.values(), found, strict=True)]
    pairs = match(*sizes)
    if not pairs:
        raise ZsktError(
            f"attention transfer needs stages with maps larger than 1 x 1, found {_sides(sizes[0])} in the teacher and "
            f"{_sides(sizes[1])} in the student; use --set student.loss.attention=0"
        )
    return tuple(found[0][i] for i, _ in pairs), tuple(found[1][j] for _, j in pairs)


def stages_pair_up(teacher: Classifier, student: nn.Module) -> bool:
    """Whether attention transfer can compare the two networks."""
    try:
        stage_pairs(teacher, student)
    except ZsktError:
        return False
    return True


def likeness(a: Resolution, b: Resolution) -> float:
    """How similar two resolutions are: 1 if equal, 1/2 at twice the side, 0 if one is a single pixel."""
    if math.prod(a) == 1 or math.prod(b) == 1:  # a map of one pixel is always the unit vector
        return 0.0
    return math.sqrt(math.prod(min(x, y) / max(x, y) for x, y in zip(a, b, strict=True)))


def match(first: Sequence[Resolution], second: Sequence[Resolution]) -> list[tuple[int, int]]:
    """Index pairs of two lists of resolutions, both finest first, with the greatest total likeness.

    Equal lists pair up one to one. Otherwise this is the longest-common-subsequence recursion with likeness in place of
    equality: a stage is compared with one of about its resolution, or with none.
    """
    if list(first) == list(second):
        return [(i, i) for i in range(len(first))]
    best: dict[tuple[int, int], tuple[float, list[tuple[int, int]]]] = {}
    for i, j in itertools.product(range(len(first) + 1), range(len(second) + 1)):
        if i == 0 or j == 0:
            best[i, j] = 0.0, []
            continue
        alike = likeness(first[i - 1], second[j - 1])
        total, pairs = best[i - 1, j - 1]
        together = (total + alike, [*pairs, (i - 1, j - 1)]) if alike else (0.0, [])
        best[i, j] = max(together, best[i - 1, j], best[i, j - 1], key=lambda option: option[0])
    return best[len(first), len(second)][1]


def describe_pairs(teacher: Classifier, student: nn.Module, pairs: tuple[Names, Names]) -> str:
    """The pairs with their resolutions: `block1 = layer1 (32 x 32), block2 = layer2 (16 x 16 and 8 x 8)`."""
    sizes = [
        stage_resolutions(module, names, teacher.input_size)
        for module, names in zip((teacher.module, student), pairs, strict=True)
    ]
    return ", ".join(
        f"{ours} = {theirs} ({_sides([a])}{'' if a == b else f' and {_sides([b])}'})"
        for ours, theirs, a, b in zip(*pairs, *sizes, strict=True)
    )


def _sides(sizes: Sequence[Resolution]) -> str:
    return ", ".join(" x ".join(map(str, size)) for size in sizes) or "none"


def _check_names(who: str, module: nn.Module, names: Names, size: tuple[int, int, int]) -> None:
    """Raise UsageError unless these submodules return maps."""
    stages = find_stages(module, size)
    children = [name for name, _ in module.named_modules() if name]
    for name in names:
        if name not in children:
            raise unknown(f"{who} stage", name, stages or children[:20])
    for name, found in zip(names, stage_resolutions(module, names, size), strict=True):
        if len(found) != 2:
            raise UsageError(
                f"expected a {who} stage that returns maps (N, C, H, W), found {2 + len(found)} dimensions from "
                f"{name}; valid are {', '.join(stages) or 'none: use --set student.loss.attention=0'}"
            )

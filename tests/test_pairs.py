"""Which stages attention transfer compares: by resolution, each once, in order; or as named."""

import itertools
import random

import pytest
from torch import Tensor, nn

from small import FourStages, make_teacher, refused
from zskt.errors import UsageError, ZsktError
from zskt.method.stage_pairs import describe_pairs, likeness, match, stage_pairs, stages_pair_up
from zskt.networks import models

MLP = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))


def squares(*sides: int) -> list[tuple[int, int]]:
    return [(side, side) for side in sides]


@pytest.mark.parametrize(
    ("teacher", "student", "pairs"),
    [
        ((32, 16, 8), (32, 16, 8), [(0, 0), (1, 1), (2, 2)]),
        ((32, 16, 8), (32, 16, 8, 4), [(0, 0), (1, 1), (2, 2)]),
        ((32, 16, 8, 4), (16, 8), [(1, 0), (2, 1)]),
        ((28, 14), (28, 10), [(0, 0), (1, 1)]),
        ((14, 6), (7, 3), [(0, 0), (1, 1)]),  # both rather than 6 with 7 alone
        ((32, 16, 8, 4, 2), (64, 32, 16), [(0, 1), (1, 2)]),  # equal ones, rather than all three one step apart
        ((56, 28, 14, 7), (32, 16, 8), [(1, 0), (2, 1), (3, 2)]),
        ((16, 16, 8), (16, 8), [(1, 0), (2, 1)]),
        ((4, 1), (8, 4, 1), [(0, 1)]),  # a map of one pixel says nothing
        ((4, 1), (4, 1), [(0, 0), (1, 1)]),  # as ever where all are equal
        ((), (8, 4), []),
        ((1,), (8, 4), []),
    ],
)
def test_resolutions_find_their_like(
    teacher: tuple[int, ...], student: tuple[int, ...], pairs: list[tuple[int, int]]
) -> None:
    assert match(squares(*teacher), squares(*student)) == pairs
    if teacher != (16, 16, 8):
        assert match(squares(*student), squares(*teacher)) == [(j, i) for i, j in pairs]


def test_no_other_pairing_in_order_is_more_alike() -> None:
    rng = random.Random(0)
    for _ in range(60):
        first, second = (sorted(squares(*rng.choices(range(1, 40), k=rng.randint(1, 4))))[::-1] for _ in range(2))
        best = 0.0
        for count in range(min(len(first), len(second)) + 1):
            for some in itertools.combinations(first, count):
                for others in itertools.combinations(second, count):
                    best = max(best, sum(likeness(a, b) for a, b in zip(some, others, strict=True)))
        found = match(first, second)
        assert sum(likeness(first[i], second[j]) for i, j in found) == pytest.approx(best)
        assert found == sorted(found)
        assert len({i for i, _ in found}) == len({j for _, j in found}) == len(found)


def test_likeness_counts_both_sides() -> None:
    assert likeness((32, 96), (32, 96)) == 1
    assert likeness((32, 96), (16, 48)) == pytest.approx(0.5)
    assert likeness((4, 8), (8, 4)) == pytest.approx(0.5)


def test_networks_of_unlike_families_pair_up_and_it_is_said() -> None:
    teacher = make_teacher()
    pairs = stage_pairs(teacher, FourStages(4))
    assert pairs == (("block1", "block2", "block3"), ("stage1", "stage2", "stage3"))
    lenet = models.lenet5(num_classes=10, input_size=(3, 16, 16))
    said = describe_pairs(teacher, lenet, stage_pairs(teacher, lenet))
    assert said == "block1 = conv1 (16 x 16), block3 = conv2 (4 x 4)"
    student = nn.Sequential(nn.Conv2d(3, 4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(100, 10))
    assert describe_pairs(teacher, student, stage_pairs(teacher, student)) == "block3 = 1 (4 x 4 and 5 x 5)"


def test_names_override() -> None:
    teacher, student = make_teacher(), FourStages(4)
    named = stage_pairs(teacher, student, ("block1=stage3", "block2.layer.0.conv1=stage1"))
    assert named == (("block1", "block2.layer.0.conv1"), ("stage3", "stage1"))
    assert describe_pairs(teacher, student, named).startswith("block1 = stage3 (16 x 16 and 4 x 4), ")


@pytest.mark.parametrize(
    ("named", "words"),
    [
        (("blck1=stage1",), "unknown teacher stage 'blck1': did you mean block1 or block3 or block2? valid are block1"),
        (("block1=layer1",), "student stage 'layer1': did you mean stage1? valid are stage1, stage2, stage3, stage4"),
        (("block1",), "expected TEACHER=STUDENT, as in layer1=block1"),
        (("block1=stage1=stage2",), "expected TEACHER=STUDENT"),
        (("fc=stage1",), "expected a teacher stage that returns maps (N, C, H, W), found 2 dimensions from fc; valid"),
    ],
)
def test_wrong_names_are_refused_with_the_valid_ones(named: tuple[str, ...], words: str) -> None:
    assert words in refused(lambda: stage_pairs(make_teacher(), FourStages(4), named), UsageError)


class Odd(nn.Module):
    """A submodule that is never called, and one that returns a tuple."""

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.two, self.unused, self.fc = nn.Conv2d(3, 4, 3), self.Two(), nn.ReLU(), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.two(self.conv(x))[0].mean(dim=(2, 3)))


def test_submodules_that_show_no_maps_are_refused() -> None:
    for name, words in (("two", "two returns tuple"), ("unused", "does not call it")):
        with pytest.raises(ZsktError, match=words):
            stage_pairs(make_teacher(), Odd(), (f"block1={name}",))


def test_without_stages_nothing_pairs_up() -> None:
    assert not stages_pair_up(make_teacher(), MLP)
    with pytest.raises(ZsktError, match=r"found 16 x 16, 8 x 8, 4 x 4 in the teacher and none in the student; use"):
        stage_pairs(make_teacher(), MLP)

"""Measures of agreement against independent formulas: plain counting, scikit-learn, scipy, all outcomes written out."""

import itertools
import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score
from torch import Tensor

from zskt.evaluate.agreement import (
    agreement_by_teacher,
    cohens_kappa,
    expected_agreement,
    jensen_shannon,
    mcnemar,
    negative_flips,
    statistics,
)

M, K = 200, 5


def hot(classes: list[int] | Tensor) -> Tensor:
    """Logits (M, K) whose predictions are these classes (M,)."""
    return torch.eye(K)[torch.as_tensor(classes)]


@pytest.fixture
def three() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two networks (M, K), alike but not the same, and labels (M,) that both often get right."""
    rng = torch.Generator().manual_seed(0)
    truth, first, second = torch.randn(3, M, K, generator=rng)
    return truth + first, truth + second, truth.argmax(dim=1)


def test_agreement_is_split_by_the_teacher(three: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, answers, labels = three
    images = list(zip(*(x.tolist() for x in (logits.argmax(1), answers.argmax(1), labels)), strict=True))
    right = [s == t for s, t, label in images if t == label]
    wrong = [s == t for s, t, label in images if t != label]
    assert len(right) > len(wrong) > 20
    expected = (sum(right) / len(right), sum(wrong) / len(wrong))
    assert agreement_by_teacher(*three) == pytest.approx(expected)
    assert expected[0] != pytest.approx(expected[1], abs=0.1)
    assert agreement_by_teacher(logits, answers, answers.argmax(dim=1))[1] is None
    assert agreement_by_teacher(logits, answers, (answers.argmax(dim=1) + 1) % K)[0] is None


@pytest.mark.parametrize(("rights", "others"), [(2, 5), (4, 1), (0, 3), (3, 3)])
def test_expected_agreement_is_that_of_independent_networks(rights: int, others: int) -> None:
    """Every outcome of one network beside every outcome of the other: independence, written out."""
    first = [0] * rights * (K - 1) + list(range(1, K))  # right, or each wrong class once
    second = [0] * (K - 1) + list(range(1, K)) * others
    pairs = list(itertools.product(first, second))
    agreement = sum(a == b for a, b in pairs) / len(pairs)
    one, two = (sum(k == 0 for k in side) / len(side) for side in (first, second))
    assert expected_agreement(one, two, K) == pytest.approx(agreement, abs=1e-12)


def test_expected_agreement_of_the_certain() -> None:
    assert expected_agreement(1, 0.9, 10) == pytest.approx(0.9)
    assert expected_agreement(0.1, 0.1, 10) == pytest.approx(0.1)  # chance
    assert expected_agreement(0, 0, 2) == 1  # both choose the other class


def test_kappa_is_that_of_scikit_learn(three: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, answers, _ = three
    expected = cohen_kappa_score(logits.argmax(dim=1).numpy(), answers.argmax(dim=1).numpy())
    assert cohens_kappa(logits, answers) == pytest.approx(expected, abs=1e-12)
    assert 0.1 < expected < 0.9
    assert cohens_kappa(logits, logits) == pytest.approx(1)
    assert cohens_kappa(hot([2] * 9), hot([2] * 9)) is None
    assert cohens_kappa(hot([0, 0, 1, 1]), hot([0, 1, 0, 1])) == 0  # half agree, as by chance


@pytest.mark.parametrize(("ours", "theirs"), [(0, 0), (0, 4), (3, 9), (7, 7), (40, 61), (900, 1100)])
def test_mcnemar_is_the_exact_binomial_test(ours: int, theirs: int) -> None:
    labels = torch.zeros(ours + theirs + 5, dtype=torch.int64)
    student, teacher = torch.zeros_like(labels), torch.zeros_like(labels)
    student[ours : ours + theirs] = 1
    teacher[:ours] = 1
    student[-2:] = teacher[-2:] = 2  # both wrong: no evidence
    found = mcnemar(hot(student), hot(teacher), labels)
    assert found[:2] == (ours, theirs)
    expected = binomtest(ours, ours + theirs).pvalue if ours + theirs else 1.0
    assert found.p == pytest.approx(expected, rel=1e-9)


def test_negative_flips_are_counted(three: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, answers, labels = three
    flips = [
        t == label and s != label
        for s, t, label in zip(logits.argmax(1).tolist(), answers.argmax(1).tolist(), labels.tolist(), strict=True)
    ]
    assert 0 < sum(flips) < M / 2
    assert negative_flips(*three).tolist() == flips
    assert not negative_flips(logits, logits, labels).any()


def test_jensen_shannon_is_the_square_of_scipys_distance(three: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, answers, _ = three
    p, q = logits.double().softmax(dim=1).numpy(), answers.double().softmax(dim=1).numpy()
    expected = torch.from_numpy(jensenshannon(p, q, axis=1) ** 2)
    torch.testing.assert_close(jensen_shannon(logits, answers), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(jensen_shannon(answers, logits), expected, rtol=1e-9, atol=1e-12)
    assert jensen_shannon(logits, logits).abs().max() < 1e-12


def test_jensen_shannon_of_the_opposite_is_log_two() -> None:
    found = jensen_shannon(1e4 * hot([0, 1]), 1e4 * hot([1, 1]))  # a probability of exactly 0 on both sides
    assert found.tolist() == pytest.approx([math.log(2), 0], abs=1e-9)


def test_statistics_collects_them(three: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, answers, labels = three
    found = statistics(*three)
    one, two = (float((x.argmax(dim=1) == labels).double().mean()) for x in (logits, answers))
    assert found["agreement_expected"] == pytest.approx(expected_agreement(one, two, K))
    assert found["only_student_right"] - found["only_teacher_right"] == round(M * (one - two))
    assert found["mcnemar_p"] == mcnemar(*three).p
    split = found["agreement_where_teacher_right"], found["agreement_where_teacher_wrong"]
    assert split == agreement_by_teacher(*three)
    assert statistics(logits, answers) == {"cohens_kappa": found["cohens_kappa"]}

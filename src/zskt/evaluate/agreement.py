"""On which images do two networks agree, and is that more than their accuracies alone would give?

Pure functions of both networks' answers: logits (M, K) of a student and `answers` (M, K) of its teacher for M images of
K classes, labels (M,). `statistics` collects them for `transitions.compare`.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def statistics(logits: Tensor, answers: Tensor, labels: Tensor | None = None) -> dict[str, Any]:
    """All measures of this module by name, as plain numbers; None where one is undefined for these answers."""
    found: dict[str, Any] = {"cohens_kappa": cohens_kappa(logits, answers)}
    if labels is None:
        return found
    right, wrong = agreement_by_teacher(logits, answers, labels)
    student, teacher = (float((x.argmax(dim=1) == labels).double().mean()) for x in (logits, answers))
    test = mcnemar(logits, answers, labels)
    return found | {
        "agreement_where_teacher_right": right,
        "agreement_where_teacher_wrong": wrong,
        "agreement_expected": expected_agreement(student, teacher, logits.shape[1]),
        "only_student_right": test.only_student_right,
        "only_teacher_right": test.only_teacher_right,
        "mcnemar_p": test.p,
    }


def agreement_by_teacher(logits: Tensor, answers: Tensor, labels: Tensor) -> tuple[float | None, float | None]:
    """Agreement on the images that the teacher classifies rightly, and on the others; None where there are none.

    The second is the harder one: copying mistakes takes more than learning the task.
    """
    prediction, answer = logits.argmax(dim=1), answers.argmax(dim=1)  # (M,) each
    agree, right = (prediction == answer).double(), answer == labels  # (M,) each
    shares = [float(agree[where].mean()) if bool(where.any()) else None for where in (right, ~right)]
    return shares[0], shares[1]


def expected_agreement(first: float, second: float, classes: int) -> float:
    """Agreement of two networks of these accuracies whose mistakes are independent: a b + (1 - a) (1 - b) / (K - 1).

    Both are right, or both are wrong and choose the same of K - 1 wrong classes, each equally likely. Source: the
    expected consistency of Geirhos et al. 2020, "Beyond accuracy", there of right and wrong alone, here of classes.
    """
    return first * second + (1 - first) * (1 - second) / (classes - 1)


def cohens_kappa(logits: Tensor, answers: Tensor) -> float | None:
    """Agreement beyond chance, (p - e) / (1 - e): 1 is always, 0 as by chance. Source: Cohen 1960.

    p is the agreement, e what independent predictions with the same frequencies of classes would have. None if both
    always predict one and the same class, where e is 1.
    """
    prediction, answer = logits.argmax(dim=1), answers.argmax(dim=1)  # (M,) each
    shares = [torch.bincount(x, minlength=logits.shape[1]).double() / len(x) for x in (prediction, answer)]  # (K,) each
    observed, expected = float((prediction == answer).double().mean()), float(shares[0] @ shares[1])
    return None if expected == 1 else (observed - expected) / (1 - expected)


class McNemar(NamedTuple):
    """Images that only one of two networks classifies rightly, and the two-sided p-value of equal accuracies."""

    only_student_right: int
    only_teacher_right: int
    p: float


def mcnemar(logits: Tensor, answers: Tensor, labels: Tensor) -> McNemar:
    """Are the two accuracies different, given that they are of the same images? Source: McNemar 1947.

    If they are equal, each image on which exactly one network is right favours either by a fair coin. The exact
    binomial tail is used, not chi squared with its continuity correction, which approximates it and fails for few such
    images; exact costs nothing here.
    """
    student, teacher = logits.argmax(dim=1) == labels, answers.argmax(dim=1) == labels  # (M,) each
    ours, theirs = int((student & ~teacher).sum()), int((teacher & ~student).sum())
    number = ours + theirs
    term = tail = 1  # "number over 0"; whole numbers, so that nothing is lost
    for i in range(min(ours, theirs)):
        term = term * (number - i) // (i + 1)
        tail += term
    return McNemar(ours, theirs, min(1.0, 2 * tail / 2**number))


def negative_flips(logits: Tensor, answers: Tensor, labels: Tensor) -> Tensor:
    """Whether each image (M,) is one that the teacher gets right and the student wrong; their mean is the rate.

    What replacing the teacher by the student newly breaks. Source: Yan et al. 2021, "Positive-congruent training".
    """
    return (answers.argmax(dim=1) == labels) & (logits.argmax(dim=1) != labels)


def jensen_shannon(logits: Tensor, answers: Tensor) -> Tensor:
    """Jensen-Shannon divergence (M,) of the two beliefs about each image, in nats: 0 to log 2 = 0.693.

    The mean of KL(p, m) and KL(q, m) with m = (p + q) / 2. Unlike either KL it is symmetric, and bounded where one
    network rules out what the other believes. Source: Lin 1991.
    """
    p, q = F.log_softmax(logits.double(), dim=1), F.log_softmax(answers.double(), dim=1)  # (M, K) each
    middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=torch.float64))  # (M, K)
    divergences = [(side.exp() * (side - middle)).sum(dim=1) for side in (p, q)]  # (M,) each
    return (divergences[0] + divergences[1]) / 2

"""The weighted loss terms of a config, as functions of `Beliefs`."""

import functools
from collections.abc import Mapping

from torch import Tensor

from zskt.method import losses
from zskt.method.config import GeneratorLoss, StudentLoss
from zskt.method.updates import Beliefs, Term

ADVERSARIES = ("kl", "l1", "jensen_shannon")
"""Terms that compare the student with the teacher; all others look at the teacher alone."""


def generator_terms(w: GeneratorLoss) -> dict[str, Term]:
    """The generator's loss as weighted terms; a weight of 0 leaves the term out."""

    def kl(b: Beliefs) -> Tensor:
        student, teacher = b.student.logits, b.teacher.logits
        weights = losses.agreement(student, teacher) if w.kl_where == "agreeing" else None
        return losses.forward_kl(student, teacher, scale=w.kl_scale, weights=weights)

    terms: dict[str, tuple[float, Term]] = {
        "kl": (w.kl, kl),
        "l1": (w.l1, lambda b: losses.l1_logits(b.student.logits, b.teacher.logits)),
        "jensen_shannon": (w.jensen_shannon, lambda b: losses.jensen_shannon(b.student.logits, b.teacher.logits)),
        "batchnorm": (w.batchnorm, lambda b: losses.batchnorm_prior(b.teacher.statistics)),
        "one_hot": (w.one_hot, lambda b: losses.one_hot(b.teacher.logits, b.labels)),
        "balance": (w.balance, lambda b: losses.class_balance(b.teacher.logits)),
        "activation": (w.activation, lambda b: losses.activation(b.teacher.stages[-1])),
        "total_variation": (w.total_variation, lambda b: losses.total_variation(b.images)),
    }
    return {name: _weighted(weight, term) for name, (weight, term) in terms.items() if weight}


def teacher_terms(terms: Mapping[str, Term]) -> dict[str, Term]:
    """Those of the generator's terms that do not look at the student."""
    return {name: term for name, term in terms.items() if name not in ADVERSARIES}


def student_terms(w: StudentLoss) -> dict[str, Term]:
    """The student's loss as weighted terms; a weight of 0 leaves the term out."""
    kl = functools.partial(losses.forward_kl, temperature=w.temperature, scale=w.kl_scale)
    terms: dict[str, tuple[float, Term]] = {
        "kl": (w.kl, lambda b: kl(b.student.logits, b.teacher.logits)),
        "l1": (w.l1, lambda b: losses.l1_logits(b.student.logits, b.teacher.logits)),
        "attention": (w.attention, _attention),
    }
    return {name: _weighted(weight, term) for name, (weight, term) in terms.items() if weight}


def _attention(beliefs: Beliefs) -> Tensor:
    """Attention distance; the teacher may have one more stage, for the activation prior."""
    student, teacher = beliefs.student, beliefs.teacher
    sizes = losses.common_sizes(student.stages, teacher.stages[: len(student.stages)])
    return losses.attention_distance(losses.attention_maps(student, sizes), losses.attention_maps(teacher, sizes))


def _weighted(weight: float, term: Term) -> Term:
    def weighted(beliefs: Beliefs) -> Tensor:
        return weight * term(beliefs)

    return weighted

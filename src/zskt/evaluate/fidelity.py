"""How close are two networks' beliefs? What `zskt.compare`, `zskt.fidelity` and `zskt belief` measure, in one place.

M images, K classes. Images are uint8 or in [0, 1]; a network includes its normalisation (`Classifier`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zskt.errors import UsageError, ZsktError
from zskt.evaluate.agreement import jensen_shannon, negative_flips, statistics
from zskt.evaluate.controls import p_value
from zskt.evaluate.measures import (
    bootstrap,
    calibration_error,
    check_images,
    check_networks,
    disagreements,
    per_image,
    predict,
)
from zskt.evaluate.perturbations import transfer, under_corruption
from zskt.evaluate.representations import stage_alignment
from zskt.evaluate.transitions import Paths, Progress, Transitions, transition_curves
from zskt.networks.checks import as_teacher
from zskt.networks.classifier import Classifier

IMAGES = 1_000
"""At most so many images for the alignment of stages and for corruptions: a small part of the work of the paths."""
MOSTLY = 0.5
"""Agreement below which the mean transition error describes the minority of images on which the networks agree."""


@dataclass(frozen=True)
class Comparison:
    """How close two networks' beliefs are: on images, and on the paths from them to other classes."""

    measured: dict[str, Any]  # all numbers, ready for JSON
    transitions: Transitions = field(repr=False)
    values: dict[str, Tensor] = field(repr=False)  # the per-image values (M,) behind the means of the same names
    followed: Tensor = field(repr=False)  # which of the M images were followed to other classes
    predictions: Tensor = field(repr=False)  # (M,) the student's

    @property
    def mean_transition_error(self) -> float:
        """ZSKT, eq. 2: 0 for equal beliefs, at most 1."""
        return self.transitions.error


def compare(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    paths: Paths | None = None,
    *,
    fewer: bool = False,
    progress: Progress = lambda done, total: None,
) -> Comparison:
    """Compare two networks' beliefs on images (M, C, H, W), uint8 or in [0, 1], with or without labels (M,).

    Each network is a `Classifier`; one of them may be a bare module, which then uses the other's normalisation.
    Agreement and divergences (nats) are over all images; transition curves, as set by `paths`, over some of those on
    which both agree, or with `fewer` over all if there are not so many. Intervals are 95 % bootstrap intervals over
    images. Raises ZsktError if the networks do not fit together or agree on too few images.
    """
    first, second = read_pair(student, teacher)
    check_networks(first, second)
    check_images(first, images, labels)
    how = paths or Paths()
    if how.start == "label" and labels is None:
        raise UsageError("start = 'label': expected labels, found none; give them or start from the prediction")
    logits, answers = predict(first, images), predict(second, images)  # (M, K) each
    labels = None if labels is None else labels.cpu()
    predictions = logits.argmax(dim=1)  # (M,)
    agreeing = (predictions == answers.argmax(dim=1)).nonzero().squeeze(1)
    if fewer and len(agreeing):
        how = dataclasses.replace(how, images=min(how.images, len(agreeing)))
    if len(agreeing) < how.images:
        raise ZsktError(
            f"expected {how.images:,} images on which both networks agree, found {len(agreeing):,} of {len(images):,}; "
            "ask for fewer or give more images"
        )
    chosen = agreeing[_drawn(len(agreeing), how.images, how.seed)]  # (images,)
    starts = predictions if how.start == "prediction" or labels is None else labels
    transitions = transition_curves(first, second, images[chosen], starts[chosen], how, progress=progress)
    values = per_image(logits, answers, labels) | {"jensen_shannon": jensen_shannon(logits, answers)}
    if labels is not None:
        values["negative_flip_rate"] = negative_flips(logits, answers, labels).double()
    measured: dict[str, Any] = {
        "mean_transition_error": transitions.error,
        **{name: float(value.mean()) for name, value in values.items()},
        "intervals": {
            "mean_transition_error": bootstrap(transitions.gaps.mean(dim=1), seed=how.seed),
            **{name: bootstrap(value, seed=how.seed) for name, value in values.items()},
        },
        **statistics(logits, answers, labels),
    }
    if labels is not None:
        measured["calibration_error"] = calibration_error(logits, labels)
        measured["teacher_calibration_error"] = calibration_error(answers, labels)
    measured |= disagreements(logits, answers, second.class_names)
    measured |= {
        "images": len(images),
        "followed": how.images,
        **{name: value for name, value in vars(how).items() if name not in ("images", "batch_size")},
        "warnings": _warnings(measured["agreement"]),
    }
    return Comparison(measured, transitions, values, chosen, predictions)


def fidelity(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    paths: Paths | None = None,
    *,
    controls: Mapping[str, nn.Module] | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Comparison:
    """`compare`, and whether the networks are also alike inside, under corruptions, attacks and against controls.

    Alignment of stages and corruptions are over up to 1,000 of the images, attacks over those that the paths start
    from. Each of `controls`, by name, is compared with the teacher as the student is, from fewer images if it agrees on
    fewer; `p_values` say how often one is as close as the student, see `controls.p_value`. `progress` is called with
    what is being done, and how much of how much of it.
    """
    first, second = read_pair(student, teacher)
    how = paths or Paths()
    for name, control in (controls or {}).items():
        _check_control(name, control, second, images)

    def said(what: str) -> Progress:
        return lambda done, total: progress(what, done, total)

    found = compare(first, second, images, labels, how, progress=said("paths"))
    some = _drawn(len(images), IMAGES, how.seed)
    some_labels = None if labels is None else labels[some]
    measured = found.measured | {
        "alignment": [pair._asdict() for pair in stage_alignment(first, second, images[some])],
        "corruptions": under_corruption(
            first, second, images[some], some_labels, seed=how.seed, done=said("corruptions")
        ),
    }
    starts = images[found.followed], found.predictions[found.followed]
    measured["attacks_on_student"] = transfer(first, second, *starts, done=said("attacks on the student"))
    measured["attacks_on_teacher"] = transfer(second, first, *starts, done=said("attacks on the teacher"))
    if controls:
        others = {
            name: compare(control, second, images, labels, how, fewer=True, progress=said(f"paths of control {name}"))
            for name, control in controls.items()
        }
        measured |= against_controls(found, others, how.seed)
    return dataclasses.replace(found, measured=measured)


def against_controls(found: Comparison, controls: Mapping[str, Comparison], seed: int = 0) -> dict[str, Any]:
    """What each control measured, and how likely a control is as close to the teacher as the student, with p-values.

    Agreement is compared on the same images; the transition error on those that each network was followed from, and
    only between networks that agree with the teacher on most images: one that never changes its mind has a small error.
    None where that leaves nothing to compare.
    """
    kept = ("agreement", "mean_transition_error", "accuracy", "followed", "intervals", "warnings")
    alike = [other for other in controls.values() if not other.measured["warnings"]]
    p_values: dict[str, float | None] = {
        "agreement": p_value(
            found.values["agreement"],
            [other.values["agreement"] for other in controls.values()],
            paired=True,
            seed=seed,
        ),
        "mean_transition_error": None,
    }
    if alike and not found.measured["warnings"]:
        student, *others = (-each.transitions.gaps.mean(dim=1) for each in (found, *alike))  # (images,) each
        p_values["mean_transition_error"] = p_value(student, others, paired=False, seed=seed)
    measured = {
        name: {key: value for key, value in other.measured.items() if key in kept} for name, other in controls.items()
    }
    return {"controls": measured, "p_values": p_values}


def _check_control(name: str, control: nn.Module, teacher: Classifier, images: Tensor) -> None:
    """Raise ZsktError unless a control can be compared with the teacher: before the work begins, not after hours."""
    first, second = read_pair(control, teacher)
    check_networks(first, second)
    if not bool((predict(first, images).argmax(dim=1) == predict(second, images).argmax(dim=1)).any()):
        raise ZsktError(f"expected a control that agrees with the teacher on some image, found none of {name}; omit it")


def _drawn(count: int, most: int, seed: int) -> Tensor:
    """Indices below `count`, at most so many, drawn by the seed."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most]


def _warnings(agreement: float) -> list[str]:
    if agreement >= MOSTLY:
        return []
    return [
        f"the mean transition error is over the {100 * agreement:.0f} of 100 images on which the networks agree, and "
        "says nothing of the others: do not compare it with that of a pair that agrees on most"
    ]


def read_pair(student: nn.Module, teacher: nn.Module) -> tuple[Classifier, Classifier]:
    """Both networks as classifiers; a bare module gets the other's normalisation."""
    if isinstance(student, Classifier):
        return as_teacher(student), as_teacher(teacher if isinstance(teacher, Classifier) else student.like(teacher))
    if isinstance(teacher, Classifier):
        return as_teacher(teacher.like(student)), as_teacher(teacher)
    raise UsageError(
        "expected at least one network with a normalisation, found two bare modules; wrap one, as in "
        "zskt.Classifier(module, input_size=(3, 32, 32), mean=..., std=...)"
    )

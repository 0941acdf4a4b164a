"""Training with data: teachers, and the baselines for a zero-shot student.

A student from scratch, one distilled from a teacher (`kd_at`), and a fine-tuned zero-shot student, all trained by
`train_student`, on the few images of each class that `few_shot` picks.

N batch, M images in total, K classes, C x H x W images.
"""

import copy
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zskt.errors import UsageError, ZsktError
from zskt.method.losses import attention_transfer, forward_kl
from zskt.method.stage_pairs import stage_pairs
from zskt.networks.checks import check_pair
from zskt.networks.classifier import Classifier
from zskt.networks.observe import Observer, at_least_float32, logits_of, memory_format
from zskt.paper.training import Images, Objective, Training, TrainingResult, fit
from zskt.run.lifecycle import Callback
from zskt.runtime import stream


def teach(
    module: nn.Module,
    train: Images,
    test: Images,
    training: Training,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    stop_after: str | int | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Train `module` in place, with cross-entropy, as a teacher; mean and std are of pixels in [0, 1]. See `fit`."""
    like = Classifier(module, input_size=train[0].shape[1:], mean=mean, std=std, class_names=class_names)
    return fit(
        "teacher",
        module,
        like,
        train,
        test,
        training,
        cross_entropy(module),
        metadata={"how": "zskt teach"},
        out=out,
        resume=resume,
        stop_after=stop_after,
        callbacks=callbacks,
    )


def train_student(
    module: nn.Module,
    teacher: Classifier,
    train: Images,
    test: Images,
    training: Training,
    *,
    objective: Objective | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    stop_after: str | int | None = None,
    callbacks: Sequence[Callback] = (),
    **metadata: Any,
) -> TrainingResult:
    """Train `module` in place, from its current weights, on images in the teacher's normalisation.

    `objective` is by default cross-entropy; for distillation it is `kd_at` of this module. Accuracy and agreement with
    the teacher, which is left unchanged, are measured. With `out` the student is saved there, with `metadata` (how it
    was trained: JSON values, the same on resume). For the rest see `fit`. What `load_student` returns is frozen: train
    its `.module.requires_grad_()`.
    """
    if objective is None:  # else `kd_at` has checked it
        check_pair(teacher, module)
    return fit(
        "student",
        module,
        teacher,
        train,
        test,
        training,
        cross_entropy(module) if objective is None else objective,
        teacher=teacher,
        metadata=metadata,
        out=out,
        resume=resume,
        stop_after=stop_after,
        callbacks=callbacks,
    )


def cross_entropy(module: nn.Module) -> Objective:
    """Cross-entropy of a network's logits to the labels, mean over the batch, in nats."""
    return lambda x, labels: F.cross_entropy(at_least_float32(logits_of(module(x))), labels)


ALPHA, TEMPERATURE, BETA = 0.9, 4.0, 1000.0  # of KD+AT, as released


def kd_at(teacher: Classifier, student: nn.Module, *, cross_entropy: bool = True) -> Objective:
    """(1 - ALPHA) CE + 2 ALPHA T^2 KL(t || s) / K + BETA sum of attention distances.

    t and s are the softmax of the logits over T = TEMPERATURE; KL is the mean over the batch. Without `cross_entropy`
    its term is omitted, as in the paper. BETA is meant for images of 32 x 32: the distance is a mean over pixels
    between unit vectors over pixels, so that on 8 x 8 it weighs 16 times as much.

    The teacher is copied and left unchanged; the student has hooks only while the loss is computed. Raises ZsktError if
    teacher and student, or their stages, do not fit together. Source: the few-shot baseline of the released ZSKT code,
    after Hinton et al. 2015 (KL) and Zagoruyko & Komodakis 2017 (attention).
    """
    check_pair(teacher, student)
    try:
        stages = stage_pairs(teacher, student)
    except ZsktError as error:  # whose advice is for the command line of a run
        raise ZsktError(f"{str(error).rpartition(';')[0]}; choose another student") from error
    layout = memory_format(teacher.module, teacher.input_size)
    frozen = copy.deepcopy(teacher).to(memory_format=layout)  # type: ignore[call-overload]
    watched = Observer(frozen.module, stages[0])

    def objective(x: Tensor, labels: Tensor) -> Tensor:
        if frozen.mean.device != x.device:
            frozen.to(x.device)
        with torch.no_grad():
            theirs = watched(x.contiguous() if layout == torch.contiguous_format else x)
        with closing(Observer(student, stages[1])) as learner:
            ours = learner(x)
        loss = 2 * ALPHA * forward_kl(ours.logits, theirs.logits, temperature=TEMPERATURE, scale="per_class")
        if cross_entropy:
            loss = loss + (1 - ALPHA) * F.cross_entropy(at_least_float32(ours.logits), labels)
        return loss + BETA * attention_transfer(ours.stages, theirs.stages)

    return objective


def few_shot(labels: Tensor, per_class: int, seed: int = 0, *, num_classes: int | None = None) -> Tensor:
    """Indices (K per_class,) of `per_class` random images of each class 0 .. K - 1, class by class; labels (M,).

    For equal seeds, smaller sets are part of larger ones. Raises ZsktError if one of the `num_classes` (by default
    those in the labels) has fewer images.
    """
    if per_class < 1:
        raise UsageError(f"per_class = {per_class}: expected at least 1 image of each class")
    labels = labels.cpu()
    fewest, poorest = torch.bincount(labels, minlength=num_classes or 1).min(dim=0)
    if fewest < per_class:
        advice = f"ask for at most {fewest}" if fewest else "give images of it"
        raise ZsktError(f"expected {per_class} images of each class, found {fewest} of class {poorest}; {advice}")
    rng = torch.Generator().manual_seed(stream(seed, "few shot"))
    members = [(labels == k).nonzero().flatten() for k in range(int(labels.max()) + 1)]  # K of (M_k,)
    picked = [each[torch.randperm(len(each), generator=rng)[:per_class]] for each in members]
    return torch.stack(picked, dim=1).flatten()  # (per_class K,)

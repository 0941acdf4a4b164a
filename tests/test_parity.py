"""The engine is the released method: float64 comparison with the plain loop of reference.py."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from small import FourStages, make_matching, make_teacher
from zskt.bench import reference
from zskt.bench.reference import released_loop
from zskt.method import losses
from zskt.method.matching import BeliefMatching, Latent
from zskt.method.updates import Batch
from zskt.networks import models
from zskt.networks.classifier import Classifier

OUTER_ITERATIONS = 3
CLIP_THAT_BITES = 0.01
"""below the gradient norms of both players here; the generator's never reach the real 5"""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pair(recipe: str, dtype: torch.dtype = torch.float64) -> tuple[Classifier, FourStages | models.WideResNet]:
    """A teacher and a student; four post-ReLU stages for mmrazor's recipe, three WRN stages otherwise."""
    torch.manual_seed(1)
    if recipe == "zskt-mmrazor":
        return make_teacher(FourStages(8)).to(dtype), FourStages(4).to(dtype)
    return make_teacher().to(dtype), models.wide_resnet(10, 1).to(dtype)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """||a - b|| / ||a||, in float64."""
    a, b = theirs.double().flatten(), ours.double().flatten()
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a).clamp(min=1e-300))


def compare(
    recipe: str,
    memory_format: str = "contiguous",
    *,
    fused: bool = True,
    device: str = "cpu",
    clip: float | None = None,
    tamper: Callable[[BeliefMatching], None] = lambda matching: None,
    dtype: torch.dtype = torch.float64,
    precision: str = "fp32",
    iterations: int = OUTER_ITERATIONS,
    student_losses: int = 10,
) -> tuple[float, float]:
    """Run both loops from the same state; the largest relative differences of losses and of tensors.

    Of the student's losses in an iteration the first `student_losses` count.
    """
    teacher, student = pair(recipe, dtype)
    teacher.to(device)
    student.to(device)
    plain_teacher, plain_student = copy.deepcopy(teacher.module).requires_grad_(True), copy.deepcopy(student)
    changes: dict[str, Any] = {
        "machine.memory_format": memory_format,
        "machine.fused": fused,
        "machine.precision": precision,
    }
    if clip is not None:
        changes |= {"generator.clip": clip, "student.clip": clip}
    matching, config = make_matching(recipe, teacher, student, changes)
    plain_generator = copy.deepcopy(matching.generator).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    tamper(matching)
    rng = torch.Generator(device).manual_seed(0)
    shape = (config.batch_size, config.generator.latent)
    oracle = released_loop(
        plain_teacher,
        plain_student,
        plain_generator,
        lambda: torch.randn(shape, generator=rng, dtype=dtype, device=device),
        student.stages,
        total=config.steps,
        method=recipe,
    )
    loss_difference = 0.0
    for _ in range(iterations):
        ours, theirs = matching.step(), next(oracle)
        for mine, other in zip(ours["generator"], theirs.generator_losses, strict=True):
            loss_difference = max(loss_difference, distance(mine, other))
        for mine, other in list(zip(ours["student"], theirs.student_losses, strict=True))[:student_losses]:
            loss_difference = max(loss_difference, distance(mine, other))
    oracle.close()
    matching.close()
    state = student.state_dict()
    tensors = [distance(state[name], tensor) for name, tensor in plain_student.state_dict().items()]
    weights = zip(matching.generator.parameters(), plain_generator.parameters(), strict=True)
    tensors += [distance(mine.detach(), other.detach()) for mine, other in weights]
    return loss_difference, max(tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("recipe", ["zskt", "zskt-fresh", "zskt-mmrazor"])
def test_engine_is_the_released_loop(recipe: str, memory_format: str, device: str) -> None:
    loss_difference, tensor_difference = compare(recipe, memory_format, device=device)
    assert loss_difference <= 1e-10
    assert tensor_difference <= 1e-9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-4), ("bf16", 2e-2)])
@pytest.mark.parametrize("recipe", ["zskt", "zskt-fresh", "zskt-mmrazor"])
def test_first_iteration_in_lower_precision(recipe: str, precision: str, limit: float, device: str) -> None:
    """The generator's loss and the first of the student after it: from there rounding alone drives the game apart.

    Adam's first updates are nearly signs of the gradients, so that within the iteration fp32 is off by 1e-4 to 1e-3.
    """
    lower: dict[str, Any] = {"dtype": torch.float32, "precision": precision, "iterations": 1, "student_losses": 1}
    difference, _ = compare(recipe, "channels_last", device=device, **lower)
    assert 0 < difference <= limit


def test_plain_optimisers_take_the_same_steps() -> None:
    loss_difference, tensor_difference = compare("zskt", "channels_last", fused=False)
    assert loss_difference <= 1e-10
    assert tensor_difference <= 1e-9


def batchmean(matching: BeliefMatching) -> None:
    """KL over N instead of N K, the attention weight left as it is."""
    matching.student_updates.loss = dict(matching.student_updates.loss) | {
        "kl": lambda b: losses.forward_kl(b.student.logits, b.teacher.logits, scale="batchmean")
    }


def eval_mode_for_generator(matching: BeliefMatching) -> None:
    matching.student_for_generator = "eval"


def teacher_before_the_generator(matching: BeliefMatching) -> None:
    """The student learns on the new images, but with the teacher's answer to those of before its update."""
    update_generator, ask = matching.update_generator, matching.ask
    before: list[Batch] = []

    def stale_update(latent: Latent) -> object:
        before[:] = [matching.draw(latent)]
        return update_generator(latent)

    def stale_ask(batch: Batch) -> Batch:
        return dataclasses.replace(batch, teacher=ask(before[0]).teacher)

    vars(matching).update(update_generator=stale_update, ask=stale_ask)


def no_student_clip(matching: BeliefMatching) -> None:
    matching.student_updates.clip = None


def no_generator_clip(matching: BeliefMatching) -> None:
    matching.generator_updates.clip = None


@pytest.mark.parametrize(
    "tamper", [batchmean, eval_mode_for_generator, teacher_before_the_generator, no_student_clip, no_generator_clip]
)
def test_comparison_sees_a_different_method(
    tamper: Callable[[BeliefMatching], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "CLIP_NORM", CLIP_THAT_BITES)
    _, tensor_difference = compare("zskt", clip=CLIP_THAT_BITES, tamper=tamper)
    assert tensor_difference > 1e-6


def test_clipping_that_bites_in_both_players_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CLIP_NORM", CLIP_THAT_BITES)
    loss_difference, tensor_difference = compare("zskt", clip=CLIP_THAT_BITES)
    assert loss_difference <= 1e-10
    assert tensor_difference <= 1e-9

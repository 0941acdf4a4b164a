"""The step: who is updated, in which modes, by how many forwards, without waiting for the device."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from small import make_matching, make_teacher
from zskt.method.matching import BeliefMatching
from zskt.networks import models
from zskt.networks.classifier import Classifier


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def same(before: list[Tensor | None], after: list[Tensor | None]) -> bool:
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("recipe", ["zskt", "zskt-fresh", "zskt-mmrazor", "zskt-prior"])
def test_only_the_player_at_work_gets_gradients(recipe: str) -> None:
    teacher, student = make_teacher(), models.wide_resnet(10, 1)
    teacher.module.requires_grad_(True)  # even where somebody unfreezes the teacher
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)  # somebody else's: no generator update may change it
    matching, _ = make_matching(recipe, teacher, student)
    before = gradients(student)
    matching.update_generator(matching.sample_latent())
    assert same(before, gradients(student))
    assert all(g is None for g in gradients(teacher))
    generator_before = gradients(matching.generator)
    assert all(g is not None for g in generator_before)
    batch = matching.ask(matching.draw())
    assert not batch.images.requires_grad
    assert batch.teacher is not None
    assert not batch.teacher.logits.requires_grad
    matching.student_step(batch)
    assert same(generator_before, gradients(matching.generator))
    assert all(g is None for g in gradients(teacher))
    assert not same(before, gradients(student))


def record_modes(matching: BeliefMatching, teacher: Classifier) -> list[tuple[str, str, bool]]:
    """(network, train or eval, whether gradients are on) of every forward, in order."""
    seen: list[tuple[str, str, bool]] = []
    networks = {"teacher": teacher.module, "student": matching.student, "generator": matching.generator}
    for name, module in networks.items():

        def watch(module: nn.Module, inputs: Any, name: str = name) -> None:
            modes = {child.training for child in module.modules()}
            assert len(modes) == 1
            seen.append((name, "train" if modes.pop() else "eval", torch.is_grad_enabled()))

        module.register_forward_pre_hook(watch)
    return seen


GENERATOR = [("generator", "train", True), ("teacher", "eval", True), ("student", "train", True)]
DRAW = [("generator", "train", False), ("teacher", "eval", False)]
UPDATE = [("student", "train", True)]


@pytest.mark.parametrize(
    ("recipe", "forwards"),
    [
        ("zskt", GENERATOR + DRAW + 10 * UPDATE),
        ("zskt-fresh", GENERATOR + 10 * (DRAW + UPDATE)),
        ("zskt-mmrazor", GENERATOR + 10 * (DRAW + UPDATE)),
        ("zskt-prior", GENERATOR + DRAW + 10 * UPDATE),
    ],
)
def test_forwards_of_a_step_and_their_modes(recipe: str, forwards: list[tuple[str, str, bool]]) -> None:
    teacher, student = make_teacher(), models.wide_resnet(10, 1)
    matching, _ = make_matching(recipe, teacher, student)
    seen = record_modes(matching, teacher)
    matching.step()
    assert seen == forwards
    tracked = [b for name, b in student.named_buffers() if name.endswith("num_batches_tracked")]
    assert {int(count) for count in tracked} == {11}  # ten updates, and the generator's that ran it in train mode


def test_configured_modes_are_used() -> None:
    teacher, student = make_teacher(), models.wide_resnet(10, 1)
    changes = {"student.mode_for_generator": "eval", "generator.mode_for_student": "eval"}
    matching, _ = make_matching("zskt", teacher, student, changes)
    seen = record_modes(matching, teacher)
    matching.step()
    assert seen[2] == ("student", "eval", True)
    assert seen[3] == ("generator", "eval", False)
    assert seen[5] == ("student", "train", True)


def test_losses_and_counts_of_a_step() -> None:
    matching, _ = make_matching("zskt", make_teacher(), models.wide_resnet(10, 1), {"generator.updates": 3})
    losses = matching.step()
    shapes = {"generator": (3,), "generator.kl": (), "student": (10,), "student.kl": (), "student.attention": ()}
    assert {name: value.shape for name, value in losses.items()} == shapes
    torch.testing.assert_close(losses["student"][-1], losses["student.kl"] + losses["student.attention"])
    assert not any(value.requires_grad for value in losses.values())
    assert losses["generator"][0] < 0
    assert losses["student"][-1] < losses["student"][0]  # it does learn the batch
    assert (matching.generator_updates.done, matching.student_updates.done) == (3, 10)


class NoHostSynchronisation(TorchDispatchMode):
    """Refuses to read a tensor's value into Python: on a GPU that waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "host synchronisation in the step"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", ["zskt", "zskt-fresh", "zskt-mmrazor", "zskt-prior"])
def test_a_step_never_waits_for_the_device(recipe: str) -> None:
    matching, config = make_matching(recipe, make_teacher(), models.wide_resnet(10, 1))
    assert config.machine.fused
    with NoHostSynchronisation():
        matching.step()


def test_the_guard_against_waiting_can_fail() -> None:
    with pytest.raises(AssertionError, match="host synchronisation"), NoHostSynchronisation():
        float(torch.ones(()))


def test_hooks_are_gone_after_close() -> None:
    teacher, student = make_teacher(), models.wide_resnet(10, 1)
    matching, _ = make_matching("zskt", teacher, student)
    matching.close()
    for module in (*teacher.modules(), *student.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks

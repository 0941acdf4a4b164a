"""The step: who is updated, in which modes, by how many forwards, without waiting for the device."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from small import make_matching, make_teacher
from zskt.method.generator import Generator
from zskt.method.losses import batchnorm_prior, forward_kl, one_hot
from zskt.method.matching import BeliefMatching, Latent, Losses, Updates
from zskt.method.replay import Bank
from zskt.networks import models
from zskt.networks.classifier import Classifier
from zskt.networks.observe import Observation


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def same(before: list[Tensor | None], after: list[Tensor | None]) -> bool:
    return all((a is None and b is None) or torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("recipe", ["zskt", "zskt-fresh", "zskt-mmrazor", "zskt-prior"])
def test_only_the_player_at_work_gets_gradients(recipe: str) -> None:
    teacher, student = make_teacher(), models.wide_resnet(10, 1)
    teacher.module.requires_grad_(True)  # even where somebody unfreezes the teacher
    for parameter in student.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)  # left by somebody else: neither used nor changed by a search
    matching, _ = make_matching(recipe, teacher, student)
    before = gradients(student)
    matching.search(matching.sample_latent())
    assert same(before, gradients(student))
    assert all(g is None for g in gradients(teacher))
    generator_before = gradients(matching.generator)
    assert all(g is not None for g in generator_before)
    batch = matching.teach(matching.draw())
    assert not batch.images.requires_grad
    assert not batch.teacher.logits.requires_grad
    matching.student_step(batch)
    assert same(generator_before, gradients(matching.generator))
    assert all(g is None for g in gradients(teacher))
    assert not same(before, gradients(student))


def record_modes(matching: BeliefMatching, teacher: Classifier) -> list[tuple[str, str, bool]]:
    """(network, train or eval, whether gradients are on) of every forward, in order."""
    seen: list[tuple[str, str, bool]] = []
    networks = {"teacher": teacher.module, "student": matching.student.module, "generator": matching.generator}
    for name, module in networks.items():

        def watch(module: nn.Module, inputs: Any, name: str = name) -> None:
            modes = {child.training for child in module.modules()}
            assert len(modes) == 1
            seen.append((name, "train" if modes.pop() else "eval", torch.is_grad_enabled()))

        module.register_forward_pre_hook(watch)
    return seen


SEARCH = [("generator", "train", True), ("teacher", "eval", True), ("student", "train", True)]
DRAW = [("generator", "train", False), ("teacher", "eval", False)]
UPDATE = [("student", "train", True)]


@pytest.mark.parametrize(
    ("recipe", "forwards"),
    [
        ("zskt", SEARCH + DRAW + 10 * UPDATE),
        ("zskt-fresh", SEARCH + 10 * (DRAW + UPDATE)),
        ("zskt-mmrazor", SEARCH + 10 * (DRAW + UPDATE)),
        ("zskt-prior", SEARCH + DRAW + 10 * UPDATE),
    ],
)
def test_forwards_of_a_step_and_their_modes(recipe: str, forwards: list[tuple[str, str, bool]]) -> None:
    teacher, student = make_teacher(), models.wide_resnet(10, 1)
    matching, _ = make_matching(recipe, teacher, student)
    seen = record_modes(matching, teacher)
    matching.step()
    assert seen == forwards
    tracked = [b for name, b in student.named_buffers() if name.endswith("num_batches_tracked")]
    assert {int(count) for count in tracked} == {11}  # ten updates, and the search that ran it in train mode


def test_configured_modes_are_used() -> None:
    teacher, student = make_teacher(), models.wide_resnet(10, 1)
    changes = {"student.mode_in_search": "eval", "generator.mode_for_student": "eval"}
    matching, _ = make_matching("zskt", teacher, student, changes)
    seen = record_modes(matching, teacher)
    matching.step()
    assert seen[2] == ("student", "eval", True)
    assert seen[3] == ("generator", "eval", False)
    assert seen[5] == ("student", "train", True)


def test_teacher_does_not_change_by_a_bit() -> None:
    teacher, student = make_teacher(), models.wide_resnet(10, 1)
    before = copy.deepcopy(teacher.state_dict())
    matching, _ = make_matching("zskt-prior", teacher, student)
    for _ in range(2):
        matching.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_losses_and_counts_of_a_step() -> None:
    matching, _ = make_matching("zskt", make_teacher(), models.wide_resnet(10, 1), {"generator.updates": 3})
    losses = matching.step()
    assert len(losses.generator) == 3
    assert len(losses.student) == 10
    for update in (*losses.generator, *losses.student):
        torch.testing.assert_close(update.total, sum(update.terms.values()))
        assert not update.total.requires_grad
    assert set(losses.student[0].terms) == {"kl", "attention"}
    assert losses.generator[0].total < 0
    assert losses.student[-1].total < losses.student[0].total  # it does learn the batch
    assert (matching.generator_updates.done, matching.student_updates.done) == (3, 10)


class NoHostSynchronisation(TorchDispatchMode):
    """Refuses to read a tensor's value into Python: on a GPU that waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "host synchronisation in the step"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", ["zskt", "zskt-fresh", "zskt-mmrazor", "zskt-prior"])
def test_a_step_never_waits_for_the_device(recipe: str) -> None:
    matching, config = make_matching(recipe, make_teacher(), models.wide_resnet(10, 1))
    assert config.fused
    with NoHostSynchronisation():
        matching.step()


def test_a_step_with_plain_adam_waits_only_in_the_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    matching, _ = make_matching("zskt", make_teacher(), models.wide_resnet(10, 1), {"fused": False})
    for updates in (matching.generator_updates, matching.student_updates):
        monkeypatch.setattr(updates.optimizer, "step", lambda: None)  # plain Adam reads its own step counter
    with NoHostSynchronisation():
        matching.step()


def test_the_guard_against_waiting_can_fail() -> None:
    with pytest.raises(AssertionError, match="host synchronisation"), NoHostSynchronisation():
        float(torch.ones(()))


class FastLike(BeliefMatching):
    """A CMI/Fast-like method: labels with z, z and generator optimised afresh, best images banked."""

    def sample_latent(self) -> Latent:
        latent = super().sample_latent()
        return Latent(latent.z, torch.arange(len(latent.z)) % 10)

    def search(self, latent: Latent) -> tuple[Tensor, list[Losses]]:
        z = latent.z.clone().requires_grad_(True)  # (N, Z)
        optimizer = torch.optim.Adam([{"params": [z], "lr": 0.01}, {"params": self.generator.parameters()}], lr=1e-3)
        fresh = Updates(4, optimizer, self.generator_updates.loss)
        best, lowest, losses = torch.empty(0), float("inf"), []
        for _ in range(fresh.count):
            losses.append(self.generator_step(Latent(z, latent.labels), fresh))
            if float(losses[-1].total) < lowest:
                best, lowest = self.draw(Latent(z.detach(), latent.labels)), float(losses[-1].total)
        return best, losses


def test_a_later_method_fits_without_touching_the_step() -> None:
    torch.manual_seed(0)
    teacher, student = make_teacher(), models.wide_resnet(10, 1)
    generator = Generator(12, teacher.input_size, 8)
    search_loss = {
        "batchnorm": lambda b: batchnorm_prior(b.teacher.statistics),
        "one_hot": lambda b: one_hot(b.teacher.logits, b.labels),
        "adversary": lambda b: -forward_kl(b.student.logits, b.teacher.logits),
    }
    student_loss = {"kl": lambda b: forward_kl(b.student.logits, b.teacher.logits, temperature=20)}
    matching = FastLike(
        teacher,
        student,
        generator,
        Updates(4, torch.optim.Adam(generator.parameters()), search_loss),
        Updates(5, torch.optim.SGD(student.parameters(), lr=0.01), student_loss),
        latent=12,
        rng=torch.Generator().manual_seed(0),
        batch_size=16,
        memory=Bank(3, torch.Generator().manual_seed(0)),
        statistics=True,
        student_in_search="eval",
    )
    first = matching.step()
    for _ in range(4):
        last = matching.step()
    assert matching.memory.images.shape == (3, 16, 3, 16, 16)
    assert last.student[-1].total < first.student[0].total
    assert isinstance(matching.teach(matching.draw()).teacher, Observation)
    matching.close()


def test_hooks_are_gone_after_close() -> None:
    teacher, student = make_teacher(), models.wide_resnet(10, 1)
    matching, _ = make_matching("zskt", teacher, student)
    matching.close()
    for module in (*teacher.modules(), *student.modules()):
        assert not module._forward_hooks
        assert not module._forward_pre_hooks

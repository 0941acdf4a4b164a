"""Adversarial belief matching: zero-shot knowledge transfer (Micaelli & Storkey, NeurIPS 2019), Algorithm 1.

The paper's lines and ours:

    z ~ N(0, I)                                                sample_latent
    nG times:  phi   <- phi   + eta d/d phi   D(T(x) || S(x))  generator_step, with x = G(z; phi)
    nS times:  theta <- theta - eta d/d theta L(T(x), S(x))    student_step
    decay eta                                                  Updates.rate

A step is one outer iteration: nG generator updates, then nS student updates. Everything that differs between methods
comes in as an object or a function: losses, optimisers, learning rates, which pseudo batches the student sees. Methods
that search differently (pixels, latents, several generators) override `search`.

N batch, K classes, Z latent, (N, C, H, W) images in the teacher's normalised space. BatchNorm modes, where train means
batch statistics and moving averages, eval the averages kept:

    phase                                   teacher   student               generator
    generator_step                          eval      `student_in_search`   train
    images for the student (draw)           eval      -                     `generator_for_student`
    student_step                            eval      train                 -

ZSKT trains in both configurable places: the student's running statistics, which it is judged with, see every batch.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from zskt.method.replay import Memory, PseudoBatch, Same
from zskt.networks.classifier import Classifier
from zskt.networks.observe import Observation, Observer

Mode = Literal["train", "eval"]


@dataclass(frozen=True)
class Latent:
    """What the generator starts from: z (N, Z) and, where a method draws them, labels (N,)."""

    z: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True)
class Beliefs:
    """What both networks say about one batch of pseudo images: all that a loss term may look at."""

    images: Tensor  # (N, C, H, W)
    labels: Tensor | None  # (N,)
    teacher: Observation
    student: Observation


Term = Callable[[Beliefs], Tensor]
"""One weighted term of a loss: beliefs -> scalar ()."""


@dataclass
class Updates:
    """How one of the two players is updated: so many times a step, with this optimiser, towards this loss."""

    count: int
    optimizer: torch.optim.Optimizer
    loss: Mapping[str, Term]
    clip: float | None = None
    """largest gradient norm, over all parameters together"""
    rate: Callable[[int], float] | None = None
    """learning rate at the player's t-th update; without it the optimiser's own stays"""
    done: int = 0

    def __post_init__(self) -> None:
        self.parameters: list[Tensor] = [p for group in self.optimizer.param_groups for p in group["params"]]


@dataclass(frozen=True)
class Losses:
    """The loss of one update and its weighted terms; scalars () without graph."""

    total: Tensor
    terms: dict[str, Tensor]


@dataclass(frozen=True)
class StepLosses:
    """All losses of one step, and what both networks said at the last student update."""

    generator: list[Losses]
    student: list[Losses]
    teacher_logits: Tensor  # (N, K)
    student_logits: Tensor  # (N, K)


class BeliefMatching:
    """One teacher, one student, one generator; `step()` is one outer iteration of Algorithm 1."""

    def __init__(
        self,
        teacher: Classifier,
        student: nn.Module,
        generator: nn.Module,
        generator_updates: Updates,
        student_updates: Updates,
        *,
        latent: int,
        rng: torch.Generator,
        batch_size: int = 128,
        memory: Memory | None = None,
        stages: tuple[Sequence[str], Sequence[str]] = ((), ()),
        statistics: bool = False,
        student_in_search: Mode = "train",
        generator_for_student: Mode = "train",
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`latent` is Z; `rng` draws the latents, on the generator's device.

        `stages` names the teacher's and the student's stage outputs that terms look at; `statistics` records the
        teacher's BatchNorm input statistics during the search. Both are taken by hooks: `close` removes them.
        """
        self.generator = generator
        self.generator_updates, self.student_updates = generator_updates, student_updates
        self.latent = latent
        self.rng = rng
        self.batch_size = batch_size
        self.memory = Same() if memory is None else memory
        self.student_in_search, self.generator_for_student = student_in_search, generator_for_student
        self.autocast = autocast
        self.teacher = Observer(teacher.module, stages[0], statistics=statistics)
        self.student = Observer(student, stages[1])

    def step(self) -> StepLosses:
        """One outer iteration. Returns tensors only: nothing here waits for the device."""
        student_losses: list[Losses] = []
        images, generator_losses = self.search(self.sample_latent())
        for batch in self.memory.batches(images, self.student_updates.count, self.draw, self.teach):
            losses, student_logits = self.student_step(batch)
            student_losses.append(losses)
        return StepLosses(generator_losses, student_losses, batch.teacher.logits, student_logits)

    def sample_latent(self) -> Latent:
        like = next(self.generator.parameters())
        size = (self.batch_size, self.latent)
        return Latent(torch.randn(size, generator=self.rng, dtype=like.dtype, device=like.device))  # (N, Z)

    def search(self, latent: Latent) -> tuple[Tensor | None, list[Losses]]:
        """Move the pseudo images to where student and teacher disagree; returns them if the memory wants them."""
        losses = [self.generator_step(latent) for _ in range(self.generator_updates.count)]
        return self.draw(latent) if self.memory.needs_images else None, losses

    def generator_step(self, latent: Latent, updates: Updates | None = None) -> Losses:
        """One update of the generator, with gradients through both networks and into `updates`' parameters only."""
        self.generator.train()
        self.student.module.train(self.student_in_search == "train")
        with self.autocast():
            images = self.generator(latent.z)  # (N, C, H, W)
            beliefs = Beliefs(images, latent.labels, self.teacher(images), self.student(images))
        return self._update(updates or self.generator_updates, beliefs)

    @torch.no_grad()
    def draw(self, latent: Latent | None = None) -> Tensor:
        """Images (N, C, H, W) of a latent, by default a fresh one, without graph."""
        self.generator.train(self.generator_for_student == "train")
        with self.autocast():
            images: Tensor = self.generator((latent or self.sample_latent()).z)
        return images

    @torch.no_grad()
    def teach(self, images: Tensor) -> PseudoBatch:
        """What the teacher says about images (N, C, H, W), without graph."""
        with self.autocast():
            return PseudoBatch(images, self.teacher(images))

    def student_step(self, batch: PseudoBatch) -> tuple[Losses, Tensor]:
        """One update of the student towards the teacher; its logits (N, K) from before the update."""
        self.student.module.train()
        with self.autocast():
            beliefs = Beliefs(batch.images, None, batch.teacher, self.student(batch.images))
        return self._update(self.student_updates, beliefs), beliefs.student.logits.detach()

    def _update(self, updates: Updates, beliefs: Beliefs) -> Losses:
        terms = {name: term(beliefs) for name, term in updates.loss.items()}
        total = torch.stack(list(terms.values())).sum()
        if updates.rate is not None:
            for group in updates.optimizer.param_groups:
                group["lr"] = updates.rate(updates.done)
        updates.optimizer.zero_grad()
        torch.autograd.backward(total, inputs=updates.parameters)  # nobody else's gradients are touched
        if updates.clip is not None:
            nn.utils.clip_grad_norm_(updates.parameters, updates.clip)
        updates.optimizer.step()
        updates.done += 1
        return Losses(total.detach(), {name: value.detach() for name, value in terms.items()})

    def close(self) -> None:
        """Take the hooks off teacher and student."""
        for observer in (self.teacher, self.student):
            observer.close()

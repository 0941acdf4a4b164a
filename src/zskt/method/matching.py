"""Adversarial belief matching: zero-shot knowledge transfer (Micaelli & Storkey, NeurIPS 2019), Algorithm 1.

The paper's lines and ours:

    z ~ N(0, I)                                                sample_latent
    nG times:  phi   <- phi   + eta d/d phi   D(T(x) || S(x))  generator_step, with x = G(z; phi)
    nS times:  theta <- theta - eta d/d theta L(T(x), S(x))    student_step
    decay eta                                                  Updates.rate

A step is one outer iteration: nG generator updates, then nS student updates. Everything that differs between recipes
comes in as an object or a function: losses, optimisers, learning rates, which pseudo batches the student sees.

N batch, K classes, Z latent, (N, C, H, W) images in the teacher's normalised space. BatchNorm modes, where train means
batch statistics and moving averages, eval the averages kept:

    phase                                   teacher   student                   generator
    generator_step                          eval      `student_for_generator`   train
    images for the student (draw)           eval      -                         `generator_for_student`
    student_step                            eval      train                     -

ZSKT trains in both configurable places: the student's running statistics, which it is judged with, see every batch.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zskt.method.generator import pseudo_images
from zskt.method.replay import Replay, Same
from zskt.method.updates import Batch, Beliefs, Losses, Updates, by_name
from zskt.networks import ranks
from zskt.networks.classifier import Classifier
from zskt.networks.observe import Observer
from zskt.runtime import restore_generator

Mode = Literal["train", "eval"]


@dataclass(frozen=True)
class Latent:
    """What the generator starts from: z (N, Z) and, where a method draws them, labels (N,)."""

    z: Tensor
    labels: Tensor | None = None


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
        steps: int,
        batch_size: int = 128,
        replay: Replay | None = None,
        stages: tuple[Sequence[str], Sequence[str]] = ((), ()),
        statistics: bool = False,
        student_for_generator: Mode = "train",
        generator_for_student: Mode = "train",
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`latent` is Z; `rng` draws the latents, on the generator's device; `steps` is the length of a whole run.

        `stages` names the teacher's and the student's stage outputs that terms look at; `statistics` records the
        teacher's BatchNorm input statistics during generator updates. Both are taken by hooks: `close` removes them.
        """
        self.student, self.generator = student, generator
        self.generator_updates, self.student_updates = generator_updates, student_updates
        self.latent = latent
        self.rng = rng
        self.steps = steps
        self.batch_size = batch_size
        self.replay = Same() if replay is None else replay
        self.student_for_generator, self.generator_for_student = student_for_generator, generator_for_student
        self.autocast = autocast
        self.ask_teacher = Observer(teacher.module, stages[0], statistics=statistics)
        self.ask_student = Observer(student, stages[1])

    def step(self) -> dict[str, Tensor]:
        """One outer iteration; the losses of its updates by name. Nothing here waits for the device."""
        newest, generator_losses = self.update_generator(self.sample_latent())
        batches = self.replay.batches(newest, self.student_updates.count, self.draw, self.ask)
        student_losses = [self.student_step(batch) for batch in batches]
        return by_name("generator", generator_losses) | by_name("student", student_losses)

    def sample_latent(self) -> Latent:
        like = next(self.generator.parameters())
        size = (self.batch_size, self.latent)
        z = torch.randn(size, generator=self.rng, dtype=like.dtype, device=like.device)  # (N, Z)
        return Latent(ranks.own(z))

    def update_generator(self, latent: Latent) -> tuple[Batch | None, list[Losses]]:
        """Move the pseudo images to where student and teacher disagree; returns them if the replay wants them."""
        losses = [self.generator_step(latent) for _ in range(self.generator_updates.count)]
        return self.draw(latent) if self.replay.needs_images else None, losses

    def generator_step(self, latent: Latent) -> Losses:
        """One update of the generator, with gradients through both networks and into the generator only."""
        self.generator.train()
        self.student.train(self.student_for_generator == "train")
        with self.autocast():
            images = self.generator(latent.z)  # (N, C, H, W)
            beliefs = Beliefs(images, latent.labels, self.ask_teacher(images), self.ask_student(images))
        return self.generator_updates.update(beliefs)

    @torch.no_grad()
    def draw(self, latent: Latent | None = None) -> Batch:
        """Images (N, C, H, W) of a latent, by default a fresh one, without graph."""
        latent = latent or self.sample_latent()
        self.generator.train(self.generator_for_student == "train")
        with self.autocast():
            return Batch(self.generator(latent.z), latent.labels)

    @torch.no_grad()
    def ask(self, batch: Batch) -> Batch:
        """The batch with what the teacher says of its images, without graph."""
        with self.autocast():
            return replace(batch, teacher=self.ask_teacher(batch.images))

    def student_step(self, batch: Batch) -> Losses:
        """One update of the student towards the teacher."""
        assert batch.teacher is not None
        self.student.train()
        with self.autocast():
            beliefs = Beliefs(batch.images, batch.labels, batch.teacher, self.ask_student(batch.images))
        return self.student_updates.update(beliefs)

    def sample(self, n: int, seed: int) -> Tensor:
        """Pseudo images (n, C, H, W) of latents that follow from the seed; nothing is changed by asking."""
        return pseudo_images(self.generator, self.latent, n, seed)

    def modules(self) -> dict[str, nn.Module]:
        return {"student": self.student, "generator": self.generator}

    def updates(self) -> dict[str, Updates]:
        return {"generator": self.generator_updates, "student": self.student_updates}

    def optimisers(self) -> dict[str, torch.optim.Optimizer]:
        return {"student": self.student_updates.optimizer, "generator": self.generator_updates.optimizer}

    def state_dict(self) -> dict[str, Tensor]:
        done = torch.tensor([self.generator_updates.done, self.student_updates.done])
        replay = {f"replay.{name}": tensor for name, tensor in self.replay.state_dict().items()}
        return {"done": done, "latents": self.rng.get_state(), **replay}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.generator_updates.done, self.student_updates.done = state["done"].tolist()
        restore_generator(self.rng, state["latents"])
        replay = {name.removeprefix("replay."): t for name, t in state.items() if name.startswith("replay.")}
        self.replay.load_state_dict(replay)

    def close(self) -> None:
        """Take the hooks off teacher and student."""
        self.ask_teacher.close()
        self.ask_student.close()

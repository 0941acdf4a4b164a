"""Rounds of synthesis: a generator and its latents are optimised together until the teacher recognises the images.

N batch, K classes, Z latent, (N, C, H, W) images in the teacher's normalised space.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zskt.method.updates import Batch, Beliefs, Losses, Updates
from zskt.method.views import Augmentation, jitter
from zskt.networks.observe import ChannelStatistics, Observation, Observer
from zskt.runtime import restore_generator


class MovingStatistics:
    """BatchNorm input statistics averaged over updates; the gradient is that of the current batch's share.

    With momentum m: m x (average so far) + (1 - m) x (this batch). Source: Fast (Fang et al. 2022), m = .9.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.averages: list[Tensor] = []  # (2, C) per layer: mean, variance

    def __call__(self, observation: Observation) -> Observation:
        """The observation with averaged statistics; the averages move on."""
        if not self.momentum:
            return observation
        now = [torch.stack([layer.mean, layer.variance]) for layer in observation.statistics]  # (2, C) each
        if self.averages:
            m = self.momentum
            now = [m * before + (1 - m) * new for before, new in zip(self.averages, now, strict=True)]
        self.averages = [average.detach() for average in now]
        statistics = [
            ChannelStatistics(average[0], average[1], layer.running_mean, layer.running_variance)
            for average, layer in zip(now, observation.statistics, strict=True)
        ]
        return replace(observation, statistics=statistics)


class Synthesis:
    """Makes a batch of images a round, in `updates.count` updates of the generator and of the round's latents.

    A round begins with new latents, new target classes and a fresh optimiser state; of all its batches, the one with
    the lowest loss survives. Source: CMI (Fang et al. 2021), Fast (Fang et al. 2022).
    """

    def __init__(
        self,
        generator: nn.Module,
        latents: Tensor,
        updates: Updates,
        *,
        classes: int,
        ask_teacher: Observer,
        ask_student: Observer,
        rng: torch.Generator,
        momentum: float = 0.0,
        augmentation: Augmentation,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`latents` (N, Z), on the `rng`'s device, is optimised by `updates` together with the generator."""
        self.generator, self.latents, self.updates = generator, latents, updates
        self.classes = classes
        self.ask_teacher, self.ask_student = ask_teacher, ask_student
        self.rng = rng
        self.statistics = MovingStatistics(momentum)
        self.augmentation = augmentation
        self.autocast = autocast
        self.labels = torch.zeros(len(latents), dtype=torch.int64, device=latents.device)  # (N,)
        self.best = torch.full((), torch.inf, device=latents.device)
        self.images: Tensor | None = None  # (N, C, H, W), those of the best loss

    def update(self) -> tuple[Losses, Batch | None]:
        """One update, and the images of the round if it was the last of one."""
        if self.updates.done % self.updates.count == 0:
            self.begin()
        self.generator.train()
        self.ask_student.module.eval()
        with self.autocast():
            images = self.generator(self.latents)  # (N, C, H, W)
            seen = jitter(images, self.augmentation, self.rng)
            teacher = self.statistics(self.ask_teacher(seen))
            beliefs = Beliefs(seen, self.labels, teacher, self.ask_student(seen))
        losses = self.updates.update(beliefs)
        self.keep(images.detach(), losses.total)
        ended = self.updates.done % self.updates.count == 0
        return losses, self.end() if ended else None

    def begin(self) -> None:
        """New latents and classes, as many of each class as can be."""
        n, device = len(self.latents), self.latents.device
        with torch.no_grad():
            self.latents.normal_(generator=self.rng)
        first = torch.randint(self.classes, (1,), generator=self.rng, device=device)
        order = torch.randperm(n, generator=self.rng, device=device)  # (N,)
        self.labels = (order + first) % self.classes
        self.updates.optimizer.state.clear()
        self.best.fill_(torch.inf)
        self.images = None

    def keep(self, images: Tensor, loss: Tensor) -> None:
        """Remember the images if their loss is the lowest of the round, without waiting for the device."""
        better = loss < self.best
        self.best = torch.where(better, loss, self.best)
        self.images = images if self.images is None else torch.where(better, images, self.images)

    def end(self) -> Batch:
        assert self.images is not None
        return Batch(self.images, self.labels)

    def state_dict(self) -> dict[str, Tensor]:
        state = {
            "latents": self.latents.detach(),
            "labels": self.labels,
            "best": self.best,
            "done": torch.tensor(self.updates.done),
            "rng": self.rng.get_state(),
        }
        if self.images is not None:
            state["images"] = self.images
        return state | {f"average.{index}": average for index, average in enumerate(self.statistics.averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.latents.copy_(state["latents"])
        device = self.latents.device
        self.labels, self.best = state["labels"].to(device), state["best"].to(device)
        self.images = state["images"].to(device) if "images" in state else None
        averages = [name for name in state if name.startswith("average.")]
        self.statistics.averages = [state[f"average.{index}"].to(device) for index in range(len(averages))]
        self.updates.done = int(state["done"])
        restore_generator(self.rng, state["rng"])

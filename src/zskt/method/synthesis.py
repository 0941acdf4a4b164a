"""Rounds of synthesis: a generator and its latents are optimised together until the teacher recognises the images.

N batch, K classes, Z latent, (N, C, H, W) images in the teacher's normalised space.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from zskt.method.terms import ADVERSARIES, teacher_terms
from zskt.method.updates import Batch, Beliefs, Losses, Updates
from zskt.method.views import Augmentation, jitter
from zskt.networks import ranks
from zskt.networks.observe import ChannelStatistics, Observation, Observer
from zskt.runtime import restore_generator


class MovingStatistics:
    """BatchNorm input statistics averaged over rounds.

    With momentum m: m x (average over earlier rounds) + (1 - m) x (this batch); the average then moves to what the last
    batch of a round gave. Source: Fast (Fang et al. 2022), m = .9.
    """

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.averages: list[Tensor] = []  # (2, C) per layer: mean, variance
        self.latest: list[Tensor] = []

    def __call__(self, observation: Observation) -> Observation:
        """The observation with averaged statistics, whose gradient is that of this batch's share."""
        if not self.momentum:
            return observation
        now = [torch.stack([layer.mean, layer.variance]) for layer in observation.statistics]  # (2, C) each
        if self.averages:
            m = self.momentum
            now = [m * before + (1 - m) * new for before, new in zip(self.averages, now, strict=True)]
        self.latest = [average.detach() for average in now]
        statistics = [
            ChannelStatistics(average[0], average[1], layer.running_mean, layer.running_variance)
            for average, layer in zip(now, observation.statistics, strict=True)
        ]
        return replace(observation, statistics=statistics)

    def end_round(self) -> None:
        self.averages = self.latest


class MetaGenerator:
    """First-order meta-learning of a generator's initial parameters over rounds.

    A round begins with them and changes a copy; its gradients are added up for one step of Adam. Source: Fast (Fang et
    al. 2022), after FOMAML (Finn et al. 2017).
    """

    def __init__(self, generator: nn.Module, optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
        self.copies = list(generator.parameters())
        self.parameters = [parameter.detach().clone().requires_grad_() for parameter in self.copies]
        self.optimizer = optimizer(self.parameters)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]

    def add_gradients(self) -> None:
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            assert copy.grad is not None
            parameter.grad = copy.grad.clone() if parameter.grad is None else parameter.grad.add_(copy.grad)

    def end_round(self, gentler: float = 1.0) -> None:
        """The step, with a learning rate that is `gentler` by this factor."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = gentler * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.load(self.parameters)

    @torch.no_grad()
    def load(self, parameters: Sequence[Tensor]) -> None:
        """Continue from other initial parameters."""
        for parameter, copy, new in zip(self.parameters, self.copies, parameters, strict=True):
            parameter.copy_(new)
            copy.copy_(new)


class Synthesis:
    """Makes a batch of images a round, in `updates.count` updates of the generator and of the round's latents.

    A round begins with new latents, new target classes and a fresh optimiser state; of all its batches, the one with
    the lowest loss is kept. Source: CMI (Fang et al. 2021), Fast (Fang et al. 2022).
    """

    def __init__(
        self,
        generator: nn.Module,
        latents: Tensor,
        updates: Updates,
        *,
        size: tuple[int, int, int],
        classes: int,
        ask_teacher: Observer,
        ask_student: Observer,
        rng: torch.Generator,
        augmentation: Augmentation,
        warmup: int = 0,
        momentum: float = 0.0,
        meta: MetaGenerator | None = None,
        reset: Sequence[nn.Module] = (),
        reset_every: int = 0,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`latents` (N, Z), on the `rng`'s device, is optimised by `updates` together with the generator.

        The first `warmup` updates leave the student out, if there are other terms: it has learnt nothing yet that an
        adversary could look for. Source: Fast (Fang et al. 2022).
        The modules `reset` are initialised anew every `reset_every` rounds; `size` is (C, H, W).
        """
        self.generator, self.latents, self.updates = generator, latents, updates
        self.classes = classes
        self.ask_teacher, self.ask_student = ask_teacher, ask_student
        self.rng = rng
        self.augmentation = augmentation
        self.warmup, self.loss = warmup, updates.loss
        self.warmup_loss = teacher_terms(updates.loss) or updates.loss
        self.statistics = MovingStatistics(momentum)
        self.meta = meta
        self.reset, self.reset_every = reset, reset_every
        self.autocast = autocast
        n, device = len(latents), latents.device
        self.labels = torch.zeros(n, dtype=torch.int64, device=device)  # (N,)
        # Those of the lowest loss; of several ranks each has its share, while all have all latents and labels.
        self.images = ranks.own(torch.zeros(n, *size, dtype=latents.dtype, device=device))
        self.lowest = torch.full((), torch.inf, device=device)

    def update(self) -> tuple[Losses, Batch | None]:
        """One update, and the images of the round if it was the last of one."""
        if self.updates.done % self.updates.count == 0:
            self.begin_round()
        self.updates.loss = self.warmup_loss if self.updates.done < self.warmup else self.loss
        self.generator.train()
        self.ask_student.module.eval()
        with self.autocast():
            images = self.generator(ranks.own(self.latents))  # (N, C, H, W)
            seen = jitter(images, self.augmentation, self.rng)
            teacher = self.statistics(self.ask_teacher(seen))
            labels = ranks.own(self.labels)  # (N,)
            record: Batch | Beliefs = Batch(seen, labels, teacher)
            if any(name in ADVERSARIES for name in self.updates.loss):
                record = Beliefs(seen, labels, teacher, self.ask_student(seen))
        losses = self.updates.update(record)
        self.keep(images.detach(), losses.total)
        if self.meta is not None:
            self.meta.add_gradients()
        if self.updates.done % self.updates.count:
            return losses, None
        self.statistics.end_round()
        if self.meta is not None:
            self.meta.end_round(self.updates.gentler)
        return losses, Batch(self.images, labels)

    @torch.no_grad()
    def begin_round(self) -> None:
        """New latents and target classes, as many images of each as can be."""
        number = self.updates.done // self.updates.count
        if self.reset and number and number % self.reset_every == 0:
            initialise(*self.reset)
            if self.meta is not None:
                self.meta.load(self.meta.copies)
        self.latents.normal_(generator=self.rng)
        first = torch.randint(self.classes, (1,), generator=self.rng, device=self.rng.device)
        order = torch.randperm(len(self.latents), generator=self.rng, device=self.rng.device)  # (N,)
        self.labels = (order + first) % self.classes
        self.updates.optimizer.state.clear()
        self.lowest.fill_(torch.inf)

    def keep(self, images: Tensor, loss: Tensor) -> None:
        """Remember the images if their loss is the lowest of the round, without waiting for the device."""
        lower = loss < self.lowest
        self.lowest = torch.where(lower, loss, self.lowest)
        self.images = torch.where(lower, images.to(self.images.dtype), self.images)

    def optimisers(self) -> dict[str, torch.optim.Optimizer]:
        meta = {} if self.meta is None else {"meta": self.meta.optimizer}
        return {"generator": self.updates.optimizer, **meta}

    def state_dict(self) -> dict[str, Tensor]:
        meta = [] if self.meta is None else self.meta.parameters
        return {
            "latents": self.latents.detach(),
            "labels": self.labels,
            "images": ranks.whole(self.images),
            "lowest": self.lowest,
            "done": torch.tensor(self.updates.done),
            "rng": self.rng.get_state(),
            **{f"average.{index}": average for index, average in enumerate(self.statistics.averages)},
            **{f"meta.{index}": parameter.detach() for index, parameter in enumerate(meta)},
            **{f"gradient.{index}": p.grad for index, p in enumerate(meta) if p.grad is not None},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        def listed(prefix: str) -> list[Tensor]:
            names = [name for name in state if name.startswith(f"{prefix}.")]
            return [state[f"{prefix}.{index}"].to(self.latents.device) for index in range(len(names))]

        for name in ("latents", "labels", "lowest"):
            getattr(self, name).copy_(state[name])
        self.images.copy_(ranks.own(state["images"]))
        self.statistics.averages = listed("average")
        if self.meta is not None:
            for parameter, saved in zip(self.meta.parameters, listed("meta"), strict=True):
                parameter.copy_(saved)
                parameter.grad = None
            for parameter, gradient in zip(self.meta.parameters, listed("gradient"), strict=False):
                parameter.grad = torch.zeros_like(parameter).copy_(gradient)
        self.updates.done = int(state["done"])
        restore_generator(self.rng, state["rng"])


def initialise(*modules: nn.Module) -> None:
    """New parameters and statistics, as the layers' own constructors draw them."""
    for layer in (layer for module in modules for layer in module.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.BatchNorm2d):
            layer.reset_parameters()

"""The one way in which anything is updated: losses of a record, gradients into named parameters, clipping, a step.

N batch, K classes, (N, C, H, W) images in the teacher's normalised space.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zskt.errors import ZsktError
from zskt.networks.observe import Observation


@dataclass(frozen=True)
class Batch:
    """Pseudo images on their way from the generator through the replay buffer to the student; no graph."""

    images: Tensor  # (N, C, H, W)
    labels: Tensor | None = None  # (N,) what they were made to be, where a method says so
    teacher: Observation | None = None  # what the teacher says of them, once it was asked


@dataclass(frozen=True)
class Beliefs:
    """What both networks say about one batch of pseudo images: all that a loss term may look at."""

    images: Tensor  # (N, C, H, W)
    labels: Tensor | None  # (N,)
    teacher: Observation
    student: Observation


Term = Callable[[Any], Tensor]
"""One weighted term of a loss: a record, such as `Beliefs`, -> scalar ()."""


@dataclass(frozen=True)
class Losses:
    """The loss of one update and its weighted terms; scalars () without graph."""

    total: Tensor
    terms: dict[str, Tensor]


@dataclass
class Updates:
    """How one network is updated: so many times a step, with this optimiser, towards this loss."""

    count: int
    optimizer: torch.optim.Optimizer
    loss: Mapping[str, Term]
    clip: float | None = None
    """largest gradient norm, over all parameters together"""
    rate: Callable[[int], float] | None = None
    """learning rate at the t-th update; without it the optimiser's own stays"""
    done: int = 0

    def __post_init__(self) -> None:
        self.parameters: list[Tensor] = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.fused = all(group.get("fused") for group in self.optimizer.param_groups)
        self.healthy = torch.ones((), dtype=torch.bool, device=self.parameters[0].device)

    def update(self, record: Any) -> Losses:
        """One update towards less of the loss of `record`.

        An update whose loss or gradient is NaN or infinite is skipped, on the device, so that nobody waits for it; from
        then on every loss is reported as NaN, which whoever reads one will notice.
        """
        terms = {name: term(record) for name, term in self.loss.items()}
        total = torch.stack(list(terms.values())).sum()
        if self.rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(self.done)
        self.optimizer.zero_grad()
        torch.autograd.backward(total, inputs=self.parameters)  # nobody else's gradients are touched
        if self.done == 0 and all(p.grad is None for p in self.parameters):
            raise ZsktError("the loss does not depend on the network; make it of the one that is trained")
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        self.healthy.logical_and_(total.detach().isfinite() & norm.isfinite())
        self._step()
        self.done += 1
        return Losses(
            torch.where(self.healthy, total.detach(), math.nan), {name: term.detach() for name, term in terms.items()}
        )

    def _step(self) -> None:
        if self.fused:
            self.optimizer.found_inf = (~self.healthy).float()  # type: ignore[attr-defined]  # 1: the kernel skips
            self.optimizer.step()
        elif self.healthy:  # other optimisers cannot skip by themselves: here the host waits for the device
            self.optimizer.step()


def by_name(name: str, updates: Sequence[Losses]) -> dict[str, Tensor]:
    """The losses of several updates (U,) under `name`, and the terms of the last one, (), under `name.term`."""
    last = {f"{name}.{term}": value for term, value in updates[-1].terms.items()}
    return {name: torch.stack([losses.total for losses in updates]), **last}

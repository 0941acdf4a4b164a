"""Updates of a network: loss terms, gradients of its parameters only, clipping, an optimiser step.

N batch, K classes, (N, C, H, W) images in the teacher's normalised space.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zskt.errors import ZsktError
from zskt.networks import ranks
from zskt.networks.observe import Observation


@dataclass(frozen=True)
class Batch:
    """Pseudo images on their way from the generator through the replay buffer to the student; no graph."""

    images: Tensor  # (N, C, H, W)
    labels: Tensor | None = None  # (N,) intended classes, for methods that have them
    teacher: Observation | None = None  # the teacher's outputs, once computed


@dataclass(frozen=True)
class Beliefs:
    """Both networks' outputs for a batch of pseudo images: the input of loss terms."""

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
    """How a network is updated: `count` times a step, with this optimiser, on this loss."""

    count: int
    optimizer: torch.optim.Optimizer
    loss: Mapping[str, Term]
    clip: float | None = None
    """largest gradient norm, over all parameters together"""
    rate: Callable[[int], float] | None = None
    """learning rate at update t; by default the optimiser's own"""
    gentler: float = 1.0
    """factor of the learning rate"""
    done: int = 0

    def __post_init__(self) -> None:
        self.parameters: list[Tensor] = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.fused = all(group.get("fused") for group in self.optimizer.param_groups)
        self.healthy = torch.ones((), dtype=torch.bool, device=self.parameters[0].device)
        self.seen: Tensor | None = None
        """terms and gradient norms (T + P,) of the newest update, or of the first that was not finite"""

    def update(self, record: Any) -> Losses:
        """One update on the loss of `record`.

        An update with a NaN or infinite loss or gradient is skipped on the device, without synchronisation; from then
        on every loss is reported as NaN.
        """
        terms = {name: term(record) for name, term in self.loss.items()}
        total = torch.stack(list(terms.values())).sum()
        if self.rate is not None or self.gentler != 1:
            for group, own in zip(self.optimizer.param_groups, self.rates, strict=True):
                rate = own if self.rate is None else self.rate(self.done)
                group["lr"] = rate if self.gentler == 1 else self.gentler * rate
        self.optimizer.zero_grad()
        torch.autograd.backward(total, inputs=self.parameters)  # leaves all other gradients alone
        if self.done == 0 and all(p.grad is None for p in self.parameters):
            raise ZsktError("the loss does not depend on the network that is trained; compute it from that network")
        # As `nn.utils.get_total_norm`, which does not say which parameter's gradient it was.
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        total, terms = total.detach(), {name: term.detach() for name, term in terms.items()}
        ranks.average_([*gradients, total, *terms.values()])
        norms = [norm.to(total.dtype) for norm in torch._foreach_norm(gradients)]  # () each
        norm = torch.linalg.vector_norm(torch.stack(norms))
        self._remember(torch.stack([*terms.values(), *norms]))
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
        self.healthy.logical_and_(total.isfinite() & norm.isfinite())
        self._step()
        self.done += 1
        return Losses(torch.where(self.healthy, total, math.nan), terms)

    def _remember(self, numbers: Tensor) -> None:
        """Keep numbers (T + P,) until an update was skipped; on the device, and in place, as a recorded step needs."""
        if self.seen is None or self.seen.shape != numbers.shape:
            self.seen = numbers
        else:
            self.seen.copy_(torch.where(self.healthy, numbers, self.seen))

    def first_bad(self, names: Mapping[int, str]) -> str:
        """What was not finite in the first update that was skipped, in words; empty if none was.

        `names` are those of parameters, by their `id`. This waits for the device.
        """
        if self.seen is None or bool(self.healthy):
            return ""
        words = [f"the loss term {name}" for name in self.loss]
        reached = [p for p in self.parameters if p.grad is not None]
        words += [f"the gradient of {names.get(id(p), 'a parameter')}" for p in reached]
        finite = self.seen.isfinite().tolist()
        return words[finite.index(False)] if False in finite else "the norm of all gradients"

    def _step(self) -> None:
        if self.fused:
            self.optimizer.found_inf = (~self.healthy).float()  # type: ignore[attr-defined]  # 1: the kernel skips
            self.optimizer.step()
        elif self.healthy:  # other optimisers cannot skip: the host waits for the device
            self.optimizer.step()


def by_name(name: str, updates: Sequence[Losses]) -> dict[str, Tensor]:
    """The losses of several updates (U,) under `name`, and the terms of the last one, (), under `name.term`."""
    last = {f"{name}.{term}": value for term, value in updates[-1].terms.items()}
    return {name: torch.stack([losses.total for losses in updates]), **last}

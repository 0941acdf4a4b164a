"""What a run repeats: the seam between methods and everything around them.

A method is any object of this shape; `examples/own_method.py` is a whole one. Nothing else of it is known to the run,
which logs, checkpoints, resumes, samples and reports it.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zskt.method.config import Config
from zskt.networks.classifier import Classifier


class Repeatable(Protocol):
    """Whatever is repeated until it is done: a method, or the training of a network on images."""

    steps: int
    """how often `step` is called in a whole run"""

    def step(self) -> Mapping[str, Tensor]:
        """One step; its losses by name, each () or one per update (U,), without graph.

        Random numbers come from torch's global generator, which the run seeds, saves and restores, or from generators
        of its own, whose states belong into `state_dict`.
        """
        ...

    def modules(self) -> Mapping[str, nn.Module]:
        """The networks that a step changes, by name."""
        ...

    def optimisers(self) -> Mapping[str, torch.optim.Optimizer]:
        """Their optimisers, by name. Learning rates are no state: they follow from the step."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """Whatever else the rest of the run depends on: counters, a replay buffer, random generators."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        ...

    def close(self) -> None:
        """Take hooks off the networks; `sample` works on."""
        ...


class Method(Repeatable, Protocol):
    """A way to train a student without data."""

    student: nn.Module

    def sample(self, n: int, seed: int) -> Tensor:
        """Pseudo images (n, C, H, W) such as the student learns from, in the teacher's normalised space.

        The same ones for the same seed and state; nothing is changed by asking.
        """
        ...


Make = Callable[[Classifier, nn.Module, Config], Method]
"""A function that builds a method from a frozen teacher, a student on the same device, and the config of the run."""

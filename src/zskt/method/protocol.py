"""The interface between methods and the runs that log, checkpoint, resume, sample and report them.

`examples/own_method.py` is a complete method.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from zskt.errors import ZsktError
from zskt.method.config import Config
from zskt.method.updates import Updates
from zskt.networks.classifier import Classifier


class Repeatable(Protocol):
    """What a run repeats: a method, or the training of a network on images."""

    steps: int
    """calls of `step` in a complete run"""

    def step(self) -> Mapping[str, Tensor]:
        """One step; its losses by name, each () or one per update (U,), without graph.

        Draw random numbers from torch's global generator, which the run seeds, saves and restores, or from other
        generators whose state is in `state_dict`.
        """
        ...

    def modules(self) -> Mapping[str, nn.Module]:
        """The networks that a step changes, by name; a method's student as "student"."""
        ...

    def optimisers(self) -> Mapping[str, torch.optim.Optimizer]:
        """Their optimisers, by name. Learning rates are not state: they follow from the step."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]:
        """All other state: counters, replay buffer, random generators."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; its tensors arrive on the CPU."""
        ...

    def close(self) -> None:
        """Remove hooks from the networks; `sample` must still work."""
        ...


class Method(Repeatable, Protocol):
    """A way to train a student without data."""

    student: nn.Module

    def sample(self, n: int, seed: int) -> Tensor:
        """Pseudo images (n, C, H, W) as the student sees them, in the teacher's normalised space.

        Equal for equal seed and state; changes no state.
        """
        ...


@runtime_checkable
class Growing(Protocol):
    """A method with state that is only ever added to, such as a bank: a run saves what is new, beside checkpoints."""

    def rows(self, first: int) -> Mapping[str, Tensor]:
        """What was added from row `first` on, by name, each (M, ...) with the same M."""
        ...

    def load_rows(self, parts: Iterable[Mapping[str, Tensor]]) -> None:
        """Replace everything by what `rows(0)` returned, in consecutive parts."""
        ...


@runtime_checkable
class Watched(Protocol):
    """A method whose updates know what was not finite first."""

    def updates(self) -> Mapping[str, Updates]:
        """The updates of its networks, by name."""
        ...


Make = Callable[[Classifier, nn.Module, Config], Method]
"""A function that builds a method from a frozen teacher, a student on the same device, and the config of the run."""

RESERVED = {"method", "rng", "state"}
"""names of other things in a run's files, which no network may have"""


def check_method(method: Any, student: nn.Module, name: str) -> Method:
    """What the function `name` built for `student`; raises ZsktError unless it is a whole method that trains it."""
    members = [
        m for kind in (Repeatable, Method) for m in (*vars(kind), *kind.__annotations__) if not m.startswith("_")
    ]
    if missing := [member for member in members if not hasattr(method, member)]:
        found = f"{type(method).__name__} without {', '.join(missing)}"
        raise ZsktError(f"expected a method from {name}, found {found}; return an object with all of zskt.Method")
    checked: Method = method
    modules = checked.modules()
    if not (isinstance(modules, Mapping) and modules.get("student") is checked.student is student):
        raise ZsktError(
            f'expected the given student as `student` and as "student" in modules() of the method from {name}, found '
            "something else; train the given one in place"
        )
    if taken := RESERVED & modules.keys():
        raise ZsktError(f"{taken.pop()!r} in modules() of the method from {name} is reserved; name it otherwise")
    return checked

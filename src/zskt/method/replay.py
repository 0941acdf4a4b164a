"""Which pseudo batches the student sees after a search: the same one again, fresh ones, or a bank of past ones.

N batch, K classes, C x H x W images.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zskt.networks.observe import Observation


@dataclass(frozen=True)
class PseudoBatch:
    """Pseudo images (N, C, H, W) and what the teacher says of them; no gradients anywhere."""

    images: Tensor
    teacher: Observation


Draw = Callable[[], Tensor]
"""A new batch of images (N, C, H, W) from a fresh latent, without graph."""
Teach = Callable[[Tensor], PseudoBatch]
"""Ask the teacher about images, without graph."""


class Memory(Protocol):
    """Yields `updates` pseudo batches after each search."""

    needs_images: bool
    """Whether `batches` wants the images that the search ended with."""

    @property
    def steady(self) -> bool:
        """Whether its tensors have the shapes and places that they will keep."""
        ...

    def batches(self, images: Tensor | None, updates: int, draw: Draw, teach: Teach) -> Iterator[PseudoBatch]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class _Stateless:
    steady = True

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


class Same(_Stateless):
    """The searched batch itself, every time: the paper's Algorithm 1. The teacher is asked once."""

    needs_images = True

    def batches(self, images: Tensor | None, updates: int, draw: Draw, teach: Teach) -> Iterator[PseudoBatch]:
        assert images is not None
        batch = teach(images)
        for _ in range(updates):
            yield batch


class Fresh(_Stateless):
    """A batch of its own for every update, none from the generator's latent (Ferles et al., ReScience 2020)."""

    needs_images = False

    def batches(self, images: Tensor | None, updates: int, draw: Draw, teach: Teach) -> Iterator[PseudoBatch]:
        for _ in range(updates):
            yield teach(draw())


class Bank:
    """A ring of the last `capacity` searched batches; every update sees N images drawn from all of them.

    Kept in bfloat16: the generator's output is unbounded, so float16 or bytes would clip it.
    """

    needs_images = True

    def __init__(self, capacity: int, rng: torch.Generator) -> None:
        """`capacity` in pseudo batches; `rng` on the images' device, its state is the caller's to save."""
        self.capacity = capacity
        self.rng = rng
        self.images: Tensor | None = None  # (filled, N, C, H, W) bfloat16
        self.slot = torch.zeros(1, dtype=torch.int64, device=rng.device)  # where the next batch goes

    @property
    def steady(self) -> bool:
        return self.images is not None and len(self.images) == self.capacity

    def batches(self, images: Tensor | None, updates: int, draw: Draw, teach: Teach) -> Iterator[PseudoBatch]:
        assert images is not None
        stored = images.to(torch.bfloat16).unsqueeze(0)  # (1, N, C, H, W)
        if self.images is None:
            self.images = stored
        elif len(self.images) < self.capacity:
            self.images = torch.cat([self.images, stored])
        else:
            self.images.index_copy_(0, self.slot, stored)
        self.slot.add_(1).remainder_(self.capacity)
        everything = self.images.flatten(0, 1)  # (filled N, C, H, W)
        for _ in range(updates):
            size = (len(images),)
            chosen = torch.randint(len(everything), size, generator=self.rng, device=everything.device)  # (N,)
            yield teach(everything[chosen].to(images.dtype))

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.images is None else {"images": self.images, "slot": self.slot}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.images = state["images"].to(self.rng.device)
            self.slot.copy_(state["slot"])

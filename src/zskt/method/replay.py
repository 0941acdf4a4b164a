"""Which pseudo batches the student sees after the generator updates: the newest one, fresh ones, or past ones.

N batch, K classes, C x H x W images.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from zskt.method.updates import Batch
from zskt.networks import ranks
from zskt.runtime import restore_generator

Draw = Callable[[], Batch]
"""A new batch of images (N, C, H, W) from a fresh latent, without graph."""
Ask = Callable[[Batch], Batch]
"""The batch with the teacher's outputs for it, without graph."""


class Replay(Protocol):
    """Yields `updates` pseudo batches after the generator updates."""

    needs_images: bool
    """Whether `batches` needs the images of the last generator update."""

    @property
    def steady(self) -> bool:
        """Whether its tensors have their final shapes and addresses."""
        ...

    def batches(self, newest: Batch | None, updates: int, draw: Draw, ask: Ask) -> Iterator[Batch]: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class _Stateless:
    steady = True

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        pass


class Same(_Stateless):
    """The newest batch for all updates, as in the paper's Algorithm 1; one teacher forward."""

    needs_images = True

    def batches(self, newest: Batch | None, updates: int, draw: Draw, ask: Ask) -> Iterator[Batch]:
        assert newest is not None
        batch = ask(newest)
        for _ in range(updates):
            yield batch


class Fresh(_Stateless):
    """A new batch for each update, from new latents (Ferles et al., ReScience 2020)."""

    needs_images = False

    def batches(self, newest: Batch | None, updates: int, draw: Draw, ask: Ask) -> Iterator[Batch]:
        for _ in range(updates):
            yield ask(draw())


class ReplayBuffer:
    """A ring of the last `capacity` batches; each update sees N images and labels drawn from all of them.

    Stored in bfloat16: the generator's output is unbounded, so float16 or bytes would clip it.
    """

    needs_images = True

    def __init__(self, capacity: int, rng: torch.Generator) -> None:
        """`capacity` in pseudo batches; `rng` on the images' device."""
        self.capacity = capacity
        self.rng = rng
        self.images: Tensor | None = None  # (filled, N, C, H, W) bfloat16
        self.labels: Tensor | None = None  # (filled, N)
        self.slot = torch.zeros(1, dtype=torch.int64, device=rng.device)  # where the next batch goes

    @property
    def steady(self) -> bool:
        return self.images is not None and len(self.images) == self.capacity

    def batches(self, newest: Batch | None, updates: int, draw: Draw, ask: Ask) -> Iterator[Batch]:
        assert newest is not None
        self.images = self._kept(self.images, newest.images.to(torch.bfloat16))
        self.labels = None if newest.labels is None else self._kept(self.labels, newest.labels)
        self.slot.add_(1).remainder_(self.capacity)
        images = self.images.flatten(0, 1)  # (filled N, C, H, W)
        n = ranks.size() * len(newest.images)
        for _ in range(updates):
            chosen = torch.randint(ranks.size() * len(images), (n,), generator=self.rng, device=images.device)  # (N,)
            slot, number = chosen.div(n, rounding_mode="floor"), chosen % n
            owner = number.div(len(newest.images), rounding_mode="floor")
            place = slot * len(newest.images) + number % len(newest.images)  # (N,)
            labels = None if self.labels is None else ranks.fetch(self.labels.flatten(), owner, place)
            yield ask(Batch(ranks.fetch(images, owner, place).to(newest.images.dtype), labels))

    def _kept(self, ring: Tensor | None, newest: Tensor) -> Tensor:
        """The ring (filled, N, ...) after adding the newest entry (N, ...)."""
        if ring is None:
            return newest.unsqueeze(0)
        if len(ring) < self.capacity:
            return torch.cat([ring, newest.unsqueeze(0)])
        return ring.index_copy_(0, self.slot, newest.unsqueeze(0))

    def state_dict(self) -> dict[str, Tensor]:
        rings = {"images": self.images, "labels": self.labels}
        state = {name: ranks.whole(ring, dim=1) for name, ring in rings.items() if ring is not None}
        return state | {"slot": self.slot, "rng": self.rng.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restore_generator(self.rng, state["rng"])
        self.slot.copy_(state["slot"])
        self.images = self.labels = None
        if "images" in state:
            self.images = _own(state["images"]).to(self.rng.device)
        if "labels" in state:
            self.labels = _own(state["labels"]).to(self.rng.device)


def _own(ring: Tensor) -> Tensor:
    """This rank's share of each batch in a ring (filled, N, ...)."""
    return ranks.own(ring.transpose(0, 1)).transpose(0, 1).contiguous()

"""Distillation from a bank: rounds of synthesis fill it with images, and the student learns from all of them.

The teacher is asked once for each view of an image, a fixed crop and flip, not at every update of the student: the
forwards of the teacher are most of the work where a method asks again for each new crop.

    warm-up steps     one synthesis update each, so that the bank is not empty
    all other steps   the synthesis updates that are due, then
                      theta <- theta - eta d/d theta L(T(x), S(x)), with x views from the bank

N batch, M images in the bank, V views of each, K classes, images C x H x W.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from zskt.errors import ZsktError
from zskt.method.synthesis import Synthesis
from zskt.method.updates import Batch, Beliefs, Losses, Updates, by_name
from zskt.method.views import Augmentation, random_views, view
from zskt.networks.classifier import Classifier
from zskt.networks.observe import Observation, Observer
from zskt.runtime import restore_generator


def bank_images(network: Classifier, stored: Tensor, n: int, seed: int) -> Tensor:
    """Images (n, C, H, W) drawn by the seed from those stored (M, C, H, W), in the network's normalised space."""
    chosen = torch.randint(len(stored), (n,), generator=torch.Generator().manual_seed(seed))  # (n,)
    return _normalised(network, stored[chosen.to(stored.device)])


def _normalised(network: Classifier, stored: Tensor) -> Tensor:
    return network.normalise(stored) if stored.dtype == torch.uint8 else stored


class Bank:
    """Images (M, C, H, W), by default as bytes, with V views (M, V, 3) and the teacher's logits for them (M, V, K).

    It only grows, up to its capacity: a run saves what is new. Without views the teacher is asked at every update.
    """

    def __init__(
        self,
        teacher: Classifier,
        ask: Callable[[Tensor], Observation],
        capacity: int,
        *,
        views: int,
        augmentation: Augmentation,
        rng: torch.Generator,
        as_bytes: bool = True,
        logits: torch.dtype = torch.float16,
    ) -> None:
        """`ask` gives the teacher's outputs for normalised images; `rng` draws views and batches, on its device."""
        self.teacher, self.ask, self.rng, self.augmentation = teacher, ask, rng, augmentation
        self.count = self.own = 0  # images, and how many of them, the first ones, are the user's
        kind = torch.uint8 if as_bytes else next(teacher.parameters()).dtype
        self.images = torch.empty(capacity, *teacher.input_size, dtype=kind, device=rng.device)
        self.views = torch.empty(capacity, views, 3, dtype=torch.uint8, device=rng.device)
        self.logits = torch.empty(capacity, views, teacher.num_classes, dtype=logits, device=rng.device)

    @torch.no_grad()
    def add(self, images: Tensor) -> None:
        """Store normalised images (N, C, H, W) and ask the teacher about each of their views."""
        new = slice(self.count, self.count + len(images))
        self.images[new] = self._stored(images)
        for number in range(self.views.shape[1]):
            self.views[new, number] = self._draw(len(images))
            self.logits[new, number] = self.ask(self._shown(new, self.views[new, number])).logits
        if not bool(self.logits[new].isfinite().all()):
            raise ZsktError(
                f"the teacher's logits for pseudo images overflow {self.logits.dtype}; use machine.precision=fp32"
            )
        self.count = new.stop

    def reserve(self, own: int) -> None:
        """Make room for `own` images that the user has, to be added before any other; the bank is still empty."""
        assert self.count == 0
        self.own = own
        self.images, self.views, self.logits = (
            rows.new_empty(own + len(rows), *rows.shape[1:]) for rows in (self.images, self.views, self.logits)
        )

    @torch.no_grad()
    def draw(self, n: int) -> Batch:
        """A batch of views (n, C, H, W), drawn from all images, with the teacher's outputs for them."""
        images = torch.randint(self.count, (n,), generator=self.rng, device=self.rng.device)  # (N,)
        if self.views.shape[1] == 0:
            shown = self._shown(images, self._draw(n))
            return Batch(shown, teacher=self.ask(shown))
        numbers = torch.randint(self.views.shape[1], (n,), generator=self.rng, device=self.rng.device)  # (N,)
        shown = self._shown(images, self.views[images, numbers])
        return Batch(shown, teacher=Observation(self.logits[images, numbers].to(shown.dtype)))

    def sample(self, n: int, seed: int) -> Tensor:
        """Stored pseudo images (n, C, H, W), normalised, as the seed draws them."""
        return bank_images(self.teacher, self.images[self.own : self.count], n, seed)

    def _draw(self, n: int) -> Tensor:
        return random_views(n, self.augmentation, self.rng)

    def _shown(self, chosen: slice | Tensor, views: Tensor) -> Tensor:
        """Views (N, 3) of the chosen images, normalised."""
        return _normalised(self.teacher, view(self.images[chosen], views, self.augmentation.random_crop))

    def _stored(self, images: Tensor) -> Tensor:
        if self.images.dtype != torch.uint8:
            return images
        return (self.teacher.denormalise(images.float()) * 255).round().to(torch.uint8)

    def rows(self) -> dict[str, Tensor]:
        """Everything stored so far, each (M, ...)."""
        stored = {"images": self.images, "views": self.views, "logits": self.logits}
        return {name: tensor[: self.count] for name, tensor in stored.items()}

    def load_rows(self, parts: Iterable[Mapping[str, Tensor]]) -> None:
        """Replace everything by saved rows."""
        self.count = 0
        for rows in parts:
            new = slice(self.count, self.count + len(rows["images"]))
            self.images[new], self.views[new], self.logits[new] = rows["images"], rows["views"], rows["logits"]
            self.count = new.stop


class BankDistillation:
    """One teacher, one student, one generator and the bank of what it made."""

    def __init__(
        self,
        student: nn.Module,
        synthesis: Synthesis,
        bank: Bank,
        student_updates: Updates,
        *,
        ask_student: Observer,
        steps: int,
        batch_size: int,
        rounds: int,
        warmup: int,
        until: float,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Of `rounds`, `warmup` come first and the others by the fraction `until` of the student's updates."""
        self.student, self.synthesis, self.bank, self.student_updates = student, synthesis, bank, student_updates
        self.ask_student = ask_student
        self.steps, self.batch_size = steps, batch_size
        self.warmup, self.total = (n * synthesis.updates.count for n in (warmup, rounds))  # synthesis updates
        self.until = until * (steps - self.warmup)  # student updates
        self.autocast = autocast
        self.generator_losses: dict[str, Tensor] = {}

    def step(self) -> dict[str, Tensor]:
        """The synthesis updates that are due, one during warm-up, then one update of the student."""
        if self.synthesis.updates.done < self.warmup:
            return self.synthesise()
        while self.synthesis.updates.done < self.due():
            self.synthesise()
        student_losses = self.student_step(self.bank.draw(self.batch_size))
        making = self.synthesis.updates.done < self.total
        return (self.generator_losses if making else {}) | by_name("student", [student_losses])

    def due(self) -> int:
        """Synthesis updates to be done before the next update of the student."""
        share = min(1.0, (self.student_updates.done + 1) / self.until)
        return self.warmup + math.floor((self.total - self.warmup) * share)

    def synthesise(self) -> dict[str, Tensor]:
        """One synthesis update; the last one of a round adds its images to the bank."""
        losses, made = self.synthesis.update()
        if made is not None:
            self.bank.add(made.images)
        self.generator_losses = by_name("generator", [losses])
        return self.generator_losses

    def student_step(self, batch: Batch) -> Losses:
        """One update of the student towards the teacher."""
        assert batch.teacher is not None
        self.student.train()
        with self.autocast():
            beliefs = Beliefs(batch.images, batch.labels, batch.teacher, self.ask_student(batch.images))
        return self.student_updates.update(beliefs)

    def sample(self, n: int, seed: int) -> Tensor:
        """Images (n, C, H, W) from the bank or, while it is empty, from the round that goes on."""
        if self.bank.count > self.bank.own:
            return self.bank.sample(n, seed)
        return bank_images(self.bank.teacher, self.synthesis.images, n, seed)

    def modules(self) -> dict[str, nn.Module]:
        return {"student": self.student, "generator": self.synthesis.generator}

    def updates(self) -> dict[str, Updates]:
        return {"generator": self.synthesis.updates, "student": self.student_updates}

    def optimisers(self) -> dict[str, torch.optim.Optimizer]:
        return {"student": self.student_updates.optimizer, **self.synthesis.optimisers()}

    def rows(self) -> dict[str, Tensor]:
        return self.bank.rows()

    def load_rows(self, parts: Iterable[Mapping[str, Tensor]]) -> None:
        self.bank.load_rows(parts)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "done": torch.tensor(self.student_updates.done),
            "draws": self.bank.rng.get_state(),
            **{f"synthesis.{name}": tensor for name, tensor in self.synthesis.state_dict().items()},
            **{f"losses.{name}": tensor for name, tensor in self.generator_losses.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        def under(prefix: str) -> dict[str, Any]:
            return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}

        self.student_updates.done = int(state["done"])
        restore_generator(self.bank.rng, state["draws"])
        self.synthesis.load_state_dict(under("synthesis."))
        self.generator_losses = under("losses.")

    def close(self) -> None:
        """Take the hooks off teacher and student."""
        self.synthesis.ask_teacher.close()
        self.ask_student.close()

"""Distillation from a bank: rounds of synthesis fill it with images, and the student learns from all of them.

The teacher is asked once for each view of an image, a fixed crop and flip, not at every update of the student: where a
method asks again for each new crop, that is up to three quarters of its work (Fast).

    warm-up steps     one synthesis update each, so that the bank is not empty
    all other steps   the synthesis updates that are due, then
                      theta <- theta - eta d/d theta L(T(x), S(x)), with x views from the bank

N batch, M images in the bank, V views of each, K classes, images C x H x W.
"""

import itertools
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
from zskt.networks import ranks
from zskt.networks.classifier import Classifier
from zskt.networks.observe import Observation, Observer
from zskt.runtime import restore_generator


def bank_images(network: Classifier, stored: Tensor, n: int, seed: int) -> Tensor:
    """Images (n, C, H, W) drawn by the seed from those stored (M, C, H, W), in the network's normalised space."""
    return _normalised(network, stored[drawn(len(stored), n, seed).to(stored.device)])


def drawn(count: int, n: int, seed: int) -> Tensor:
    """Numbers (n,) of rows, of `count`, that the seed draws."""
    return torch.randint(count, (n,), generator=torch.Generator().manual_seed(seed))


def _normalised(network: Classifier, stored: Tensor) -> Tensor:
    return network.normalise(stored) if stored.dtype == torch.uint8 else stored


class Bank:
    """Images (M, C, H, W), by default as bytes, with V views (M, V, 3) and the teacher's logits for them (M, V, K).

    It only grows, up to its capacity: a run saves what is new. Without views the teacher is asked at every update.
    Of several ranks each holds the rows that it made or read; a batch is drawn from those of all.
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
        self.owner = torch.empty(capacity, dtype=torch.int64, device=rng.device)  # (M,) the rank that has row m
        self.place = torch.empty(capacity, dtype=torch.int64, device=rng.device)  # (M,) and where
        self.counts = [0] * ranks.size()  # rows of each rank
        self.own = 0  # rows, the first ones, that are the user's
        if ranks.size() > 1:
            capacity = capacity // ranks.size() + 1
        kind = torch.uint8 if as_bytes else next(teacher.parameters()).dtype
        self.images = torch.empty(capacity, *teacher.input_size, dtype=kind, device=rng.device)
        self.views = torch.empty(capacity, views, 3, dtype=torch.uint8, device=rng.device)
        self.logits = torch.empty(capacity, views, teacher.num_classes, dtype=logits, device=rng.device)

    @torch.no_grad()
    def add(self, images: Tensor) -> None:
        """Store normalised images (N, C, H, W), each rank its share, and ask the teacher about each view of them."""
        n = ranks.size() * len(images)
        self._store(images, n, *self._place(n))

    @torch.no_grad()
    def add_own(self, images: Tensor) -> None:
        """The same for images of the user's that all ranks have."""
        mine, new = self._place(len(images))
        self._store(images[mine], len(images), mine, new)

    def _store(self, images: Tensor, n: int, mine: slice, new: slice) -> None:
        """Put images, those `mine` of n, where they go, with views drawn for all of them."""
        self.images[new] = self._stored(images)
        for number in range(self.views.shape[1]):
            self.views[new, number] = self._draw(n)[mine]
            if not len(images):  # a share of very few
                continue
            self.logits[new, number] = self.ask(self._shown(self.images[new], self.views[new, number])).logits
        if not bool(self.logits[new].isfinite().all()):
            raise ZsktError(
                f"the teacher's logits for pseudo images overflow {self.logits.dtype}, in which a bank stores them; "
                "use bank.views=0, which stores none"
            )

    @property
    def count(self) -> int:
        """Rows of all ranks."""
        return sum(self.counts)

    def _place(self, n: int) -> tuple[slice, slice]:
        """Room for n new rows, of which each rank gets the next share: which are this rank's, and where they go."""
        share, before = -(-n // ranks.size()), list(self.counts)
        new, number = slice(self.count, self.count + n), torch.arange(n, device=self.owner.device)  # (N,)
        owner = number.div(share, rounding_mode="floor")
        self.owner[new] = owner
        self.place[new] = torch.tensor(before, device=owner.device)[owner] + number % share
        first = [min(n, share * rank) for rank in range(ranks.size() + 1)]
        self.counts = [count + b - a for count, (a, b) in zip(before, itertools.pairwise(first), strict=True)]
        mine = ranks.rank()
        return slice(first[mine], first[mine + 1]), slice(before[mine], self.counts[mine])

    def reserve(self, own: int) -> None:
        """Make room for `own` images that the user has, to be added before any other; the bank is still empty."""
        assert self.count == 0
        self.own = own
        share = -(-own // ranks.size())
        self.images, self.views, self.logits = (
            rows.new_empty(share + len(rows), *rows.shape[1:]) for rows in (self.images, self.views, self.logits)
        )
        self.owner, self.place = (rows.new_empty(own + len(rows)) for rows in (self.owner, self.place))

    @torch.no_grad()
    def draw(self, n: int) -> Batch:
        """A batch of views (n, C, H, W), drawn from all images, with the teacher's outputs for them.

        Of several ranks each gets its share of the batch, wherever its images lie.
        """
        chosen = torch.randint(self.count, (n,), generator=self.rng, device=self.rng.device)  # (N,)
        images = self._fetch(self.images, chosen)  # (N, C, H, W)
        if self.views.shape[1] == 0:
            shown = self._shown(images, ranks.own(self._draw(n)))
            return Batch(shown, teacher=self.ask(shown))
        number = torch.randint(self.views.shape[1], (n,), generator=self.rng, device=self.rng.device)  # (N,)
        shown = self._shown(images, self._fetch(self.views, chosen, number))
        return Batch(shown, teacher=Observation(self._fetch(self.logits, chosen, number).to(shown.dtype)))

    def sample(self, n: int, seed: int) -> Tensor:
        """Stored pseudo images (n, C, H, W), normalised, as the seed draws them; a rank alone knows but its own."""
        if ranks.size() == 1:
            first = int((self.owner[: self.own] == ranks.rank()).sum())
            return bank_images(self.teacher, self.images[first : self.counts[ranks.rank()]], n, seed)
        chosen = self.own + drawn(self.count - self.own, n, seed).to(self.images.device)
        return _normalised(self.teacher, self._fetch_whole(self.images, chosen))

    def _draw(self, n: int) -> Tensor:
        return random_views(n, self.augmentation, self.rng)

    def _fetch(self, rows: Tensor, chosen: Tensor, view: Tensor | None = None) -> Tensor:
        """This rank's share of the chosen rows (N,), or of one `view` (N,) of each."""
        owner, place = self.owner[chosen], self.place[chosen]
        if view is not None:
            rows, place = rows.flatten(0, 1), place * rows.shape[1] + view
        return ranks.fetch(rows, owner, place)

    def _fetch_whole(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """The chosen rows (N,), on all ranks."""
        padding = chosen[-1:].expand(-len(chosen) % ranks.size())  # for equal shares
        return ranks.whole(self._fetch(rows, torch.cat([chosen, padding])))[: len(chosen)]

    def _shown(self, images: Tensor, views: Tensor) -> Tensor:
        """Views (N, 3) of stored images (N, C, H, W), normalised."""
        return _normalised(self.teacher, view(images, views, self.augmentation.random_crop))

    def _stored(self, images: Tensor) -> Tensor:
        if self.images.dtype != torch.uint8:
            return images
        return (self.teacher.denormalise(images.float()) * 255).round().to(torch.uint8)

    def rows(self, first: int) -> dict[str, Tensor]:
        """What is stored from row `first` on, each (M - first, ...); ranks have to ask for it together."""
        stored = {"images": self.images, "views": self.views, "logits": self.logits}
        count = self.count - first
        if ranks.size() == 1 or not count:
            return {name: tensor[first : first + count] for name, tensor in stored.items()}
        chosen = torch.arange(first, self.count, device=self.owner.device)
        return {name: self._fetch_whole(tensor, chosen) for name, tensor in stored.items()}

    def load_rows(self, parts: Iterable[Mapping[str, Tensor]]) -> None:
        """Replace everything by saved rows."""
        self.counts = [0] * ranks.size()
        for rows in parts:
            mine, new = self._place(len(rows["images"]))
            self.images[new], self.views[new] = rows["images"][mine], rows["views"][mine]
            self.logits[new] = rows["logits"][mine]


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

    @property
    def progress(self) -> float:
        """The share of the student's updates that are done."""
        return self.student_updates.done / (self.steps - self.warmup)

    @property
    def has_images(self) -> bool:
        """Whether a round has been finished, so that `sample` shows more than one that goes on."""
        return self.bank.count > self.bank.own

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
        if self.has_images:
            return self.bank.sample(n, seed)
        return bank_images(self.bank.teacher, ranks.whole(self.synthesis.images), n, seed)

    def modules(self) -> dict[str, nn.Module]:
        return {"student": self.student, "generator": self.synthesis.generator}

    def updates(self) -> dict[str, Updates]:
        return {"generator": self.synthesis.updates, "student": self.student_updates}

    def optimisers(self) -> dict[str, torch.optim.Optimizer]:
        return {"student": self.student_updates.optimizer, **self.synthesis.optimisers()}

    def rows(self, first: int) -> dict[str, Tensor]:
        return self.bank.rows(first)

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

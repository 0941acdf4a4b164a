"""Jobs that train, distil and compare networks on one image set, for several seeds."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from zskt.data.images import KNOWN, Dataset
from zskt.evaluate.fidelity import compare
from zskt.evaluate.measures import measure
from zskt.evaluate.transitions import Paths, average_curves, transition_curves
from zskt.files import remove, write_json
from zskt.method.budget import expected_seconds, probe
from zskt.method.build import arrange
from zskt.method.recipe import plan
from zskt.networks import models
from zskt.networks.checks import as_teacher
from zskt.networks.classifier import Classifier
from zskt.networks.folder import load_network, save_teacher
from zskt.paper.baselines import cross_entropy, few_shot, kd_at, teach, train_student
from zskt.paper.jobs import Job, Show
from zskt.paper.training import Training, digest
from zskt.run.checkpoint import exists, owning
from zskt.run.distill import distill
from zskt.run.lifecycle import Event
from zskt.runtime import pick_device, seeded

PATHS = 128  # paths followed together in transition curves


@dataclass(frozen=True)
class Budget:
    """How much work goes into each job."""

    updates: int
    """updates of a network trained on images"""
    steps: int
    """pseudo batches of a run without data"""
    images: int = 1_000
    """images followed in transition curves [ZSKT]"""
    learning_rate: float | None = None
    """learning rate of training on images; by default 0.1 [ZSKT], and 0.01 for LeNets, which diverge at 0.1"""
    fine_tuning: float = 0.1
    """fraction of these updates and this rate for fine-tuning; ours, as the paper only says "naive" """

    def scaled(self, scale: float) -> "Budget":
        shrunk = {name: max(1, round(getattr(self, name) * scale)) for name in ("updates", "steps", "images")}
        return dataclasses.replace(self, **shrunk)


@dataclass(frozen=True)
class Experiment:
    """A teacher and a student network on one image set, all jobs in one folder. Its methods return the jobs."""

    root: Path
    train: Dataset
    test: Dataset
    model: str  # architecture of the teacher
    student: str
    budget: Budget
    given: Classifier | None = None  # a teacher to use instead of training one
    device: str = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"

    @property
    def pair(self) -> str:
        return f"{'given' if self.given else self.model}-to-{self.student}"

    @functools.cached_property
    def data(self) -> str:
        """Identifies the images: a name, and digests, as all unknown sets have the same name."""
        return f"{self.train.name} {digest(*self.images(None))[:8]} {digest(*self.measuring)[:8]}"

    @property
    def measuring(self) -> tuple[Tensor, Tensor]:
        """Images (M, C, H, W) and labels (M,) for all measurements."""
        return self.test.images, self.test.labels

    def build(self, spec: str, seed: int) -> nn.Module:
        channels, height, width = self.test.images.shape[1:]
        with seeded(seed):
            return models.build(spec, len(self.test.class_names), (channels, height, width))

    def training(self, spec: str, seed: int, share: float = 1.0) -> Training:
        """The published schedule for a network; `share` of its updates and learning rate."""
        known = KNOWN.get(self.train.name)
        return Training(
            updates=max(1, round(share * self.budget.updates)),
            learning_rate=share * (self.budget.learning_rate or usual_rate(spec)),
            schedule="step",
            random_crop=min(self.train.images.shape[2:]) // 8,
            horizontal_flip=known is not None and known.horizontal_flip,
            seed=seed,
            device=self.device,
            precision=self.precision,
        )

    def images(self, per_class: int | None) -> tuple[Tensor, Tensor]:
        """All training images, or `per_class` of each class: the same for all seeds, nested."""
        if per_class is None:
            return self.train.images, self.train.labels
        chosen = few_shot(self.train.labels, per_class, num_classes=len(self.train.class_names))
        return self.train.images[chosen], self.train.labels[chosen]

    def teacher(self, seed: int) -> Job:
        """The given teacher, evaluated, or one trained on all images."""
        if self.given is None:
            return self.taught(self.model, seed)
        given = self.given

        def make(folder: Path, stop_after: str | None, show: Show) -> bool:
            save_teacher(folder, given, how="given", measured=measure(given, *self.measuring))
            return True

        metadata = {"fingerprint": given.fingerprint(), "data": self.data}
        return Job("given-teacher", metadata, 0, "networks", "measuring", lambda: lambda: None, make)

    def teachers(self, seeds: Sequence[int]) -> list[Job]:
        """One per seed; a given teacher counts once."""
        return [self.teacher(seed) for seed in (seeds if self.given is None else seeds[:1])]

    def taught(self, spec: str, seed: int, per_class: int | None = None) -> Job:
        """A network trained from scratch by cross-entropy: on all images, or on `per_class` of each class."""
        training = self.training(spec, seed)

        def make(folder: Path, stop_after: str | None, show: Show) -> bool:
            mean, std = normalisation(self.train)
            return teach(
                self.build(spec, seed),
                self.images(per_class),
                self.measuring,
                training,
                mean=mean,
                std=std,
                class_names=self.test.class_names,
                **going_on(folder, stop_after, show),
            ).finished

        return Job(
            f"{spec}-on-{amount(per_class)}-seed-{seed}",
            {**vars(training), "data": self.data},
            training.updates,
            "updates",
            f"cross-entropy, {spec}",
            lambda: self.try_training(spec, kd=False),
            make,
        )

    def distilled(self, seed: int, per_class: int | None, *, ce: bool = True) -> Job:
        """KD+AT on all images, or on `per_class` of each class; `ce`: with the labels' cross-entropy, as released."""
        name = f"kd-at{'' if ce else '-without-ce'}-{self.pair}-on-{amount(per_class)}-seed-{seed}"
        return self._trained(name, self.training(self.student, seed), per_class, self.teacher(seed), kd=True, ce=ce)

    def fine_tuned(self, seed: int, recipe: str, per_class: int) -> Job:
        """A zero-shot student fine-tuned with cross-entropy on `per_class` images of each class."""
        name = f"{recipe}-{self.pair}-fine-tuned-on-{amount(per_class)}-seed-{seed}"
        training = self.training(self.student, seed, self.budget.fine_tuning)
        return self._trained(name, training, per_class, self.teacher(seed), begun=self.zero_shot(seed, recipe))

    def _trained(
        self,
        name: str,
        training: Training,
        per_class: int | None,
        teacher: Job,
        *,
        begun: Job | None = None,
        kd: bool = False,
        ce: bool = True,
    ) -> Job:
        def make(folder: Path, stop_after: str | None, show: Show) -> bool:
            master = load_network(teacher.folder(self.root))
            if begun is None:
                module = self.build(self.student, training.seed)
            else:
                module = load_network(begun.folder(self.root)).module.requires_grad_()
            return train_student(
                module,
                master,
                self.images(per_class),
                self.measuring,
                training,
                objective=kd_at(master, module, cross_entropy=ce) if kd else None,
                **going_on(folder, stop_after, show),
            ).finished

        return Job(
            name,
            {**vars(training), "data": self.data, "ce": ce},
            training.updates,
            "updates",
            f"KD+AT, {self.pair}" if kd else f"cross-entropy, {self.student}",
            lambda: self.try_training(self.student, kd=kd),
            make,
            (teacher,) if begun is None else (teacher, begun),
        )

    def zero_shot(self, seed: int, recipe: str) -> Job:
        teacher, steps = self.teacher(seed), self.budget.steps
        settings = {"steps": steps, "seed": seed, "machine.device": self.device, "machine.precision": self.precision}

        def make(folder: Path, stop_after: str | None, show: Show) -> bool:
            return distill(
                load_network(teacher.folder(self.root)),
                self.build(self.student, seed),
                recipe,
                settings=settings,
                evaluate=self.measuring,
                **going_on(folder, stop_after, show),
            ).finished

        return Job(
            f"{recipe}-{self.pair}-seed-{seed}",
            {**settings, "recipe": recipe, "data": self.data},
            steps,
            "pseudo batches",
            f"{recipe}, {self.pair}",
            lambda: self.try_distilling(recipe, settings),
            make,
            (teacher,),
        )

    def belief(self, student: Job, seed: int) -> Job:
        """Transition curves of a student, the stepped network, and its teacher."""
        teacher, number, steps = self.teacher(seed), self.budget.images, 100
        units = -(-number * (len(self.test.class_names) - 1) // PATHS) * (steps - 1)

        def make(folder: Path, stop_after: str | None, show: Show) -> bool:
            where = pick_device(self.device)
            first, second = (load_network(job.folder(self.root)).to(where) for job in (student, teacher))
            found = compare(
                first,
                second,
                *self.measuring,
                Paths(images=number, steps=steps, seed=seed, batch_size=PATHS),
                progress=lambda done, total: show(units * done // total, units, ""),
            )
            write_json(folder / "belief.json", found.measured | {"curves": average_curves(found.transitions)})
            return True

        return Job(
            f"belief-of-{student.name}",
            {"images": number, "steps": steps, "data": self.data},
            units,
            f"steps of {PATHS} paths",
            f"transition curves, {self.pair}",
            self.try_following,
            make,
            (student, teacher),
        )

    def blank_teacher(self) -> Classifier:
        """An untrained teacher, as fast as the real one, for the estimate of the cost."""
        if self.given is not None:
            return copy.deepcopy(self.given).to(pick_device(self.device))
        mean, std = normalisation(self.train)
        size = self.train.images.shape[1:]
        teacher = Classifier(self.build(self.model, 0), input_size=size, mean=mean, std=std)
        return as_teacher(teacher, copied=False).to(pick_device(self.device))

    def try_training(self, spec: str, *, kd: bool) -> Callable[[], Any]:
        """One update on a batch of noise."""
        device = pick_device(self.device)
        module = self.build(spec, 0).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        objective = kd_at(self.blank_teacher(), module) if kd else cross_entropy(module)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        x = torch.randn(128, *self.train.images.shape[1:], device=device).to(memory_format=torch.channels_last)
        labels = torch.zeros(128, dtype=torch.long, device=device)

        def update() -> None:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                loss = objective(x, labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()

        return update

    def try_distilling(self, recipe: str, settings: Mapping[str, Any]) -> Callable[[], Any] | float:
        """One step between untrained networks; of a bank, whose steps differ, the seconds of the average one."""
        device = pick_device(self.device)
        teacher, student = self.blank_teacher(), self.build(self.student, 0).to(device)
        planned = plan(teacher, student, recipe, settings)
        config = planned.config
        if config.method == "bank":
            cost = planned.cost or probe(teacher, student, config, planned.make)
            return expected_seconds(config, cost) / config.steps
        arrange(teacher, config)
        arrange(student, config)
        return planned.make(teacher, student, config).step

    def try_following(self) -> Callable[[], Any]:
        """One gradient step of a batch of paths from noise."""
        device, teacher = pick_device(self.device), self.blank_teacher()
        student = teacher.like(self.build(self.student, 0)).to(device)
        images = torch.rand(-(-PATHS // (teacher.num_classes - 1)), *teacher.input_size)
        starts = torch.zeros(len(images), dtype=torch.long)
        return lambda: transition_curves(student, teacher, images, starts, Paths(steps=2, batch_size=2 * PATHS))


def going_on(folder: Path, stop_after: str | None, show: Show) -> dict[str, Any]:
    """Arguments of a training run in its job's folder: output, resume, time limit, progress."""

    def callback(event: Event) -> None:
        accuracy = (event.line or {}).get("accuracy")
        show(event.step, event.steps, "" if accuracy is None else f"test {100 * accuracy:.2f} %")

    return {"out": folder, "resume": started(folder), "stop_after": stop_after, "callbacks": [callback]}


def usual_rate(spec: str) -> float:
    """The paper's learning rate; LeNets have no BatchNorm, and 0.01 was chosen on held-out images (docs/log.md)."""
    return 0.01 if spec.startswith("lenet") else 0.1


def started(folder: Path) -> bool:
    """Whether a job has a checkpoint; a folder without one is removed."""
    if exists(folder / "checkpoint"):
        return True
    if folder.exists():
        with owning(folder):  # not in use
            remove(folder)
    return False


def amount(per_class: int | None) -> str:
    """The number of images per class, for job names."""
    return "all" if per_class is None else f"{per_class}-per-class"


def normalisation(train: Dataset) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std per channel, of pixels in [0, 1]: the known set's, else the training images' own."""
    known = KNOWN.get(train.name)
    if known is not None and tuple(train.images.shape[1:]) == known.size:
        return known.mean, known.std
    pixels = train.images[:: max(1, len(train.images) // 10_000)].float() / 255  # (M, C, H, W)
    mean, std = pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3))  # (C,), (C,)
    return [round(v, 4) for v in mean.tolist()], [round(v, 4) for v in std.tolist()]

"""Training of teachers and baseline students on labelled images.

SGD with Nesterov momentum on random crops and, where that keeps the class, horizontal flips. No label smoothing and no
mixing of images: both are reported to make worse teachers.

N batch, M images in total, K classes, C x H x W images.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zskt.errors import UsageError, ZsktError, unknown
from zskt.evaluate.measures import check_images, judge, predict
from zskt.files import remove
from zskt.method.schedule import Schedule, learning_rate
from zskt.method.updates import Updates
from zskt.networks import ranks
from zskt.networks.classifier import Classifier, count_parameters
from zskt.networks.folder import check_teacher_folder, save_network
from zskt.networks.observe import memory_format
from zskt.networks.synchronised import separate, synchronise
from zskt.run import checkpoint
from zskt.run.lifecycle import Callback, Lifecycle
from zskt.run.several import shapes
from zskt.runtime import arithmetic, parse_limit, pick_device, seeded, stream, versions
from zskt.settings import check_bounds

Images = tuple[Tensor, Tensor]  # uint8 images (M, C, H, W) and their labels (M,)

Objective = Callable[[Tensor, Tensor], Tensor]
"""The loss () of a batch: normalised images (N, C, H, W) and labels (N,); it calls the trained network itself."""

SCHEDULES = {"one_cycle": Schedule("one_cycle"), "step": Schedule("multistep", (0.3, 0.6, 0.8), factor=0.2)}
Precision = Literal["fp32", "bf16"]

ON_DEVICE = 2**31
"""Most bytes of training images kept on the device; copying each batch would make the host wait."""


@dataclass(frozen=True)
class Training:
    """How a network is trained on labelled images. Updates are counted, not epochs: fewer images, more epochs."""

    updates: int
    """optimiser updates [ZSKT scales the epochs so that these are constant over the images per class]"""
    batch_size: int = 128
    """images per update; all of them if there are fewer"""
    learning_rate: float = 0.1
    """highest learning rate [WRN: 0.1 for batch 128]"""
    schedule: Literal["one_cycle", "step"] = "one_cycle"
    """one_cycle: up over the first fifth, then down to 0; step: divided by 5 at 30, 60 and 80 % [WRN, ZSKT]"""
    weight_decay: float = 5e-4
    """L2 penalty on weights, not on biases and normalisation [WRN]"""
    random_crop: int = 4
    """pixels of padding around the image that random crops are taken from; 0 = none"""
    horizontal_flip: bool = False
    """whether half of the images are flipped left to right"""
    seed: int = 0
    """for the order of images and augmentation"""
    device: str = "auto"
    """a torch device; auto: cuda if available, else cpu"""
    precision: Precision = "fp32"
    """bf16: autocast; weights stay in fp32"""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            check_bounds(name, value)
        for name in ("updates", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} = {getattr(self, name)}: expected a positive number")
        if self.batch_size < 2:
            raise UsageError("batch_size = 1: expected at least 2, as BatchNorm needs")
        if self.random_crop < 0 or self.weight_decay < 0 or self.seed < 0:
            raise UsageError("random_crop, weight_decay and seed: expected 0 or more")
        for name, choices in (("schedule", SCHEDULES), ("precision", get_args(Precision))):
            if getattr(self, name) not in choices:
                raise unknown(name, str(getattr(self, name)), choices)


@dataclass
class TrainingResult:
    """The network as trained so far, with its normalisation, and what was measured at that last iterate."""

    network: Classifier = field(repr=False)
    measured: dict[str, float] = field(default_factory=dict)
    update: int = 0
    finished: bool = False
    warnings: list[str] = field(default_factory=list)


class Supervised:
    """Training on labelled images as a `Repeatable`: a step is one update."""

    def __init__(self, name: str, network: Classifier, train: Images, training: Training, objective: Objective) -> None:
        """`network`, on its device, is trained in place; `objective` calls its module itself."""
        self.name, self.network, self.train, self.training = name, network, train, training
        self.steps = training.updates
        self.device = network.mean.device
        layout = memory_format(network.module, network.input_size)
        network.module.to(memory_format=layout)  # type: ignore[call-overload]
        synchronise(network.module, name)

        def loss(batch: Images) -> Tensor:
            x = network.normalise(batch[0]).to(memory_format=layout)  # (N, C, H, W)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=training.precision == "bf16"):
                return objective(x, batch[1])

        optimizer = torch.optim.SGD(
            decayed(network.module, training.weight_decay), lr=1.0, momentum=0.9, nesterov=True, fused=True
        )
        rate = learning_rate(SCHEDULES[training.schedule], training.learning_rate, training.updates)
        self.updater = Updates(1, optimizer, {"loss": loss}, rate=rate)
        self.batches: Iterator[Images] | None = None

    def step(self) -> dict[str, Tensor]:
        if self.batches is None:
            self.batches = endless_batches(self.train, self.training, self.updater.done, self.device)
        self.network.module.train()
        return {self.name: self.updater.update(next(self.batches)).total}

    def modules(self) -> dict[str, nn.Module]:
        return {self.name: self.network.module}

    def updates(self) -> dict[str, Updates]:
        return {self.name: self.updater}

    def optimisers(self) -> dict[str, torch.optim.Optimizer]:
        return {self.name: self.updater.optimizer}

    def state_dict(self) -> dict[str, Tensor]:
        return {"done": torch.tensor(self.updater.done)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updater.done = int(state["done"])
        self.batches = None

    def close(self) -> None:
        self.network.module.eval().zero_grad()
        separate(self.network.module)


def fit(
    stem: Literal["teacher", "student"],
    module: nn.Module,
    like: Classifier,
    train: Images,
    test: Images,
    training: Training,
    objective: Objective,
    *,
    teacher: Classifier | None = None,
    metadata: Mapping[str, Any],
    out: str | Path | None = None,
    resume: bool = False,
    stop_after: str | int | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Train `module` in place on `train`, normalised as `like` does, to minimise `objective`; it ends in eval mode.

    Evaluated on `test` and, given a `teacher`, for agreement with it, after every twentieth of the updates; the last
    iterate is reported. With `out` a checkpoint is saved at every evaluation, `resume` continues from it (bit for bit
    on a CPU of the same kind with the same number of threads), and the finished network is written as
    `stem`.safetensors and `stem`.json. `stop_after` ("9m", or a number of updates) stops early. Raises ZsktError if
    images, labels, networks and folder do not fit together, or if the loss or the weights become NaN or infinite.
    """
    folder = Path(out) if out is not None else None
    begun = folder is not None and checkpoint.exists(folder / "checkpoint")
    if folder is not None and not (begun and resume) and ranks.is_main():  # killed after it had finished: goes on
        check_teacher_folder(folder)
    if (resume or stop_after) and folder is None:
        raise UsageError("resume and stop_after need a folder for the training: set out")
    if begun and not resume:
        raise ZsktError(f"{folder} holds an unfinished training run; continue it with --resume or choose another --out")
    if folder is not None and not begun and ranks.is_main():
        checkpoint.check_unused(folder)
    parse_limit(stop_after)
    device = pick_device(training.device)
    for images, labels in (train, test):
        check_images(like, images, labels)
    if training.random_crop >= min(like.input_size[1:]):
        raise UsageError(
            f"random_crop = {training.random_crop}: expected less than the image's {min(like.input_size[1:])} pixels"
        )
    updates_in(1, len(train[0]), training.batch_size)  # enough images?

    network = like.like(module).to(device)
    answers = None if teacher is None else predict(copy.deepcopy(teacher).to(device), test[0])  # (M, K)
    settings = dataclasses.asdict(training)
    machine = {name: settings.pop(name) for name in ("device", "precision")}

    def measure(step: int) -> dict[str, Any]:
        if not ranks.is_main():
            return {}
        with ranks.alone():
            return judge(predict(network, test[0]), test[1], answers)

    ranks.check_divides(batch_size=training.batch_size)
    ranks.check_device(training.device)
    given = dataclasses.asdict(training) | {"resume": resume, "stop_after": stop_after, "checkpoint": begun}
    given |= {"mean": like.mean.flatten().tolist(), "std": like.std.flatten().tolist()} | dict(metadata)
    facts = {name: str(value) for name, value in given.items()}
    ranks.check_same({**versions(), **facts, "network": shapes(module), "images": digest(*train)})
    ranks.copy_from_main(network.module)
    every = max(1, training.updates // 20)
    with (
        checkpoint.owning(folder if ranks.is_main() else None),
        arithmetic(),
        seeded(stream(training.seed, "augmentation"), device),
        closing(Supervised(stem, network, train, training, objective)) as repeated,
    ):
        life = Lifecycle(
            repeated,
            folder,
            log_every=every,
            evaluate_every=every,
            checkpoint_every=every,
            identity={
                "settings": settings,
                "normalisation": [like.mean.flatten().tolist(), like.std.flatten().tolist()],
                "data": digest(*train),
                "teacher": teacher and teacher.fingerprint(),
                "metadata": json.loads(json.dumps(dict(metadata))),
            },
            machine={"precision": machine["precision"]},
            evaluate=measure,
            advice="lower --learning-rate and start again",
        )
        if resume:
            life.restore()
        life.run(callbacks, stop_after)
        repeated.close()
        result = TrainingResult(network, measure(life.step), life.step, life.finished, life.warnings)
        if result.finished and folder is not None and ranks.is_main():
            how = {**settings, **machine, "images": len(train[0]), **metadata, "seconds": round(life.seconds, 1)}
            if teacher is not None:
                how["teacher_fingerprint"] = teacher.fingerprint()
                how["teacher_model"] = getattr(teacher.module, "spec", None)
                how["teacher_parameters"] = count_parameters(teacher.module)
            save_network(folder, stem, network, **how, measured=result.measured)
            remove(folder / "checkpoint")
    return result


def updates_in(epochs: int, images: int, batch_size: int) -> int:
    """Updates in `epochs` passes over `images` images; a last batch of one, which BatchNorm cannot use, is dropped."""
    if epochs < 1 or batch_size < 2:
        raise UsageError(f"epochs = {epochs}, batch_size = {batch_size}: expected at least 1 and at least 2")
    if images < 2:
        raise ZsktError(f"expected at least 2 training images, as BatchNorm needs, found {images}; give more")
    return epochs * (images // batch_size + (images % batch_size > 1))


def endless_batches(train: Images, training: Training, first: int, device: torch.device) -> Iterator[Images]:
    """Augmented batches (N, C, H, W) and labels (N,) on the device, one per update from `first` on.

    Each pass over the images has its own order, determined by the seed and its number, so that any update can be the
    first. Augmentation draws from torch's global random numbers. Of several ranks each gets its share; the last batch
    of a pass loses up to R - 1 images if they cannot share it equally.
    """
    in_pass = updates_in(1, len(train[0]), training.batch_size)
    images, labels = (tensor.to(device) if train[0].nbytes <= ON_DEVICE else tensor for tensor in train)
    for update in itertools.count(first):
        number, place = divmod(update, in_pass)
        if place == 0 or update == first:
            rng = torch.Generator().manual_seed(stream(training.seed, f"pass {number}"))
            order = torch.randperm(len(images), generator=rng).to(images.device)  # (M,)
        chosen = order[place * training.batch_size :][: training.batch_size]  # (N,)
        if len(chosen) < ranks.size():
            chosen = order[-ranks.size() :]
        augmented = augment(images[chosen].to(device), training.random_crop, training.horizontal_flip)
        yield ranks.own(augmented), ranks.own(labels[chosen].to(device))


def decayed(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weights with `weight_decay`, biases and normalisation without."""
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise ZsktError("expected a network with trainable parameters, found none; call requires_grad_() on it")
    weights = [p for p in trained if p.ndim > 1]
    others = [p for p in trained if p.ndim <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def augment(images: Tensor, padding: int, flip: bool) -> Tensor:
    """Images (N, C, H, W), each a random crop of itself padded by repeating its edge; with `flip` half are flipped."""
    n, _, height, width = images.shape
    device = images.device
    if padding:
        # Replicating, unlike reflecting, works for any border and any type.
        padded = F.pad(images.float(), (padding,) * 4, mode="replicate").to(images.dtype)  # (N, C, H + 2 p, W + 2 p)
        top, left = torch.randint(0, 2 * padding + 1, (2, n, 1), device=device)  # (N, 1) each
        rows = (top + torch.arange(height, device=device)).view(n, 1, height, 1)
        columns = (left + torch.arange(width, device=device)).view(n, 1, 1, width)
        batch = torch.arange(n, device=device).view(n, 1, 1, 1)
        channels = torch.arange(images.shape[1], device=device).view(1, -1, 1, 1)
        images = padded[batch, channels, rows, columns]  # (N, C, H, W)
    if flip:
        flipped = torch.rand(n, 1, 1, 1, device=device) < 0.5
        images = torch.where(flipped, images.flip(3), images)
    return images


def digest(images: Tensor, labels: Tensor) -> str:
    """SHA-256 of labels (M,) and about a thousand of the images (M, C, H, W): to recognise the same data."""
    some = images[:: max(1, len(images) // 1000)].contiguous()
    return hashlib.sha256(labels.cpu().numpy().tobytes() + some.cpu().numpy().tobytes()).hexdigest()

"""Training on labelled images: one loop for teachers and for the students to compare with.

SGD with Nesterov momentum on shifted and, where that keeps the class, mirrored images. No label smoothing and no mixing
of images: both are reported to make teachers worse to distil.

N batch, M images in all, K classes, C x H x W images.
"""

import copy
import dataclasses
import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zskt.errors import UsageError, ZsktError, unknown
from zskt.evaluate.measures import check_images, judge, predict
from zskt.networks.classifier import Classifier, count_parameters
from zskt.networks.folder import check_teacher_folder, save_network
from zskt.networks.observe import memory_format
from zskt.run import checkpoint
from zskt.runtime import arithmetic, pick_device, seeded, stream, versions
from zskt.settings import check_bounds

Images = tuple[Tensor, Tensor]
"""uint8 images (M, C, H, W) and their labels (M,)"""

Objective = Callable[[Tensor, Tensor], Tensor]
"""The loss () of a batch: normalised images (N, C, H, W) and labels (N,); it calls the network in training itself."""

Schedule = Literal["one_cycle", "step"]
Precision = Literal["fp32", "bf16"]

ON_DEVICE = 2**31
"""Training images up to so many bytes are kept on the device: a copy of each batch would make the host wait for it."""


@dataclass(frozen=True)
class Training:
    """How a network is trained on labelled images. Updates are counted, not passes: fewer images, more passes."""

    updates: int
    """of the optimiser [ZSKT scales the epochs so that these are constant over the images per class]"""
    batch_size: int = 128
    """images per update; with fewer images in all, all of them"""
    learning_rate: float = 0.1
    """the highest one [WRN: 0.1 for batch 128]"""
    schedule: Schedule = "one_cycle"
    """one_cycle: up over the first fifth, then down to 0; step: divided by 5 at 30, 60 and 80 % [WRN, ZSKT]"""
    weight_decay: float = 5e-4
    """L2 penalty on weights, not on biases and normalisation [WRN]"""
    shift: int = 4
    """largest shift of an image in pixels, each way; 0 = none"""
    mirrored: bool = False
    """whether images are mirrored left to right at random"""
    seed: int = 0
    """of order and augmentation"""
    device: str = "auto"
    """a torch device; auto: cuda where there is one, else cpu"""
    precision: Precision = "fp32"
    """bf16: autocast; weights stay in fp32"""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            check_bounds(name, value)
        for name in ("updates", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} = {getattr(self, name)}: expected a positive number")
        if self.batch_size < 2:
            raise UsageError("batch_size = 1: expected at least 2, as BatchNorm compares the images of a batch")
        if self.shift < 0 or self.weight_decay < 0 or self.seed < 0:
            raise UsageError("shift, weight_decay and seed: expected 0 or more")
        for name, choices in (("schedule", get_args(Schedule)), ("precision", get_args(Precision))):
            if getattr(self, name) not in choices:
                raise unknown(name, str(getattr(self, name)), choices)


@dataclass(frozen=True)
class TrainingEvent:
    """What callbacks get after every update: where the training is and, where it was measured, the accuracy."""

    update: int
    updates: int
    accuracy: float | None = None


Callback = Callable[[TrainingEvent], None]


@dataclass
class TrainingResult:
    """The network as trained so far, with its normalisation, and what was measured at that last iterate."""

    network: Classifier
    measured: dict[str, float] = field(default_factory=dict)
    update: int = 0
    finished: bool = False


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
    facts: Mapping[str, Any],
    out: str | Path | None = None,
    resume: bool = False,
    stop_after: str | int | None = None,
    callbacks: Sequence[Callback] = (),
) -> TrainingResult:
    """Train `module` in place on `train`, normalised as `like` does, towards less of `objective`; it ends in eval mode.

    Measured on `test` and, beside a `teacher`, for agreement with it: every twentieth of the updates, and what is
    reported is the last iterate. With `out` there is a checkpoint whenever it is measured, `resume` goes on from it
    (bit for bit on a CPU with the same number of threads), and the finished network is written as `stem`.safetensors
    and `stem`.json. `stop_after` ("9m", or a number of updates) leaves early. Raises ZsktError where images, labels,
    networks and folder do not fit together, or once the loss has left the numbers.
    """
    folder = Path(out) if out is not None else None
    if folder is not None:
        check_teacher_folder(folder)
    if (resume or stop_after) and folder is None:
        raise UsageError("a training that is resumed or stopped early needs a folder: give out")
    state = folder / "checkpoint" if folder is not None else None
    if state is not None and not resume and state.exists():
        raise ZsktError(f"{folder} holds an unfinished training; continue it with --resume or choose another --out")
    seconds, count = checkpoint.parse_budget(stop_after)
    device = pick_device(training.device)
    for images, labels in (train, test):
        check_images(like, images, labels)
    if training.shift >= min(like.input_size[1:]):
        raise UsageError(f"shift = {training.shift}: expected less than the image's {min(like.input_size[1:])} pixels")
    updates_in(1, len(train[0]), training.batch_size)  # enough images?

    layout = memory_format(module, like.input_size)
    module.to(device, memory_format=layout)  # type: ignore[call-overload]
    network = like.like(module).to(device)
    optimizer = torch.optim.SGD(decayed(module, training.weight_decay), lr=1.0, momentum=0.9, nesterov=True)
    trained = [p for p in module.parameters() if p.requires_grad]
    answers = None if teacher is None else predict(copy.deepcopy(teacher).to(device), test[0])  # (M, K)
    begun = {
        "settings": dataclasses.asdict(training),
        "normalisation": [like.mean.flatten().tolist(), like.std.flatten().tolist()],
        "data": digest(*train),
        "teacher": teacher and teacher.fingerprint(),
        "facts": json.loads(json.dumps(dict(facts))),
    }
    result = TrainingResult(network)
    with (
        checkpoint.owning(folder),
        arithmetic(),
        seeded(stream(training.seed, "augmentation"), device),
        checkpoint.stopping(seconds, signals=state is not None) as request,
    ):
        if resume:
            assert state is not None
            result.update = restore(state, module, optimizer, begun)
        first, last = result.update, min(training.updates, result.update + count)
        batches = endless_batches(train, training, first, device)
        module.train()
        for update, (images, labels) in zip(range(first, last), batches, strict=False):
            x = network.normalise(images).to(memory_format=layout)  # (N, C, H, W)
            with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
                loss = objective(x, labels)
            for group in optimizer.param_groups:
                group["lr"] = training.learning_rate * rate(training.schedule, update / training.updates)
            optimizer.zero_grad()
            torch.autograd.backward(loss, inputs=trained)  # nobody else's gradients are touched
            if update == first and all(p.grad is None for p in trained):
                raise ZsktError("the objective does not depend on the network; make it of the one that is trained")
            optimizer.step()
            result.update = update + 1
            leaving = result.update == last or request.reached()
            due = leaving or result.update % max(1, training.updates // 20) == 0
            if due:
                check_finite(loss, module, result.update)
                result.measured = judge(predict(network.like(module), test[0]), test[1], answers)
                if state is not None:
                    keep(state, result.update, module, optimizer, begun)
            for callback in callbacks:
                callback(TrainingEvent(result.update, training.updates, result.measured["accuracy"] if due else None))
            if leaving:
                break
        module.eval().zero_grad()
        request.raise_if_signalled(f"stopped after update {result.update:,} of {training.updates:,}")
        result.network = network.like(module)
        result.finished = result.update == training.updates
        result.measured = result.measured or judge(predict(result.network, test[0]), test[1], answers)
        if result.finished and folder is not None and state is not None:
            how = {**dataclasses.asdict(training), "images": len(train[0]), **facts}
            if teacher is not None:
                how["teacher_fingerprint"] = begun["teacher"]
                how["teacher_model"] = getattr(teacher.module, "spec", None)
                how["teacher_parameters"] = count_parameters(teacher.module)
            save_network(folder, stem, result.network, **how | {"measured": result.measured, "versions": versions()})
            shutil.rmtree(state)
    return result


def updates_in(epochs: int, images: int, batch_size: int) -> int:
    """Updates in `epochs` passes over so many images; a last batch of one, which BatchNorm cannot use, is left out."""
    if epochs < 1 or batch_size < 2:
        raise UsageError(f"epochs = {epochs}, batch_size = {batch_size}: expected at least 1 and at least 2")
    if images < 2:
        raise ZsktError(f"expected at least 2 training images, as BatchNorm compares them, found {images}; give more")
    return epochs * (images // batch_size + (images % batch_size > 1))


def endless_batches(train: Images, training: Training, first: int, device: torch.device) -> Iterator[Images]:
    """Augmented batches (N, C, H, W) and labels (N,) on the device, for one update after another from the `first` on.

    Pass after pass over the images, each in an order of its own that follows from the seed and the number of the pass,
    so that any update can be the first. Augmentation draws from torch's global random numbers.
    """
    in_pass = updates_in(1, len(train[0]), training.batch_size)
    images, labels = (tensor.to(device) if train[0].nbytes <= ON_DEVICE else tensor for tensor in train)
    for update in itertools.count(first):
        number, place = divmod(update, in_pass)
        if place == 0 or update == first:
            rng = torch.Generator().manual_seed(stream(training.seed, f"pass {number}"))
            order = torch.randperm(len(images), generator=rng).to(images.device)  # (M,)
        chosen = order[place * training.batch_size :][: training.batch_size]  # (N,)
        yield augment(images[chosen].to(device), training.shift, training.mirrored), labels[chosen].to(device)


def rate(schedule: Schedule, progress: float) -> float:
    """Share of the highest learning rate at `progress` in [0, 1).

    one_cycle: up in a fifth of the time, then down along a cosine. step: divided by 5 at 30, 60 and 80 %.
    """
    if schedule == "step":
        return 0.2 ** sum(progress >= milestone for milestone in (0.3, 0.6, 0.8))
    if progress < 0.2:
        return max(progress / 0.2, 0.01)
    return (1 + math.cos(math.pi * (progress - 0.2) / 0.8)) / 2


def decayed(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weights with `weight_decay`, biases and normalisation without."""
    weights = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def augment(images: Tensor, shift: int, mirrored: bool) -> Tensor:
    """Images (N, C, H, W), each moved by up to `shift` pixels over a border of its own edge, half of them mirrored."""
    n, _, height, width = images.shape
    device = images.device
    if shift:
        # Replicating, unlike reflecting, works for any border and any type.
        padded = F.pad(images.float(), (shift,) * 4, mode="replicate").to(images.dtype)  # (N, C, H + 2 s, W + 2 s)
        top, left = torch.randint(0, 2 * shift + 1, (2, n, 1), device=device)  # (N, 1) each
        rows = (top + torch.arange(height, device=device)).view(n, 1, height, 1)
        columns = (left + torch.arange(width, device=device)).view(n, 1, 1, width)
        batch = torch.arange(n, device=device).view(n, 1, 1, 1)
        channels = torch.arange(images.shape[1], device=device).view(1, -1, 1, 1)
        images = padded[batch, channels, rows, columns]  # (N, C, H, W)
    if mirrored:
        flip = torch.rand(n, 1, 1, 1, device=device) < 0.5
        images = torch.where(flip, images.flip(3), images)
    return images


def digest(images: Tensor, labels: Tensor) -> str:
    """SHA-256 of labels (M,) and about a thousand of the images (M, C, H, W): are these the same data?"""
    some = images[:: max(1, len(images) // 1000)].contiguous()
    return hashlib.sha256(labels.cpu().numpy().tobytes() + some.cpu().numpy().tobytes()).hexdigest()


def check_finite(loss: Tensor, module: nn.Module, update: int) -> None:
    """Raise ZsktError when the loss () or the weights have left the numbers. Waits for the device."""
    state = [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
    if not all(bool(tensor.isfinite().all()) for tensor in (loss, *state)):
        raise ZsktError(f"the loss is {float(loss.detach())} at update {update:,}: it diverged; lower --learning-rate")


def keep(
    folder: Path, update: int, module: nn.Module, optimizer: torch.optim.Optimizer, begun: Mapping[str, Any]
) -> None:
    """Write a checkpoint of everything that the rest of the training depends on."""
    tensors = {
        **checkpoint.prefixed("module", module.state_dict()),
        **checkpoint.prefixed("optimizer", checkpoint.optimizer_state(optimizer)),
        **checkpoint.random_state(next(module.parameters()).device),
    }
    checkpoint.save(folder, update, tensors, begun)


def restore(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, begun: Mapping[str, Any]) -> int:
    """Take up the newest checkpoint; returns the number of updates done."""
    tensors, found = checkpoint.load(folder)
    different = [name for name, value in begun.items() if found.get(name) != value]
    if different:
        raise ZsktError(f"{folder.parent} was begun with other {' and '.join(different)}; resume with the same ones")
    with checkpoint.restoring(folder):
        module.load_state_dict(checkpoint.under("module", tensors))
        checkpoint.restore_optimizer(optimizer, checkpoint.under("optimizer", tensors))
        checkpoint.restore_random_state(tensors, next(module.parameters()).device)
    return int(found["step"])

"""Training with data: the teachers that everything starts from.

One recipe for small images: SGD with Nesterov momentum, a one-cycle learning rate, shifted and, where that keeps the
class, mirrored images. No label smoothing and no mixing of images: both are reported to make teachers worse to distil.
"""

import dataclasses
import hashlib
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zskt import checkpoint
from zskt.belief import check_images, measure, network_like
from zskt.config import check_bounds
from zskt.distill import seeded, versions
from zskt.files import UsageError, ZsktError
from zskt.recipe import pick_device
from zskt.teacher import Teacher, check_teacher_folder, save_teacher

Images = tuple[Tensor, Tensor]
"""uint8 images (M, C, H, W) and their labels (M,)"""


@dataclass(frozen=True)
class Teaching:
    """How a teacher is trained."""

    epochs: int = 60
    """passes over the training images"""
    batch_size: int = 128
    """images per update"""
    learning_rate: float = 0.1
    """peak of the one-cycle schedule: up over the first fifth, then down to 0 [WRN: 0.1 for batch 128]"""
    weight_decay: float = 5e-4
    """L2 penalty on weights, not on biases and normalisation [WRN]"""
    shift: int = 4
    """largest shift of an image in pixels, each way; 0 = none"""
    mirrored: bool = False
    """whether images are mirrored left to right at random"""
    seed: int = 0
    """of initialisation, order and augmentation"""
    device: str = "auto"
    """a torch device; auto: cuda where there is one, else cpu"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; weights stay in fp32"""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            check_bounds(name, value)
        for name in ("epochs", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} = {getattr(self, name)}: expected a positive number")
        if self.shift < 0 or self.weight_decay < 0 or self.seed < 0:
            raise UsageError("shift, weight_decay and seed: expected 0 or more")


@dataclass(frozen=True)
class Epoch:
    """What callbacks get after every update of a teacher: where it is and, after an epoch, its accuracy."""

    update: int
    updates: int
    accuracy: float | None = None


@dataclass
class TeachResult:
    """The trained network as a teacher, its last accuracy on the test images, and whether all epochs are done."""

    teacher: Teacher
    measured: dict[str, float] = field(default_factory=dict)
    epoch: int = 0
    finished: bool = False


def teach(
    module: nn.Module,
    train: Images,
    test: Images,
    settings: Teaching,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    stop_after: str | None = None,
    callbacks: Sequence[Callable[[Epoch], None]] = (),
) -> TeachResult:
    """Train `module` in place on labelled images; the accuracy reported is the last epoch's, on `test`.

    With `out` a checkpoint is kept after every epoch, `resume` continues from it, and the finished teacher is written
    there. `stop_after` ("9m", or a number of epochs) leaves early.
    """
    folder = Path(out) if out is not None else None
    if folder is not None:
        check_teacher_folder(folder)
    if (resume or stop_after) and folder is None:
        raise UsageError("a training that is resumed or stopped early needs a folder: give out")
    state = folder / "checkpoint" if folder is not None else None
    if state is not None and not resume and state.exists():
        raise ZsktError(f"{folder} holds an unfinished training; continue it with --resume or choose another --out")
    device = pick_device(settings.device)
    size = tuple(train[0].shape[1:])
    if settings.shift >= min(size[1:]):
        raise UsageError(f"shift = {settings.shift}: expected less than the image's {min(size[1:])} pixels")
    teacher = Teacher(module, input_size=size, mean=mean, std=std, class_names=class_names).to(device)
    for images, labels in (train, test):
        check_images(teacher, images, labels)
    module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(decayed(module, settings.weight_decay), lr=1.0, momentum=0.9, nesterov=True)
    batches = -(-len(train[0]) // settings.batch_size)
    seconds, epochs = checkpoint.parse_budget(stop_after)
    result = TeachResult(teacher)
    beginnings = {"settings": dataclasses.asdict(settings), "mean": [*mean], "std": [*std], "data": digest(*train)}
    with (
        checkpoint.owning(folder),
        seeded(settings.seed, device),
        checkpoint.stopping(seconds, signals=state is not None) as request,
    ):
        if resume:
            assert state is not None
            result.epoch = restore(state, module, optimizer, beginnings)
        last = min(settings.epochs, result.epoch + epochs)
        while result.epoch < last:
            module.train()
            order = torch.randperm(len(train[0]))
            for i, chosen in enumerate(torch.split(order, settings.batch_size)):
                if len(chosen) == 1:  # one image has no statistics for BatchNorm; another epoch has another last one
                    continue
                update = result.epoch * batches + i
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * one_cycle(update / (settings.epochs * batches))
                images = augment(train[0][chosen].to(device), settings.shift, settings.mirrored)
                x = teacher.normalise(images).to(memory_format=torch.channels_last)
                with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                    logits = module(x)
                loss = F.cross_entropy(logits.float(), train[1][chosen].to(device))
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                for callback in callbacks:
                    callback(Epoch(update + 1, settings.epochs * batches))
            result.epoch += 1
            if not math.isfinite(float(loss.detach())):
                raise ZsktError(
                    f"the loss is {float(loss.detach())} after epoch {result.epoch}: it diverged; lower --learning-rate"
                )
            leaving = request.reached() or result.epoch == last
            if leaving or result.epoch % max(1, settings.epochs // 20) == 0:
                result.measured = measure(network_like(teacher, module), *test)
                for callback in callbacks:
                    callback(Epoch(result.epoch * batches, settings.epochs * batches, result.measured["accuracy"]))
            if state is not None:
                keep(state, result.epoch, module, optimizer, beginnings)
            if leaving:
                request.raise_if_signalled(f"stopped after epoch {result.epoch} of {settings.epochs}")
                break
        result.teacher = network_like(teacher, module.eval())
        result.finished = result.epoch == settings.epochs
        result.measured = result.measured or measure(result.teacher, *test)
        if result.finished and folder is not None and state is not None:
            facts = {"how": "zskt teach", **dataclasses.asdict(settings)}
            save_teacher(folder, result.teacher, **facts, measured=result.measured, versions=versions())
            shutil.rmtree(state)
    return result


def decayed(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weights with `weight_decay`, biases and normalisation without."""
    weights = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    return [{"params": weights, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def one_cycle(progress: float) -> float:
    """Share of the peak learning rate at `progress` in [0, 1): up in a fifth of the time, then down along a cosine."""
    if progress < 0.2:
        return max(progress / 0.2, 0.01)
    return (1 + math.cos(math.pi * (progress - 0.2) / 0.8)) / 2


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


def keep(
    folder: Path, epoch: int, module: nn.Module, optimizer: torch.optim.Optimizer, beginnings: dict[str, Any]
) -> None:
    """Write a checkpoint of everything that the rest of the training depends on."""
    tensors = {
        **checkpoint.prefixed("module", module.state_dict()),
        **checkpoint.prefixed("optimizer", checkpoint.optimizer_state(optimizer)),
        **checkpoint.random_state(next(module.parameters()).device),
    }
    checkpoint.save(folder, epoch, tensors, beginnings)


def restore(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, beginnings: dict[str, Any]) -> int:
    """Take up the newest checkpoint; returns the number of epochs done."""
    tensors, facts = checkpoint.load(folder)
    different = [name for name, value in beginnings.items() if facts.get(name) != value]
    if different:
        raise ZsktError(f"{folder.parent} was begun with other {' and '.join(different)}; resume with the same ones")
    with checkpoint.restoring(folder):
        module.load_state_dict(checkpoint.under("module", tensors))
        checkpoint.restore_optimizer(optimizer, checkpoint.under("optimizer", tensors))
        checkpoint.restore_random_state(tensors, next(module.parameters()).device)
    return int(facts["step"])

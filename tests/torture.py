"""Runs that are killed, stopped, starved and refused, at random moments and at every write: nothing may be lost.

python tests/torture.py --kills 200     (the last line is JSON: kills, and how many runs ended as if there were none)
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import zskt
from small import make_teacher, stripes
from zskt.files import digest
from zskt.networks import models
from zskt.paper.baselines import teach
from zskt.paper.training import Training, TrainingResult
from zskt.run import checkpoint
from zskt.run.lifecycle import Event

SIZE = (1, 8, 8)
OFTEN = {"log_every": 1, "evaluate_every": 3, "checkpoint_every": 2}
SMALL = {"batch_size": 8, "generator.width": 8, "generator.latent": 4}
BELIEF = {
    "steps": 6,
    "student.updates": 2,
    "student.loss.attention": 0.0,
    "replay.kind": "buffer",
    "replay.capacity": 3,
}
BANK = {"steps": 9, "generator.updates": 2, "student.loss.temperature": 2.0, "bank.rounds": 3, "bank.warmup": 1}
BANK |= {"bank.batch_size": 8, "bank.views": 2, "bank.random_crop": 1, "bank.horizontal_flip": False}


def distil(recipe: str, settings: dict[str, Any], out: Path, **options: Any) -> zskt.DistillResult:
    """A run of a few milliseconds a step."""
    torch.manual_seed(1)
    teacher = make_teacher(models.convnet(4, num_classes=3, channels=1), size=SIZE)
    student = models.convnet(2, num_classes=3, channels=1)
    settings = {**SMALL, **OFTEN, **settings}
    return zskt.distill(teacher, student, recipe, settings=settings, out=out, callbacks=[remember(out)], **options)


def train(out: Path, **options: Any) -> TrainingResult:
    """Training of a teacher for as long."""
    torch.manual_seed(1)
    module = models.convnet(4, num_classes=2, channels=1)
    training = Training(40, batch_size=16, random_crop=1, horizontal_flip=True)
    images = stripes(96), stripes(40)
    return teach(module, *images, training, mean=[0.2], std=[0.3], out=out, callbacks=[remember(out)], **options)


RUNS: dict[str, Callable[..., zskt.DistillResult | TrainingResult]] = {
    "belief matching": functools.partial(distil, "zskt-prior", BELIEF),
    "bank": functools.partial(distil, "bank", BANK),
    "teach": train,
}


def remember(out: Path) -> Callable[[Event], None]:
    """A callback that leaves beside the folder a digest of all that a method holds after its last step."""

    def callback(event: Event) -> None:
        if event.step < event.steps:
            return
        tensors: dict[str, torch.Tensor] = {}
        for name, module in event.repeated.modules().items():
            tensors |= checkpoint.prefixed(name, module.state_dict())
        for name, optimiser in event.repeated.optimisers().items():
            tensors |= checkpoint.prefixed(f"optimiser {name}", checkpoint.optimizer_state(optimiser))
        tensors |= checkpoint.prefixed("state", event.repeated.state_dict())
        found = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            found.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        out.with_suffix(".state").write_text(found.hexdigest())

    return callback


def outcome(out: Path) -> dict[str, str]:
    """What must be the same however often a run was interrupted: weights, rows, log, images, and the last state."""
    files = [
        path for pattern in ("*.safetensors", "rows/*", "samples/*", "metrics.jsonl") for path in out.glob(pattern)
    ]
    return {
        str(path.relative_to(out)) if path.is_relative_to(out) else "state": digest(path)
        for path in (*files, out.with_suffix(".state"))
    }

"""Images that a teacher recognises, made without data and without a student, for other people's quantisers and pruners.

M images, V views of each, R = M V rows, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zskt.errors import UsageError
from zskt.evaluate.measures import predict
from zskt.files import appearing, write_json
from zskt.method.bank import BankDistillation
from zskt.method.budget import duration
from zskt.method.build import arrange
from zskt.method.recipe import plan, recipe_for
from zskt.method.views import Augmentation, random_views, view
from zskt.networks.checks import as_teacher
from zskt.networks.classifier import Classifier
from zskt.runtime import arithmetic, pick_device, seeded, stream, versions

UPDATES = 100
"""Updates of the generator and the latents for a batch of images."""
BATCH = 256
"""Images made together at the most; fewer where they are large, as in recipe bank."""


@dataclass(frozen=True)
class SyntheticImages:
    """Rows of images and what the teacher makes of them; the views of an image are consecutive, itself first."""

    images: Tensor  # (R, C, H, W) uint8
    logits: Tensor  # (R, K)
    targets: Tensor  # (M,) the class that each image was made for
    views: int

    @property
    def recognised(self) -> float:
        """The fraction of images that the teacher takes for the class they were made for."""
        return float((self.logits[:: self.views].argmax(dim=1) == self.targets).double().mean())

    @property
    def confidence(self) -> float:
        """The teacher's mean confidence in all rows; that of real images is usually above 0.9."""
        return float(self.logits.softmax(dim=1).amax(dim=1).double().mean())


def synthesise(
    teacher: Classifier,
    count: int,
    *,
    views: int = 1,
    updates: int = UPDATES,
    seed: int = 0,
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
    notice: Callable[[str], None] = lambda line: None,
) -> SyntheticImages:
    """Make `count` images for a teacher, about as many of each class: the synthesis of recipe bank without adversary.

    A batch of up to 256 takes `updates` updates of the generator, which the next batch goes on from. Further views of
    an image are random crops and, if the teacher takes most flipped images for the same class, flips. `notice` is told
    the expected time. Source: DeepInversion (Yin et al. 2020), CMI (Fang et al. 2021) and Fast (Fang et al. 2022).
    """
    for name, value in (("count", count), ("views", views), ("updates", updates)):
        if value < 1:
            raise UsageError(f"{name} = {value}: expected a positive number")
    where = pick_device(device)
    frozen = as_teacher(teacher).to(where)
    stand_in = _stand_in(frozen)
    planned = plan(frozen, stand_in, "bank", _settings(frozen, count, updates, seed, device))
    config = planned.config
    batches = -(-count // config.bank.batch_size)
    if planned.cost is not None:
        takes = duration(planned.cost.round * batches)
        notice(f"{batches * config.bank.batch_size:,} images in batches of {config.bank.batch_size}, about {takes}")
    if not teacher.has_batchnorm:
        notice("the network has no BatchNorm statistics to guide the images: they will be less like real ones")
    arrange(frozen, config)
    targets = []
    with arithmetic(), seeded(stream(config.seed, "run"), where):
        method = planned.make(frozen, stand_in.to(where), config)
        assert isinstance(method, BankDistillation)
        try:
            for done in range(1, batches * updates + 1):
                method.synthesise()
                progress(done, batches * updates)
                if done % updates == 0:
                    targets.append(method.synthesis.labels.cpu())  # (N,)
            stored = method.bank.images[:count].cpu()  # (M, C, H, W)
        finally:
            method.close()
        assert isinstance(config.bank.random_crop, int)
        augmentation = Augmentation(config.bank.random_crop, bool(config.bank.horizontal_flip))
        rng = torch.Generator().manual_seed(stream(config.seed, "views"))
        seen = [stored]
        for _ in range(views - 1):
            seen.append(view(stored, random_views(len(stored), augmentation, rng), augmentation.random_crop))
        rows = torch.stack(seen, dim=1).flatten(0, 1)  # (R, C, H, W)
        return SyntheticImages(rows, predict(frozen, rows), torch.cat(targets)[:count], views)


def _stand_in(teacher: Classifier) -> nn.Module:
    """A network in the student's place, which synthesis without an adversary never asks."""
    like = next((p.dtype for p in teacher.parameters() if p.is_floating_point()), torch.float32)
    head = nn.Linear(teacher.input_size[0], teacher.num_classes)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).to(like)


def _settings(teacher: Classifier, count: int, updates: int, seed: int, device: str) -> dict[str, Any]:
    """What differs from recipe bank: all is warm-up, which has no adversary; the one round after it is not made."""
    batch = max(2, min(BATCH, recipe_for(teacher, "bank", {}).bank.batch_size, count))
    return {
        "seed": seed,
        "steps": updates * -(-count // batch) + 1,
        "machine.device": device,
        "generator.updates": updates,
        **({} if teacher.has_batchnorm else {"generator.loss.batchnorm": 0.0}),
        "bank.batch_size": batch,
        "bank.rounds": -(-count // batch) + 1,
        "bank.warmup": -(-count // batch),
        "bank.views": 0,
    }


def write_synthetic(folder: Path, found: SyntheticImages, teacher: Classifier, **facts: Any) -> None:
    """Write images.npz, images.json with `facts` and, for one or three channels, png/IMAGE-VIEW.png; a new folder.

    The arrays: `images` (R, C, H, W) float32 in [0, 1], those of the PNGs; `probabilities` (R, K), the teacher's;
    `image` (R,), which image a row is a view of; `targets` (R,), the class that it was made for.
    """
    index = np.repeat(np.arange(len(found.targets)), found.views)  # (R,)
    with appearing(folder) as place:
        place.mkdir()
        np.savez_compressed(
            place / "images.npz",
            images=found.images.numpy().astype(np.float32) / np.float32(255),
            probabilities=found.logits.float().softmax(dim=1).numpy(),
            image=index,
            targets=found.targets.numpy()[index],
        )
        if found.images.shape[1] in (1, 3):
            (place / "png").mkdir()
            for row, pixels in enumerate(found.images.permute(0, 2, 3, 1).numpy()):
                name = f"{row // found.views:06d}-{row % found.views}.png"
                Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(place / "png" / name)
        about = {
            "images": len(found.targets),
            "views": found.views,
            "teacher_fingerprint": teacher.fingerprint(),
            "class_names": list(teacher.class_names or map(str, range(teacher.num_classes))),
            "teacher_confidence": found.confidence,
            "recognised": found.recognised,
            "versions": versions(),
        }
        write_json(place / "images.json", about | facts)

"""Small networks, pairs, images and files that several tests share; commands and refusals in one line each."""

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from zskt.errors import ZsktError
from zskt.files import CHECKSUM
from zskt.method.build import arrange, belief_matching
from zskt.method.config import Config
from zskt.method.matching import BeliefMatching
from zskt.method.recipe import load_recipe, plan
from zskt.networks import models
from zskt.networks.checks import as_teacher
from zskt.networks.classifier import Classifier
from zskt.settings import replace

if TYPE_CHECKING:
    from zskt.data.images import Dataset


class Normalisation(TypedDict):
    """Arguments of whatever takes a classifier's normalisation: as `**GREY`, still checked one by one."""

    mean: list[float]
    std: list[float]


GREY: Normalisation = {"mean": [0.5] * 3, "std": [0.25] * 3}


class FourStages(nn.Module):
    """Four conv-BN-ReLU stages, each half the resolution of the one before; post-ReLU stage outputs like a ResNet's."""

    stages = ("stage1", "stage2", "stage3", "stage4")

    def __init__(self, width: int, num_classes: int = 10) -> None:
        super().__init__()
        self.stage1, self.stage2, self.stage3, self.stage4 = (
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in ((3, width), (width, width), (width, 2 * width), (2 * width, 2 * width))
        )
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(F.max_pool2d(self.stage2(F.max_pool2d(self.stage1(x), 2)), 2))
        return self.fc(self.stage4(F.max_pool2d(x, 2)).mean(dim=(2, 3)))


class Viewing(nn.Module):
    """Flattens its maps by `view`, which takes contiguous memory only."""

    def __init__(self, width: int = 4, *, size: tuple[int, int, int] = (3, 16, 16), classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(size[0], width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.fc = nn.Linear(width * -(-size[1] // 2) * -(-size[2] // 2), classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(F.relu(self.bn(self.conv1(x))))
        return self.fc(x.view(x.shape[0], -1))


class Tokens(nn.Module):
    """ViT-like: patches, then tokens (N, L, D), with LayerNorm and a learnt class token."""

    def __init__(self, *, size: tuple[int, int, int] = (3, 16, 16), classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(size[0], 8, 4, 4)
        self.first = nn.Parameter(torch.zeros(1, 1, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.block(torch.cat([self.first.expand(len(x), -1, -1), x], dim=1))
        return self.head(x[:, 0])


SMALL_BANK = {"bank.batch_size": 8, "bank.views": 1}
"""Settings by which a bank of few images is filled in milliseconds."""


def student_for(teacher: Classifier) -> nn.Module:
    """Two convolutions for a teacher's images and classes."""
    return nn.Sequential(
        nn.Conv2d(teacher.input_size[0], 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, teacher.num_classes),
    )  # fmt: skip


def shake_batchnorm(module: nn.Module) -> None:
    """Running statistics and affine parameters as a trained network has them: not all 0 and 1."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            nn.init.normal_(layer.running_mean, 0, 0.3)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.3)


def without_batchnorm(module: nn.Module) -> None:
    """For `apply`: a network's BatchNorms become nothing."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, nn.Identity())


def make_teacher(
    module: nn.Module | None = None, *, size: tuple[int, int, int] = (3, 16, 16), seed: int = 0
) -> Classifier:
    """A teacher with random weights and shaken BatchNorm statistics, wrn-10-2 by default."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = models.wide_resnet(10, 2, channels=size[0]) if module is None else module
        shake_batchnorm(module)
    return as_teacher(Classifier(module, input_size=size, mean=[0.5] * size[0], std=[0.25] * size[0]))


def make_matching(
    recipe: str, teacher: Classifier, student: nn.Module, changes: dict[str, Any] | None = None, seed: int = 0
) -> tuple[BeliefMatching, Config]:
    """The step of a recipe at a tiny size."""
    tiny = {"steps": 5, "batch_size": 8, "generator.width": 8, "generator.latent": 12}
    config = plan(teacher, student, replace(load_recipe(recipe), tiny | (changes or {}))).config
    arrange(teacher, config)
    arrange(student, config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        matching = belief_matching(teacher, student, config)
    matching.rng.manual_seed(seed)
    return matching, config


def stripes(count: int, channels: int = 1) -> tuple[Tensor, Tensor]:
    """Images (count, C, 8, 8) of one bright row or column: two classes that a small network learns at once."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (count, channels, 8, 8), generator=rng, dtype=torch.uint8)
    labels = torch.arange(count) % 2
    for image, label, place in zip(images, labels, torch.randint(0, 8, (count,), generator=rng), strict=True):
        image[(slice(None), place) if label else (slice(None), slice(None), place)] = 255
    return images, labels


def coloured(
    count: int, *, classes: int = 3, size: tuple[int, int, int] = (1, 12, 12), seed: int = 0, name: str = "images"
) -> "Dataset":
    """Noise (count, *size) that is brighter from class to class: learnt in a few updates."""
    from zskt.data.images import Dataset

    noise = torch.randint(0, 60, (count, *size), generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(count) % classes
    images = noise + (labels * 180 // (classes - 1)).view(-1, 1, 1, 1)
    return Dataset(images.byte(), labels, tuple(f"class {k}" for k in range(classes)), name)


def write_images(folder: Path, **splits: "Dataset") -> Path:
    """Image sets as split/class/file."""
    for split, data in splits.items():
        for i, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
            path = folder / split / data.class_names[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(path)
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file, as one who means it: without its checksum."""
    document = json.loads(path.read_text())
    document.pop(CHECKSUM, None)
    path.write_text(json.dumps(document | changes))


class Payload:
    """What a malicious file holds: unpickling it makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.trace),)


def refused(work: Callable[[], object], kind: type[ZsktError] = ZsktError) -> str:
    """The one line that refuses `work`."""
    with pytest.raises(kind) as error:
        work()
    assert "\n" not in str(error.value)
    return str(error.value)


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a `zskt` command in this process."""
    from zskt.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(list(map(str, arguments)))
    return status, out.getvalue(), err.getvalue()


def run(*arguments: object) -> dict[str, Any]:
    """Run a command that must succeed; its JSON, which is all that is on stdout."""
    status, out, err = call(*arguments)
    assert status == 0, err
    (line,) = out.splitlines()
    return json.loads(line)


def fails(expected: int, *arguments: object) -> str:
    """Run a command that must fail in one line and with this status; the line."""
    status, out, err = call(*arguments)
    assert (status, out) == (expected, "")
    assert "Traceback" not in err
    (line,) = (line for line in err.splitlines() if line.startswith("zskt: "))
    return line


def quiet(*arguments: str) -> contextlib.AbstractContextManager[Callable[[int, int, str], None]]:
    """No bar."""
    return contextlib.nullcontext(lambda done, total, beside: None)


def tiny_recipe(name: str) -> Config:
    """A recipe with a small generator, small batches and two student updates: a step in milliseconds."""
    tiny = {"batch_size": 16, "generator.width": 8, "generator.latent": 12, "student.updates": 2}
    return replace(load_recipe(name), tiny)

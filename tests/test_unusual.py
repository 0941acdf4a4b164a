"""Networks that nobody here has seen: `distill` takes them as they are, or says why not."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zskt
from small import SMALL_BANK, Tokens, Viewing, make_teacher
from zskt.method.recipe import plan
from zskt.networks import models
from zskt.networks.observe import memory_format
from zskt.paper.baselines import train_student
from zskt.paper.training import Training
from zskt.run.distill import distill

TINY = {"steps": 2, "batch_size": 4, "generator.width": 8, "generator.latent": 12, "student.updates": 1}
Size = tuple[int, int, int]


class Grouped(nn.Module):
    """GroupNorm in place of BatchNorm, and dropout."""

    def __init__(self, *, size: Size = (3, 16, 16), classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(size[0], 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.conv2, self.norm2 = nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return self.fc(self.dropout(x.mean(dim=(2, 3))))


class Peculiar(nn.Module):
    """A counter among its buffers, one weight under two names, one frozen layer and one that nothing uses."""

    calls: Tensor

    def __init__(self, *, size: Size = (3, 16, 16), classes: int = 10) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(size[0], 4, 3, padding=1).requires_grad_(False)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.again.weight = self.conv.weight
        self.unused = nn.Linear(3, 3)
        self.fc = nn.Linear(4, classes)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        x = F.relu(self.again(F.relu(self.conv(self.frozen(x)))))
        return self.fc(x.mean(dim=(2, 3)))


KINDS: dict[str, Any] = {"view": Viewing, "groups": Grouped, "tokens": Tokens, "peculiar": Peculiar}


def built(kind: str, *, size: Size = (3, 16, 16), classes: int = 10) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return KINDS[kind](size=size, classes=classes)


def random_images(count: int, size: Size = (3, 16, 16)) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 256, (count, *size), dtype=torch.uint8), torch.arange(count)


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("channels", [1, 3])
def test_view_takes_contiguous_memory_only_and_it_is_seen(channels: int) -> None:
    size = (channels, 16, 16)
    module = Viewing(size=size)
    strides = [p.stride() for p in module.parameters()]
    assert memory_format(module, size) == torch.contiguous_format
    assert [p.stride() for p in module.parameters()] == strides
    assert memory_format(models.wide_resnet(10, 1, channels=channels), size) == torch.channels_last


def viewing_pair(who: str) -> tuple[zskt.Classifier, nn.Module]:
    """A teacher and a student, of whom one or both reshape by `view`."""
    teacher = make_teacher(Viewing(8) if who != "student" else None)
    return teacher, Viewing(4) if who != "teacher" else models.wide_resnet(10, 1)


@pytest.mark.parametrize("who", ["teacher", "student", "both"])
def test_the_baselines_take_such_networks_too(who: str) -> None:
    teacher, student = viewing_pair(who)
    data = random_images(10)
    assert train_student(student, teacher, data, data, Training(2, batch_size=5)).finished


@pytest.mark.parametrize("who", ["teacher", "student", "both"])
@pytest.mark.parametrize("recipe", ["auto", "zskt", "zskt-fresh"])
def test_a_network_that_reshapes_by_view_decides_the_memory_format(who: str, recipe: str, tmp_path: Path) -> None:
    teacher, student = viewing_pair(who)
    settings = TINY | (SMALL_BANK if recipe == "auto" else {})
    result = distill(teacher, student, recipe, settings=settings, out=tmp_path / "run", evaluate=random_images(6))
    assert result.finished
    assert result.config.machine.memory_format == "contiguous"
    whom = "teacher and student" if who == "both" else who
    assert f"in contiguous memory, as the {whom} cannot run in channels_last" in result.reason
    assert 'memory_format = "contiguous"' in (tmp_path / "run" / "config.toml").read_text()
    with pytest.raises(zskt.ZsktError, match=r"leave machine\.memory_format out"):
        plan(teacher, student, recipe, {"machine.memory_format": "channels_last"})


def test_others_stay_in_channels_last() -> None:
    planned = plan(make_teacher(), models.wide_resnet(10, 1))
    assert planned.config.machine.memory_format == "channels_last"
    assert "memory" not in planned.reason


@pytest.mark.parametrize("teacher", [*KINDS, "wrn"])
@pytest.mark.parametrize("student", [*KINDS, "wrn"])
def test_every_kind_teaches_every_kind(teacher: str, student: str) -> None:
    network = make_teacher(None if teacher == "wrn" else built(teacher))
    module = models.wide_resnet(10, 1) if student == "wrn" else built(student)
    before = copy.deepcopy(module.state_dict())
    result = distill(network, module, settings=TINY | SMALL_BANK)
    assert result.finished
    assert "fc.weight" in changed(module, before) or "head.weight" in changed(module, before)
    assert result.config.recipe == ("bank" if network.has_batchnorm else "bank-adversary")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("size", "classes"), [((1, 28, 28), 10), ((4, 8, 8), 2), ((3, 32, 96), 37), ((3, 8, 8), 1000)], ids=str
)
def test_channels_sizes_and_classes(kind: str, size: Size, classes: int, tmp_path: Path) -> None:
    teacher = make_teacher(built(kind, size=size, classes=classes), size=size)
    student = models.convnet(4, num_classes=classes, channels=size[0])
    images, labels = random_images(4, size)
    test = (images, labels % classes)
    assert distill(teacher, student, settings=TINY | SMALL_BANK, out=tmp_path / "run", evaluate=test).finished
    x = torch.randn(2, *size)
    torch.testing.assert_close(zskt.load_student(tmp_path / "run")(x), student(x))


@pytest.mark.parametrize("kind", ["groups", "tokens", "peculiar"])
@pytest.mark.parametrize("fused", [True, False])
def test_unusual_students_resume_bit_for_bit(kind: str, fused: bool, tmp_path: Path) -> None:
    settings = TINY | {"steps": 4, "checkpoint_every": 2, "machine.fused": fused, "student.loss.attention": 0.0}
    whole, parts = built(kind), built(kind)
    distill(make_teacher(), whole, "zskt", settings=settings, out=tmp_path / "whole")
    distill(make_teacher(), built(kind), "zskt", settings=settings, out=tmp_path / "parts", stop_after=2)
    distill(make_teacher(), parts, "zskt", settings=settings, out=tmp_path / "parts", resume=True)
    assert not changed(whole, parts.state_dict())


def test_frozen_tied_and_integer_state_stays_what_it_is(tmp_path: Path) -> None:
    module = built("peculiar")
    before = copy.deepcopy(module.state_dict())
    distill(make_teacher(), module, "zskt", settings=TINY, out=tmp_path / "run")
    trained = {f"{layer}.{part}" for layer in ("conv", "again", "fc") for part in ("weight", "bias")}
    assert changed(module, before) == trained | {"calls"}
    assert module.get_parameter("again.weight") is module.get_parameter("conv.weight")
    assert [p.requires_grad for p in module.get_submodule("frozen").parameters()] == [False, False]
    assert int(module.state_dict()["calls"]) == TINY["steps"] * (1 + TINY["student.updates"])
    facts = json.loads((tmp_path / "run" / "student.json").read_text())
    assert facts["parameters"] == sum(p.numel() for p in module.parameters())


LARGE = """
import resource, sys, time
import torch
from torch import nn
sys.path.insert(0, {tests!r})
from small import make_teacher
from zskt import models
from zskt.run.distill import distill

def resnet18():  # as for ImageNet: 7x7 stem and pooling
    module = models.resnet(18, num_classes=1000)
    module.conv1 = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.MaxPool2d(3, 2, 1))
    return module

torch.set_num_threads(1)
started = time.monotonic()
teacher, student = make_teacher(resnet18(), size=(3, 224, 224)), resnet18()
result = distill(teacher, student, steps=3, settings={{"batch_size": 16}})
assert result.finished
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
seconds = time.monotonic() - started
print(result.config.recipe, result.config.generator.width, f"{{seconds:.0f}} s {{peak:.2f}}", "GiB")
"""


@pytest.mark.slow
def test_a_resnet_18_pair_at_224_stays_within_8_gib() -> None:
    script = LARGE.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-2]) < 8, done.stdout

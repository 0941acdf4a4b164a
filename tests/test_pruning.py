"""Students that begin as their teacher without its weakest channels."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zskt
from small import FourStages, fails, make_teacher, refused, run, without_batchnorm
from zskt.networks import models
from zskt.networks.classifier import Classifier, count_parameters
from zskt.networks.folder import save_teacher
from zskt.networks.pruning import CLASSES, layers_of
from zskt.networks.students import make_student

SIZES = {"lenet-5": (1, 12, 12), "convnet-4": (1, 8, 8), "vgg-11-4": (3, 16, 16)}
OURS = ["wrn-10-2", "wrn-16-1.5", "wrn-16-1", "resnet-18-4", "vgg-11-4", "convnet-4", "lenet-5"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def build(spec: str) -> Classifier:
    if spec in ("basic", "bottleneck"):
        transformers = pytest.importorskip("transformers")
        sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1], "layer_type": spec}
        module: nn.Module = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=5))
        return make_teacher(module, size=(3, 32, 32))
    size = SIZES.get(spec, (3, 8, 8))
    return make_teacher(models.build(spec, 5, size), size=size)


def images(teacher: Classifier) -> Tensor:
    return torch.randn(4, *teacher.input_size, generator=torch.Generator().manual_seed(1))


def logits(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = module.eval()(x)
    return found if isinstance(found, Tensor) else found.logits


@pytest.mark.parametrize("spec", [*OURS, "basic", "bottleneck"])
def test_with_all_channels_it_is_the_teacher(spec: str) -> None:
    teacher = build(spec)
    student = make_student("pruned:1", teacher)
    assert all(parameter.requires_grad for parameter in student.parameters())
    x = images(teacher)
    assert torch.equal(logits(student, x), logits(teacher, x))
    before = teacher.fingerprint()
    nn.init.zeros_(next(student.parameters()))
    assert teacher.fingerprint() == before  # a copy


def silence(module: nn.Module, share: float) -> None:
    """Zero all but `share` of the channels of each group, others in each, with what BatchNorm adds to them."""
    rng = torch.Generator().manual_seed(2)
    silent: dict[str, Tensor] = {}
    stem = "conv1" if isinstance(module, models.WideResNet) else ""  # of 16 channels at any width
    for layer in layers_of(module):
        if layer.makes in (CLASSES, stem):
            continue
        state = module.get_submodule(layer.name)
        count = len(state.get_parameter("weight"))
        silent.setdefault(layer.makes, torch.randperm(count, generator=rng)[round(share * count) :])
        with torch.no_grad():
            for parameter in state.parameters():
                parameter[silent[layer.makes]] = 0
            for buffer in state.buffers():
                if buffer.ndim:  # of a constant 0
                    buffer[silent[layer.makes]] = 0 if buffer is state.running_mean else 1


@pytest.mark.parametrize(
    ("spec", "smaller", "share"),
    [
        ("wrn-10-2", "wrn-10-1.5", 3 / 4),
        ("wrn-16-1.5", "wrn-16-0.75", 1 / 2),
        ("resnet-18-4", "resnet-18-2", 1 / 2),
        ("vgg-11-4", "vgg-11-3", 3 / 4),
        ("convnet-4", "convnet-2", 1 / 2),
        ("lenet-5", "lenet-5-half", 1 / 2),
        ("basic", "", 1 / 2),
        ("bottleneck", "", 1 / 2),
    ],
)
def test_channels_that_say_nothing_can_go(spec: str, smaller: str, share: float) -> None:
    """Whatever is zero is pruned first, and without it the network computes the same."""
    teacher = build(spec)
    silence(teacher.module, share)
    if smaller:
        fraction = count_parameters(build_plain(smaller, teacher)) / count_parameters(teacher.module)
    else:  # transformers
        fraction = {"basic": 0.27, "bottleneck": 0.36}[spec]
    student = make_student(f"pruned:{fraction}", teacher)
    if smaller:
        assert student.spec == smaller
    else:
        assert getattr(student.config, "hidden_sizes", None) == [8, 16]
    x = images(teacher)
    torch.testing.assert_close(logits(student, x), logits(teacher, x), rtol=1e-5, atol=1e-6)
    assert logits(student, x).std(dim=0).min() > 2e-5  # not a constant


def build_plain(spec: str, teacher: Classifier) -> nn.Module:
    return models.build(spec, teacher.num_classes, teacher.input_size)


def test_a_case_by_hand() -> None:
    """Filters of L1 norms 3 and 4, then 1, 5, 2 and 6 over both inputs: channel 1 stays, then channels 1 and 3."""
    teacher = make_teacher(models.convnet(2, num_classes=3, channels=1), size=(1, 8, 8))
    state = teacher.module.state_dict()
    first, second = state["stage1.0.weight"].zero_(), state["stage2.0.weight"].zero_()
    first[:, 0, 0, :2] = torch.tensor([[3.0, 0.0], [-2.0, 2.0]])
    second[:, 0, 1, 1] = torch.tensor([1.0, 1.0, -1.0, 2.0])
    second[:, 1, 2, 2] = torch.tensor([0.0, -4.0, 1.0, 4.0])
    fraction = count_parameters(models.convnet(1, num_classes=3, channels=1)) / count_parameters(teacher.module)
    student = make_student(f"pruned:{fraction}", teacher)
    assert student.spec == "convnet-1"
    found = student.state_dict()
    assert found["stage1.0.weight"][0, 0, 0].tolist() == [-2.0, 2.0, 0.0]
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert found[f"stage1.1.{name}"].tolist() == state[f"stage1.1.{name}"][[1]].tolist()
        assert found[f"stage2.1.{name}"].tolist() == state[f"stage2.1.{name}"][[1, 3]].tolist()
    assert found["stage2.0.weight"][:, 0, 2, 2].tolist() == [-4.0, 4.0]
    places = torch.cat([torch.arange(16, 32), torch.arange(48, 64)])  # 4 x 4 of channels 1 and 3
    assert torch.equal(found["fc.weight"], state["fc.weight"][:, places])
    assert torch.equal(found["fc.bias"], state["fc.bias"])


def test_one_stream_keeps_the_channels_of_the_largest_sum() -> None:
    """Of a residual stream the norms of all its layers count, not those of one."""
    teacher = make_teacher(models.resnet(18, 2, num_classes=3), size=(3, 8, 8))
    state = teacher.module.state_dict()
    writers = ["conv1", *(f"layer1.{block}.conv2" for block in (0, 1))]
    with torch.no_grad():
        for name, norm in zip(writers, ([5.0, 1.0], [1.0, 4.0], [1.0, 4.0]), strict=True):  # sums 7 and 9
            weight = state[f"{name}.weight"]
            weight /= weight.abs().flatten(1).sum(dim=1).view(-1, 1, 1, 1)
            weight *= torch.tensor(norm).view(-1, 1, 1, 1)
    fraction = count_parameters(models.resnet(18, 1, num_classes=3)) / count_parameters(teacher.module)
    found = make_student(f"pruned:{fraction}", teacher).state_dict()
    for name in ("conv1", "layer1.0.conv2"):
        inner = found[f"{name}.weight"].abs().sum()
        whole = state[f"{name}.weight"].abs().flatten(1).sum(dim=1)
        assert inner <= whole[1] + 1e-6
    assert torch.equal(found["conv1.weight"], state["conv1.weight"][1:])
    assert torch.equal(found["layer1.1.bn2.running_var"], state["layer1.1.bn2.running_var"][1:])


class Own(FourStages):
    pass


def changed() -> nn.Module:
    module = models.convnet(4)
    without_batchnorm(module.stage1)
    return module


@pytest.mark.parametrize(
    ("module", "spec", "words"),
    [
        (Own(4), "pruned:0.5", "is for networks of zskt and transformers' ResNet, found Own; use --student auto:0.5"),
        (changed(), "pruned:0.25", "found ConvNet; use --student auto:0.25"),
        (models.wide_resnet(10, 2), "pruned:0", "pruned:0: expected a fraction of the teacher's parameters"),
        (models.wide_resnet(10, 2), "pruned:1.5", "as in pruned:0.25"),
        (models.wide_resnet(10, 2), "pruned:0.001", "the nearest relative of WideResNet, wrn-10-0.0625, has"),
        (models.resnet(18, 1), "pruned:0.3", "the nearest relative of ResNet, resnet-18-1, has"),
    ],
    ids=["other", "changed", "nothing", "more", "too small", "no narrower"],
)
def test_refused_elsewhere(module: nn.Module, spec: str, words: str) -> None:
    assert words in refused(lambda: make_student(spec, make_teacher(module)))


def test_widths_of_a_sixteenth() -> None:
    narrow = models.build("wrn-16-0.0625", 10, (3, 8, 8))
    assert narrow(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    assert models.build("wrn-16-2.0", 10, (3, 8, 8)).spec == "wrn-16-2"
    assert "wrn-16-1.1: expected a width that is a multiple of 1/16" in refused(
        lambda: models.build("wrn-16-1.1", 10, (3, 8, 8)), zskt.UsageError
    )


def test_a_command_saves_and_rebuilds_it(tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher", build("wrn-10-2"))
    tiny: list[Any] = ["--recipe", "zskt-prior", "--steps", 4, "--batch-size", 4, "--generator.width", 4]
    command: list[Any] = ["distill", tmp_path / "teacher", "--student", "pruned:0.6", *tiny]
    run(*command, "--out", tmp_path / "a")
    assert json.loads((tmp_path / "a" / "student.json").read_text())["model"] == "wrn-10-1.5625"
    assert run("inspect", tmp_path / "a")["model"] == "wrn-10-1.5625"
    run(*command, "--out", tmp_path / "b", "--stop-after", 2)
    run("distill", "--resume", "--out", tmp_path / "b")
    first, second = ((tmp_path / name / "student.safetensors").read_bytes() for name in "ab")
    assert first == second
    assert "expected a fraction" in fails(2, "distill", tmp_path / "teacher", "--student", "pruned:x", "--out", "c")

"""What is seen of any network from outside (stages, BatchNorm statistics, operations), without leaving a trace."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from small import Tokens, shake_batchnorm
from zskt.errors import ZsktError
from zskt.networks import models
from zskt.networks.observe import (
    Observer,
    batchnorm_layers,
    channel_moments,
    evaluating,
    find_stages,
    forward_flops,
    stage_resolutions,
)


def conv_bn_relu(a: int, b: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]


class Block(nn.Module):
    """A residual block; one in-place ReLU used twice, as in torchvision, or pre-activation."""

    def __init__(self, a: int, b: int, stride: int, preactivation: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(a if preactivation else b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1), nn.BatchNorm2d(b)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Conv2d(a, b, 1, stride) if stride > 1 else None
        self.preactivation = preactivation

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        if self.preactivation:
            return self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x)))))) + shortcut
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + shortcut)


class TorchvisionLike(nn.Module):
    """7x7-style stem with pooling, four layers of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = conv_bn_relu(3, 4, 2)
        self.maxpool, self.avgpool = nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1)
        for i in range(4):
            setattr(self, f"layer{i + 1}", nn.Sequential(Block(4, 4, 2 if i else 1), Block(4, 4, 1)))
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(4):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return self.fc(self.avgpool(x).flatten(1))


class Preactivated(nn.Module):
    """BN-ReLU come first in a block, so block2 begins, and the network ends, with layers at another stage's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        for i in range(3):
            blocks = [Block(4, 4, 2 if i else 1, preactivation=True), Block(4, 4, 1, preactivation=True)]
            setattr(self, f"block{i + 1}", nn.Sequential(*blocks))
        self.bn, self.relu, self.fc = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(3):
            x = self.get_submodule(f"block{i + 1}")(x)
        x = self.relu(self.bn(x))
        return self.fc(x.mean(dim=(2, 3)))


class Listed(nn.Module):
    """Stages in a ModuleList, which is never called itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        self.layers = nn.ModuleList(nn.Sequential(*conv_bn_relu(4, 4, 2)) for _ in range(2))
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean(dim=(2, 3)))


class FunctionallyInPlace(nn.Module):
    """In-place ReLUs that are no modules: what the BatchNorms returned is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, _ = conv_bn_relu(3, 4)
        self.conv2, self.bn2, _ = conv_bn_relu(4, 4, 2)
        self.fc = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.bn2(self.conv2(torch.relu_(self.bn1(self.conv1(x))))))
        return self.fc(x.mean(dim=(2, 3)))


def flat_vgg() -> nn.Module:
    trunk = [*conv_bn_relu(3, 4), nn.MaxPool2d(2), *conv_bn_relu(4, 8), *conv_bn_relu(8, 8), nn.MaxPool2d(2)]
    features = nn.Sequential(*trunk, *conv_bn_relu(8, 8))
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


@pytest.mark.parametrize(
    "spec", ["wrn-10-1", "wrn-16-2", "resnet-18", "vgg-11", "lenet-5", "lenet-5-half", "convnet-4"]
)
def test_our_networks_name_the_stages_that_would_be_found(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = models.build(spec, 10, (3, 32, 32))
    named = module.stages
    monkeypatch.setattr(module, "stages", None, raising=False)
    assert find_stages(module, (3, 32, 32)) == named


@pytest.mark.parametrize(
    ("module", "size", "stages", "sides"),
    [
        (TorchvisionLike(), 64, ("relu", "layer1", "layer2", "layer3", "layer4"), [32, 16, 8, 4, 2]),
        (flat_vgg(), 32, ("0.2", "0.9", "0.13"), [32, 16, 8]),  # the ReLUs: what is before them is overwritten
        (FunctionallyInPlace(), 32, ("conv1", "conv2"), [32, 16]),
        (Preactivated(), 32, ("block1", "block2", "block3"), [32, 16, 8]),
        (Listed(), 32, ("stem", "layers.0", "layers.1"), [32, 16, 8]),
        (Tokens(), 32, (), []),
    ],
    ids=["torchvision", "vgg", "in place", "preactivated", "listed", "tokens"],
)
def test_stages_of_foreign_networks(module: nn.Module, size: int, stages: tuple[str, ...], sides: list[int]) -> None:
    assert find_stages(module, (3, size, size)) == stages
    assert stage_resolutions(module, stages, (3, size, size)) == [(side, side) for side in sides]
    assert all(child.training and not child._forward_hooks for child in module.modules())


def test_observed_outputs_are_the_networks_own() -> None:
    module, x = TorchvisionLike().eval(), torch.randn(2, 3, 64, 64)
    plain: Any = copy.deepcopy(module)
    observer = Observer(module, ("layer1", "layer3"))
    for _ in range(2):  # nothing is left over from the call before
        seen = observer(x)
        first = plain.layer1(plain.maxpool(plain.relu(plain.bn1(plain.conv1(x)))))
        assert torch.equal(seen.logits, plain(x))
        assert [tuple(s.shape[1:]) for s in seen.stages] == [(4, 16, 16), (4, 4, 4)]
        assert torch.equal(seen.stages[0], first)
        assert torch.equal(seen.stages[1], plain.layer3(plain.layer2(first)))
    observer.close()
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


def test_a_stage_that_is_overwritten_in_place_is_refused() -> None:
    observer = Observer(flat_vgg(), ("0.1",))
    with pytest.raises(ZsktError, match="in place"):
        observer(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_moments_and_their_gradients_are_those_of_var_mean(
    layout: torch.memory_format, dtype: torch.dtype, close: float
) -> None:
    exact = (3 * torch.randn(5, 4, 6, 3, dtype=torch.float64) + 2).to(dtype).double().requires_grad_()
    exact.data[:, 0] = 7.0  # a constant channel
    x = exact.detach().to(dtype).contiguous(memory_format=layout).requires_grad_()
    variance, mean = torch.var_mean(exact, dim=(0, 2, 3), correction=0)
    found = channel_moments(x)
    torch.testing.assert_close(found[0].double(), mean, rtol=close / 10, atol=close / 10)
    torch.testing.assert_close(found[1].double(), variance, rtol=close / 10, atol=close / 10)
    weights = torch.randn(2, 4, dtype=torch.float64)
    (mean * weights[0] + variance * weights[1]).sum().backward()
    (found[0] * weights[0].to(found[0].dtype) + found[1] * weights[1].to(found[1].dtype)).sum().backward()
    assert x.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=close, atol=close / 10)


def test_batchnorm_statistics_are_those_of_the_input() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*conv_bn_relu(3, 4), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(180, 3))
    module.insert(5, nn.BatchNorm2d(5, track_running_stats=False))  # remembers nothing: no prior to hold to
    shake_batchnorm(nn.ModuleList(layer for layer in batchnorm_layers(module)))
    module.eval()
    x = 2 + torch.randn(4, 3, 8, 8)
    plain: Any = copy.deepcopy(module)
    observer = Observer(module, statistics=True)
    with torch.no_grad():
        assert observer(x).statistics == []
    for _ in range(2):
        statistics = observer(x).statistics
        assert len(statistics) == 2
        for i, layer in enumerate((1, 4)):
            inputs = plain[:layer](x).detach().numpy()  # (N, C, H, W)
            mean, variance, running_mean, running_variance = (t.detach().numpy() for t in statistics[i])
            np.testing.assert_allclose(mean, inputs.mean(axis=(0, 2, 3)), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(variance, inputs.var(axis=(0, 2, 3)), rtol=1e-4)  # numpy's is the biased one
            assert np.array_equal(running_mean, plain[layer].running_mean.numpy())
            assert np.array_equal(running_variance, plain[layer].running_var.numpy())
    observer.close()
    assert not any(child._forward_pre_hooks for child in module.modules())


def test_calls_by_others_do_not_enter_an_observation() -> None:
    module, x = flat_vgg(), torch.randn(2, 3, 32, 32)
    observer = Observer(module, ("0.2",), statistics=True)
    module(x + 1)  # a callback that looks at the teacher between two steps, say
    seen = observer(x)
    assert len(seen.statistics) == len(batchnorm_layers(module))
    torch.testing.assert_close(seen.statistics[0].mean, module.get_submodule("0.0")(x).mean(dim=(0, 2, 3)))


def test_evaluating_gives_every_submodule_its_mode_back() -> None:
    module = TorchvisionLike()
    module.get_submodule("layer2").eval()
    module.get_submodule("layer2.0.bn1").train()
    before = [child.training for child in module.modules()]

    def interrupted() -> None:
        with evaluating(module):
            assert not any(child.training for child in module.modules())
            assert not torch.is_grad_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert [child.training for child in module.modules()] == before
    assert torch.is_grad_enabled()


def test_operations_of_a_forward() -> None:
    conv = nn.Conv2d(3, 8, 5, stride=2, padding=2)
    assert forward_flops(conv, (3, 12, 20)) == 2 * (8 * 6 * 10) * (3 * 5 * 5)
    assert forward_flops(nn.Linear(100, 64), (100,)) == 2 * 100 * 64
    both = nn.Sequential(conv, nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(480, 7))
    assert forward_flops(both, (3, 12, 20)) == 2 * 480 * 75 + 2 * 480 * 7
    assert int(both.state_dict()["1.num_batches_tracked"]) == 0

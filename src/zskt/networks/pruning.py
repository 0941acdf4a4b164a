"""A student that begins as its teacher without the weakest channels (Li et al. 2017, "Pruning filters for efficient
ConvNets", https://arxiv.org/abs/1608.08710): whole filters go, those of the smallest L1 norm.

Layers that add or normalise one another's maps must keep the same channels. Such channels are a *group*, named after
the layer that makes them first, and their norms are summed over all layers that make the group.
"""

from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zskt.networks.classifier import Classifier
from zskt.networks.models import VGG, ConvNet, LeNet5, ResNet, WideResNet
from zskt.networks.rebuild import describe_module

IMAGE, CLASSES = "image", "classes"
"""Groups that a student shares with its teacher."""


class Layer(NamedTuple):
    """A convolution, linear layer or BatchNorm by name, and the groups of its input and output channels."""

    name: str
    reads: str
    makes: str


def can_prune(teacher: Classifier) -> bool:
    """Whether the teacher is a network of ours, unmodified, or a ResNet of transformers."""
    how = describe_module(teacher.module, teacher.num_classes, teacher.input_size)
    return "spec" in how or how.get("transformers") == "ResNetForImageClassification"


def keep_strongest(teacher: nn.Module, student: nn.Module) -> None:
    """Fill a student, of the teacher's layers and no wider, with the teacher's strongest channels.

    BatchNorm's parameters and running statistics come along.
    """
    theirs, ours = teacher.state_dict(), student.state_dict()
    layers = list(layers_of(teacher))
    kept: dict[str, Tensor] = {}  # group -> channels of the teacher, in their order
    for layer in layers:
        if layer.makes not in kept:
            strongest = norms(layers, theirs, layer.makes).argsort(descending=True, stable=True)
            kept[layer.makes] = strongest[: len(ours[f"{layer.name}.weight"])].sort().values
    with torch.no_grad():
        for layer in layers:
            for name in (name for name in theirs if name.rpartition(".")[0] == layer.name):
                tensor = theirs[name]
                if tensor.ndim:
                    tensor = tensor[kept[layer.makes]]
                if tensor.ndim > 1 and layer.reads != IMAGE:
                    tensor = _inputs(tensor, kept[layer.reads], _width(layers, theirs, layer.reads))
                ours[name].copy_(tensor)


def norms(layers: list[Layer], state: dict[str, Tensor], group: str) -> Tensor:
    """The L1 norm (C,) of the weights that make each channel of a group, summed over the group's layers."""
    made = [state[f"{each.name}.weight"] for each in layers if each.makes == group != each.reads]  # (C, ...) each
    return torch.stack([weight.abs().flatten(1).sum(dim=1) for weight in made]).sum(dim=0)


def _width(layers: list[Layer], state: dict[str, Tensor], group: str) -> int:
    return len(next(state[f"{each.name}.weight"] for each in layers if each.makes == group))


def _inputs(weight: Tensor, kept: Tensor, width: int) -> Tensor:
    """The kept input channels of a weight (O, C, kH, kW), or (O, C x positions) after a map was flattened."""
    by_channel = weight.reshape(len(weight), width, -1)  # (O, C, kH x kW or positions)
    return by_channel[:, kept].reshape(len(weight), -1, *weight.shape[2:])


def layers_of(module: nn.Module) -> Iterator[Layer]:
    """The layers of a network that has weights, in the order of its forward."""
    if isinstance(module, (ConvNet, LeNet5, VGG)):
        yield from _chain(module, "", IMAGE, CLASSES)
    elif isinstance(module, WideResNet):
        yield Layer("conv1", IMAGE, stream := "conv1")
        for name in _blocks(module, "shortcut"):
            block, into = module.get_submodule(name), stream
            yield Layer(f"{name}.bn1", into, into)
            if block.shortcut is not None:
                yield Layer(f"{name}.shortcut", into, stream := f"{name}.shortcut")
            yield Layer(f"{name}.conv1", into, f"{name}.conv1")
            yield Layer(f"{name}.bn2", f"{name}.conv1", f"{name}.conv1")
            yield Layer(f"{name}.conv2", f"{name}.conv1", stream)
        yield Layer("bn1", stream, stream)
        yield Layer("fc", stream, CLASSES)
    elif isinstance(module, ResNet):
        yield Layer("conv1", IMAGE, stream := "conv1")
        yield Layer("bn1", stream, stream)
        for name in _blocks(module, "downsample"):
            block, into = module.get_submodule(name), stream
            if block.downsample is not None:
                yield Layer(f"{name}.downsample.0", into, stream := f"{name}.downsample.0")
                yield Layer(f"{name}.downsample.1", stream, stream)
            yield Layer(f"{name}.conv1", into, f"{name}.conv1")
            yield Layer(f"{name}.bn1", f"{name}.conv1", f"{name}.conv1")
            yield Layer(f"{name}.conv2", f"{name}.conv1", stream)
            yield Layer(f"{name}.bn2", stream, stream)
        yield Layer("fc", stream, CLASSES)
    else:  # transformers' ResNet
        stream = yield from _chain(module, "resnet.embedder", IMAGE)
        for name in _blocks(module, "shortcut"):
            into = stream
            if any(True for _ in module.get_submodule(f"{name}.shortcut").parameters()):
                stream = yield from _chain(module, f"{name}.shortcut", into)
            yield from _chain(module, f"{name}.layer", into, stream)
        yield from _chain(module, "classifier", stream, CLASSES)


def _blocks(module: nn.Module, shortcut: str) -> list[str]:
    """Names of the residual blocks, which have a `shortcut`, if only None."""
    return [name for name, block in module.named_modules() if hasattr(block, shortcut)]


def _chain(module: nn.Module, prefix: str, reads: str, makes: str | None = None) -> Generator[Layer, None, str]:
    """Layers one after the other, the last weights of which make the group `makes`; returns the group they end with."""
    found = module.get_submodule(prefix).named_modules(prefix=prefix)
    inside = {name: layer for name, layer in found if isinstance(layer, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))}
    last = [name for name, layer in inside.items() if not isinstance(layer, nn.BatchNorm2d)][-1]
    group = reads
    for name, layer in inside.items():
        if isinstance(layer, nn.BatchNorm2d):
            yield Layer(name, group, group)
        else:
            into, group = group, makes if makes and name == last else name
            yield Layer(name, into, group)
    return group

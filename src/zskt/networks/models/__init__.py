"""Small image classifiers of the data-free literature, each `forward(x) -> logits`.

Every network has `spec`, the string that `build` accepts, and `stages`, the names of the submodules whose outputs are
its stage outputs, coarsest last.
"""

import re

from torch import nn

from zskt.errors import UsageError, unknown
from zskt.networks.models.common import WIDTH, Size
from zskt.networks.models.convnet import ConvNet, convnet
from zskt.networks.models.lenet import LeNet5, lenet5
from zskt.networks.models.resnet import ResNet, resnet
from zskt.networks.models.vgg import VGG, vgg11
from zskt.networks.models.wide_resnet import WideResNet, wide_resnet

MOST = 100_000  # classes, channels, or pixels on a side; more are taken for a mistake
SPECS = ("wrn-40-2", "wrn-16-1", "resnet-34", "resnet-18", "vgg-11", "lenet-5", "lenet-5-half", "convnet-32")
"""Examples for `build`, which also accepts any wrn-DEPTH-WIDTH (the width a multiple of 1/16) and convnet-WIDTH,
-WIDTH after resnet-18, resnet-34 and vgg-11, and -raw after a wrn (see `WideResNet`)."""

__all__ = [
    "SPECS",
    "VGG",
    "WIDTH",
    "ConvNet",
    "LeNet5",
    "ResNet",
    "Size",
    "WideResNet",
    "build",
    "convnet",
    "lenet5",
    "resnet",
    "vgg11",
    "wide_resnet",
    "with_same_tensors",
]


def build(spec: str, num_classes: int, input_size: Size) -> nn.Module:
    """A network with random weights for images of `input_size` (C, H, W); UsageError if `spec` is unknown or unfit."""
    if not 2 <= num_classes <= MOST or len(input_size) != 3 or not all(1 <= side <= MOST for side in input_size):
        raise UsageError(
            f"expected 2 to {MOST:,} classes and an input size C H W of 1 to {MOST:,}, found {num_classes} classes "
            f"and {' '.join(map(str, input_size))}; correct them"
        )
    channels = input_size[0]
    if match := re.fullmatch(r"wrn-([0-9]{1,4})-([0-9]{1,4}(?:\.[0-9]{1,4})?)(-raw)?", spec):
        depth, width, raw = int(match[1]), float(match[2]), bool(match[3])
        return wide_resnet(depth, width, num_classes=num_classes, channels=channels, raw=raw)
    if match := re.fullmatch(r"resnet-(18|34)(?:-([0-9]{1,4}))?", spec):
        return resnet(int(match[1]), int(match[2] or WIDTH), num_classes=num_classes, channels=channels)
    if match := re.fullmatch(r"convnet-([0-9]{1,5})", spec):
        return convnet(int(match[1]), num_classes=num_classes, channels=channels)
    if match := re.fullmatch(r"vgg-11(?:-([0-9]{1,4}))?", spec):
        return vgg11(int(match[1] or WIDTH), num_classes=num_classes, input_size=input_size)
    if spec in ("lenet-5", "lenet-5-half"):
        return lenet5(half=spec.endswith("half"), num_classes=num_classes, input_size=input_size)
    raise unknown("model", spec, SPECS)


def with_same_tensors(spec: str) -> list[str]:
    """Other networks whose tensors have the names and shapes of this one's, and that compute something else."""
    if re.fullmatch(r"wrn-[0-9.]+-[0-9.]+(-raw)?", spec):
        return [spec.removesuffix("-raw") if spec.endswith("-raw") else f"{spec}-raw"]
    return []

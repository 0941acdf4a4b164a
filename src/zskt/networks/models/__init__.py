"""The field's small image classifiers that no library ships, each `forward(x) -> logits` and nothing else.

Every network carries `spec`, the string that `build` rebuilds it from, and `stages`, the names of the submodules whose
outputs are its stage outputs, coarsest last.
"""

import re

from torch import nn

from zskt.errors import UsageError, unknown
from zskt.networks.models.convnet import ConvNet, convnet
from zskt.networks.models.lenet import LeNet5, lenet5
from zskt.networks.models.resnet import WIDTH, ResNet, resnet
from zskt.networks.models.size import Size
from zskt.networks.models.vgg import VGG, vgg11
from zskt.networks.models.wide_resnet import WideResNet, wide_resnet

MOST = 100_000
"""classes, channels or pixels: more than any network here could mean"""
SPECS = ("wrn-40-2", "wrn-16-1", "resnet-34", "resnet-18", "vgg-11", "lenet-5", "lenet-5-half", "convnet-32")
"""Examples of what `build` accepts: wrn-DEPTH-WIDTH and convnet-WIDTH take any fitting number, resnet-18, resnet-34 and
vgg-11 may be followed by another -WIDTH than 64."""

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
]


def build(spec: str, num_classes: int, input_size: Size) -> nn.Module:
    """A freshly initialised network for images of `input_size` = (C, H, W).

    Raises UsageError for an unknown spec or one that does not fit the size.
    """
    if not 2 <= num_classes <= MOST or len(input_size) != 3 or not all(1 <= side <= MOST for side in input_size):
        raise UsageError(
            f"expected at least 2 classes and an input size C H W of positive numbers below {MOST:,}, found "
            f"{num_classes} and {list(input_size)}"
        )
    channels = input_size[0]
    if match := re.fullmatch(r"wrn-([0-9]{1,4})-([0-9]{1,4})", spec):
        return wide_resnet(int(match[1]), int(match[2]), num_classes=num_classes, channels=channels)
    if match := re.fullmatch(r"resnet-(18|34)(?:-([0-9]{1,4}))?", spec):
        return resnet(int(match[1]), int(match[2] or WIDTH), num_classes=num_classes, channels=channels)
    if match := re.fullmatch(r"convnet-([0-9]{1,5})", spec):
        return convnet(int(match[1]), num_classes=num_classes, channels=channels)
    if match := re.fullmatch(r"vgg-11(?:-([0-9]{1,4}))?", spec):
        return vgg11(int(match[1] or WIDTH), num_classes=num_classes, input_size=input_size)
    if spec in ("lenet-5", "lenet-5-half"):
        return lenet5(half=spec.endswith("half"), num_classes=num_classes, input_size=input_size)
    raise unknown("model", spec, SPECS)

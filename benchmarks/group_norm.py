"""A teacher without BatchNorm for the league: a WideResNet with GroupNorm in its place."""

from torch import nn

from zskt.networks import models

GROUPS = 8
"""The narrowest layer has 16 channels: two or more in each group."""


def wide_resnet(
    depth: int = 10, width: int = 2, num_classes: int = 10, size: tuple[int, int, int] = (3, 32, 32)
) -> nn.Module:
    """WRN-depth-width, (N, C, H, W) -> (N, K), whose normalisations see one image at a time."""
    network = models.build(f"wrn-{depth}-{width}", num_classes, size)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, nn.GroupNorm(GROUPS, layer.num_features))
    return network

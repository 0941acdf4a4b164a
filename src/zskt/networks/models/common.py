"""What the networks share: their published width, initialisation, and checks of width and image size."""

from torch import nn

from zskt.errors import UsageError

Size = tuple[int, int, int]  # (C, H, W) of an image

WIDTH = 64  # channels of the first stage of ResNet and VGG, as published


def check_width(spec: str, width: int) -> None:
    """Raise UsageError for a width below 1."""
    if width < 1:
        raise UsageError(f"{spec}: expected a width of at least 1, found {width}")


def check_size(spec: str, input_size: Size, least: int) -> None:
    """Raise UsageError for images with fewer than `least` pixels on a side."""
    if min(input_size[1:]) < least:
        found = " x ".join(map(str, input_size))
        raise UsageError(f"{spec}: expected images of at least {least} x {least}, found {found}; choose another model")


def initialise_convolutions(network: nn.Module) -> None:
    """He initialisation, by fan-out."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

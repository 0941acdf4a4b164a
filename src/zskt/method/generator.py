"""The generator: latent -> image in the teacher's normalised space."""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zskt.networks.observe import forward_flops

WIDTHS = (16, 32, 64, 128)


class Generator(nn.Module):
    """Latent (N, Z) -> image (N, C, H, W).

    A linear layer makes an image of about 8 x 8; two or more convolutions follow, with as many doublings of the
    resolution as the size needs, the last of which interpolates to the exact size. At 3 x 32 x 32 and width 128 this is
    the released ZSKT generator, without the biases of convolutions before a BatchNorm, whose gradient is zero.
    """

    def __init__(
        self, latent: int, size: tuple[int, int, int], width: int = 128, output: nn.Module | None = None
    ) -> None:
        """`latent` is Z, `size` the image's (C, H, W), `width` the channels of the first convolution.

        `output` comes last: by default a BatchNorm over the image's channels, as in the paper, or `Pixels`.
        """
        super().__init__()
        channels, height, self.image_width = size
        self.height = height
        self.latent = latent
        self.doublings = max(0, round(math.log2(min(height, self.image_width) / 8)))
        shrink = 2**self.doublings
        self.start = (width, math.ceil(height / shrink), math.ceil(self.image_width / shrink))

        # Channels halve with every doubling after the first, so that the last layers of large images do not cost more.
        stages = max(2, self.doublings)
        widths = [width] + [max(width >> stage, min(16, width)) for stage in range(stages)]
        self.linear = nn.Linear(latent, math.prod(self.start))
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2, inplace=True))
            for a, b in itertools.pairwise(widths)
        )
        self.conv = nn.Conv2d(widths[-1], channels, 3, padding=1, bias=output is not None)
        self.conv_bn = nn.BatchNorm2d(channels) if output is None else output

    def forward(self, z: Tensor) -> Tensor:
        x = self.linear(z).unflatten(1, self.start)  # (N, width, H / 2^d, W / 2^d)
        x = self.bn(x.contiguous(memory_format=self._memory_format()))
        for left, block in zip(range(len(self.blocks), 0, -1), self.blocks, strict=True):
            if left == 1 and x.shape[2:] != (self.height, self.image_width):
                x = F.interpolate(x, size=(self.height, self.image_width))
            elif left <= self.doublings:
                x = F.interpolate(x, scale_factor=2)
            x = block(x)
        images: Tensor = self.conv_bn(self.conv(x))  # (N, C, H, W)
        return images

    def _memory_format(self) -> torch.memory_format:
        """That of the convolutions' weights; the linear layer's output has none."""
        weight = next(self.blocks.parameters())
        return torch.contiguous_format if weight.is_contiguous() else torch.channels_last


class FreePixels(nn.Module):
    """Stands for a generator where images are optimised themselves: clips them (N, C, H, W) to pixels in [0, 1].

    The gradient of a clipped pixel passes, so that it can return. Source: DeepInversion, which clips after each update.
    """

    low: Tensor
    high: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        """`mean` and `std` are (C, 1, 1)."""
        super().__init__()
        self.register_buffer("low", (0 - mean) / std)
        self.register_buffer("high", (1 - mean) / std)

    def forward(self, x: Tensor) -> Tensor:
        return x + (x.clamp(self.low, self.high) - x).detach()


class Pixels(nn.Module):
    """Makes pixels in [0, 1] of any numbers (N, C, H, W), by a sigmoid, and normalises them."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        """`mean` and `std` are (C, 1, 1)."""
        super().__init__()
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, x: Tensor) -> Tensor:
        return (x.sigmoid() - self.mean) / self.std


def choose_width(latent: int, size: tuple[int, int, int], budget: int) -> int:
    """The widest of WIDTHS whose forward costs at most `budget` operations per image; the narrowest if none does.

    With the forwards of teacher and student as the budget, the generator does not dominate a step: at width 128 it
    takes over 90 % of a step of a LeNet-sized pair.
    """
    fitting = [w for w in WIDTHS if forward_flops(Generator(latent, size, w), (latent,)) <= budget]
    return max(fitting, default=min(WIDTHS))


SAMPLES = 64
"""Pseudo images in a sample: a batch, as the generator runs in train mode."""


def pseudo_images(generator: nn.Module, latent: int, n: int = SAMPLES, seed: int = 0) -> Tensor:
    """Images (n, C, H, W) from latents fixed by `seed`, in the teacher's normalised space.

    The generator runs in train mode, as for the student; its buffers and all random state are left unchanged.
    """
    like = next(generator.parameters())
    z = torch.randn(n, latent, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)  # (n, Z)
    before = {name: buffer.clone() for name, buffer in generator.named_buffers()}
    training = generator.training
    generator.train()
    try:
        with torch.no_grad():
            images: Tensor = generator(z.to(like.device))
            return images
    finally:
        generator.train(training)
        for name, buffer in generator.named_buffers():
            buffer.copy_(before[name])

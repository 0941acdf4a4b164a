"""Random crops and horizontal flips of images.

N images of C x H x W; a view of an image is (top, left, flipped): where its crop begins, in an image padded by
repeating its edge, and whether it is flipped.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zskt.networks import ranks


@dataclass(frozen=True)
class Augmentation:
    """Random crops and flips."""

    random_crop: int
    """pixels of padding around the image that random crops are taken from; 0 = none"""
    horizontal_flip: bool
    """whether half of the images are flipped left to right"""


def random_views(count: int, augmentation: Augmentation, rng: torch.Generator) -> Tensor:
    """Views (N, 3) uint8 drawn from `rng`."""
    corner = torch.randint(0, 2 * augmentation.random_crop + 1, (count, 2), generator=rng, device=rng.device)  # (N, 2)
    flipped = torch.randint(0, 1 + augmentation.horizontal_flip, (count, 1), generator=rng, device=rng.device)  # (N, 1)
    return torch.cat([corner, flipped], dim=1).to(torch.uint8)


def view(images: Tensor, views: Tensor, padding: int) -> Tensor:
    """Each of the images (N, C, H, W) as its view (N, 3) shows it, without gradient."""
    n, channels, height, width = images.shape
    top, left, flipped = views.to(images.device, torch.int64).unbind(dim=1)  # (N,) each
    rows = _along(height, top, padding)  # (N, H)
    columns = _along(width, left, padding)  # (N, W)
    columns = torch.where(flipped.bool().unsqueeze(1), columns.flip(1), columns)
    batch = torch.arange(n, device=images.device).view(n, 1, 1, 1)
    depth = torch.arange(channels, device=images.device).view(1, channels, 1, 1)
    return images[batch, depth, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]  # (N, C, H, W)


def _along(size: int, start: Tensor, padding: int) -> Tensor:
    """Indices (N, size) of the pixels of crops that begin at `start` (N,), in an image padded by repeating its edge."""
    places = start.unsqueeze(1) + torch.arange(-padding, size - padding, device=start.device)
    return places.clamp(0, size - 1)


def jitter(images: Tensor, augmentation: Augmentation, rng: torch.Generator) -> Tensor:
    """Images (N, C, H, W), all cropped at the same random place and each flipped at random, with gradients.

    One place for the batch, as the gradient of a slice is cheap and that of separate crops is not.
    """
    padding = augmentation.random_crop
    top, left = torch.randint(0, 2 * padding + 1, (2,), generator=rng, device=rng.device).tolist()
    height, width = images.shape[2:]
    x = F.pad(images, (padding,) * 4, mode="replicate")[:, :, top : top + height, left : left + width]
    if not augmentation.horizontal_flip:
        return x
    everywhere = (ranks.size() * len(x), 1, 1, 1)
    flipped = ranks.own(torch.randint(0, 2, everywhere, generator=rng, device=rng.device)).bool()  # (N, 1, 1, 1)
    return torch.where(flipped, x.flip(3), x)

"""Unlabelled images that a user does have, beside the pseudo images: checks, before a run takes them into its bank."""

import hashlib

import torch
from torch import Tensor

from zskt.errors import UsageError, ZsktError
from zskt.evaluate.measures import check_images
from zskt.method.build import METHODS
from zskt.method.config import Config
from zskt.networks.classifier import Classifier


def check_own_images(teacher: Classifier, images: Tensor, config: Config) -> None:
    """Raise UsageError for a method that has no use for images, ZsktError for images (M, C, H, W) that do not fit."""
    refuse_own_images(config)
    check_images(teacher, images)
    if images.dtype != torch.uint8 or not len(images):
        found = f"{len(images)} images of {images.dtype}"
        raise ZsktError(f"expected at least one image and uint8, as a bank stores them, found {found}; convert them")


def refuse_own_images(config: Config) -> None:
    """Raise UsageError unless the method keeps a bank that images of the user's own can join."""
    if config.method != "bank":
        what = f"recipe {config.recipe}" if config.method in METHODS else f"method {config.method}"
        raise UsageError(
            f"expected a recipe with a bank, which --images joins, found {what}, which would not use them; give "
            "--recipe bank or leave out --images"
        )


def fingerprint(images: Tensor | None) -> str:
    """What a resumed run compares: number and SHA-256 of images (M, C, H, W) uint8."""
    if images is None:
        return "none"
    return f"{len(images):,} of {hashlib.sha256(images.cpu().contiguous().numpy().tobytes()).hexdigest()}"

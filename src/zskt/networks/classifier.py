"""An image classifier, teacher or student, with its normalisation, input size and classes."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from zskt.errors import UsageError, ZsktError, failing, printable, short
from zskt.networks import models
from zskt.networks.models import Size
from zskt.networks.observe import answer, batchnorm_layers, blank_images, check_state, evaluating, logits_of

Output = Literal["logits", "probabilities", "log-probabilities"]


class Classifier(nn.Module):
    """A network together with its normalisation, input size and classes; the module is wrapped, not copied.

    `forward` takes *normalised* images (N, C, H, W) and returns logits (N, K); `normalise` makes them from uint8 or
    [0, 1] images. `checks.as_teacher` makes a private, frozen, checked copy for distillation.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        *,
        input_size: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        """`input_size` is (C, H, W); `mean` and `std` have C entries each, for pixels in [0, 1].

        `num_classes` is by default the number of outputs for two blank images. Raises ZsktError for inconsistent
        values.
        """
        super().__init__()
        channels, height, width = checked_size(input_size)
        if not len(mean) == len(std) == channels:
            raise ZsktError(
                f"expected a mean and a standard deviation for each of {channels} channels, found {len(mean)} and "
                f"{len(std)}; give --mean and --std with {channels} numbers each"
            )
        if not all(0 <= m <= 1 for m in mean) or not all(1e-6 <= s <= 1 for s in std):
            raise ZsktError(
                f"expected mean and std of pixels in [0, 1], found {list(mean)} and {list(std)}; divide 0..255 by 255"
            )
        self.input_size: Size = (channels, height, width)
        self.module = module
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float64).view(-1, 1, 1), persistent=False)
        self.training = module.training
        if not num_classes:
            check_state(module, "network")
            with failing("the network cannot be put into eval mode", "fix its train method"), evaluating(module):
                num_classes = answer(module, blank_images(module, self.input_size)).shape[1]
        self.num_classes = num_classes
        self.class_names = tuple(map(printable, class_names)) if class_names is not None else None
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ZsktError(
                f"expected a network with {len(self.class_names)} class names, found {self.num_classes} outputs; "
                "check both"
            )
        self.output: Output = "logits"  # what the module returns, according to `checks.probe`
        self.notes: tuple[str, ...] = ()  # what else the user should know about the network
        self.probed: tuple[nn.Module, ...] = ()  # the checked module; in a tuple, so as not to be registered twice

    @classmethod
    def from_pretrained(
        cls, folder_or_repository: str | Path, *, trust: bool = False, revision: str | None = None
    ) -> "Classifier":
        """The classifier in a folder of zskt or transformers, or in a Hugging Face repository "owner/name".

        Only JSON and safetensors files of a repository are downloaded. `trust` lets a zskt folder run the factory that
        it names. Raises ZsktError for what cannot be found or read.
        """
        from zskt.networks.loading import load_pretrained  # here, as loading imports this module

        return load_pretrained(folder_or_repository, trust=trust, revision=revision)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of normalised images (N, C, H, W)."""
        return logits_of(self.module(images))

    def like(self, module: nn.Module) -> "Classifier":
        """Another module, such as a student, with this one's normalisation, input size and classes."""
        return Classifier(
            module,
            input_size=self.input_size,
            mean=self.mean.flatten().tolist(),
            std=self.std.flatten().tolist(),
            num_classes=self.num_classes,
            class_names=self.class_names,
        )

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 or [0, 1] images (N, C, H, W) -> what `forward` takes, on the network's device and in its dtype.

        Raises UsageError for other integers, whose scale is unknown.
        """
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise UsageError(
                f"expected images as uint8 or as fractions in [0, 1], found {images.dtype}; convert, as in "
                "images.to(torch.uint8)"
            )
        like = next((p for p in self.module.parameters() if p.is_floating_point()), torch.zeros(()))
        x = images.to(like.device, like.dtype)
        if images.dtype == torch.uint8:
            x = x / 255
        return (x - self.mean.to(x)) / self.std.to(x)

    def denormalise(self, images: Tensor) -> Tensor:
        """Normalised images (N, C, H, W) -> [0, 1], clipped."""
        return (images * self.std.to(images) + self.mean.to(images)).clamp(0, 1)

    @property
    def has_batchnorm(self) -> bool:
        """Whether any BatchNorm layer has running statistics."""
        return bool(batchnorm_layers(self.module))

    def fingerprint(self) -> str:
        """SHA-256 over names and values of all parameters and buffers, and the normalisation."""
        digest = hashlib.sha256()
        for name, tensor in (*self.module.state_dict().items(), ("mean", self.mean), ("std", self.std)):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def unit_normalisation(
    mean: Sequence[float], std: Sequence[float], *, white: float | None = None, where: Path | str | None = None
) -> tuple[Sequence[float], Sequence[float], tuple[str, ...]]:
    """Mean and standard deviation of pixels in [0, 1], one each per channel, and notices for the user.

    `white` is the value of a white pixel on their scale; None means 255 if values exceed 1. `where` is what they were
    read from, None for --mean and --std. Raises ZsktError, UsageError for options, for numbers that fit neither scale
    or do not match.
    """
    values = (*mean, *std)
    if where is None:
        given = f"--mean {' '.join(f'{value:g}' for value in mean)} --std {' '.join(f'{value:g}' for value in std)}"
    else:
        given = short(f"{where}: mean {list(mean)} and std {list(std)}", 300)
    kind = UsageError if where is None else ZsktError
    if len(mean) != len(std) or not all(abs(value) < math.inf for value in values):  # rejects NaN, too
        raise kind(f"{given}: expected as many numbers in both, one per channel; correct them")
    notices: tuple[str, ...] = ()
    if white is None:
        white = 1 if max(values, default=0) <= 1 else 255
        if white == 255 and any(0 < value < 1 or not 0 <= value <= 255 for value in values):
            raise kind(f"{given}: expected all in [0, 1] or all in 0..255, found both or neither")
        if white == 255:
            notices = (f"{given} read as 0..255 and divided by 255",)
    if white != 1:
        mean, std = [value / white for value in mean], [value / white for value in std]
    if not all(0 <= value <= 1 for value in mean) or not all(1e-6 <= value <= 1 for value in std):
        raise kind(f"{given}: expected mean in [0, 1] and std in (0, 1] for pixels in [0, 1]; correct them")
    return mean, std, notices


def checked_size(size: Sequence[int]) -> Size:
    """`size` as (C, H, W); raises ZsktError unless it is three positive numbers of a reasonable size."""
    if len(size) != 3 or min(size) < 1 or max(size) > models.MOST:
        raise ZsktError(f"expected an input size of three positive numbers C H W, found {short(list(size))}")
    return size[0], size[1], size[2]


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, buffers not counted."""
    return sum(p.numel() for p in module.parameters())

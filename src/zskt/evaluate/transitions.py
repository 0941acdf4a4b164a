"""Belief matching near decision boundaries: transition curves and their mean error. ZSKT, Algorithm 2 and eq. 2.

M images, K classes. From an image on which two networks agree, plain gradient steps on one network's loss lead to every
other class; how far apart are the two networks' probabilities of that class along the path?
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zskt.errors import UsageError, ZsktError
from zskt.evaluate.measures import check_images, check_networks
from zskt.networks.classifier import Classifier
from zskt.networks.observe import at_least_float32, layout

Progress = Callable[[int, int], None]  # called with (paths done, total)

EXAMPLES = 8  # number of images whose individual curves are kept, for plots


@dataclass(frozen=True)
class Paths:
    """How images are followed into the other classes."""

    images: int = 1_000
    """images to follow, drawn from those on which both networks agree"""
    steps: int = 100
    """gradient steps towards each class, K in the paper"""
    step_size: float = 1.0
    """size of a gradient step in the stepped network's normalised space, xi in the paper"""
    stepped: Literal["first", "second"] = "first"
    """the network whose gradient is followed"""
    start: Literal["prediction", "label"] = "prediction"
    """the class that a path starts from: the common prediction (the paper) or the label (the released code)"""
    seed: int = 0
    """for the choice of images"""
    batch_size: int = 128
    """paths followed together; smaller needs less memory"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is faster where the hardware supports it and changes the error slightly, see docs/method.md"""

    def __post_init__(self) -> None:
        for name in ("images", "steps", "step_size", "batch_size"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} = {getattr(self, name)}: expected a positive number")


@dataclass(frozen=True)
class Transitions:
    """Two networks' beliefs along the paths from M images to all other classes, over S steps.

    Averages are over an image's K - 1 target classes; k = 0 is the original image.
    """

    first: Tensor  # (M, S) mean probability of the target class, first network
    second: Tensor  # (M, S) the same, second network
    gaps: Tensor  # (M, S) mean |first - second|
    starts: Tensor  # (M,) start class of each image
    examples: Tensor  # (2, E, K - 1, S) both curves of the first E images; target t is class starts + 1 + t mod K
    images: Tensor  # (E, C, H, W) those images, as given

    @property
    def error(self) -> float:
        """Mean transition error, eq. 2: the mean |p_first - p_second| over images, classes and steps."""
        return float(self.gaps.double().mean())


def transition_curves(
    first: Classifier,
    second: Classifier,
    images: Tensor,
    starts: Tensor,
    paths: Paths | None = None,
    *,
    progress: Progress = lambda done, total: None,
) -> Transitions:
    """Follow images (M, C, H, W) from their classes `starts` (M,) to every other class.

    Plain gradient steps on the stepped network's cross-entropy towards the target, in that network's normalised space;
    the other network sees the same image in its own normalisation. Paths of any images and classes are followed
    together, which bounds the memory. Source: ZSKT, Algorithm 2.
    """
    how = paths or Paths()
    steps = how.steps
    check_networks(first, second)
    check_images(first, images)
    walker, watcher = (first, second) if how.stepped == "first" else (second, first)
    device, classes, count, starts = walker.mean.device, walker.num_classes, len(images), starts.cpu()
    formats = [layout(network.module, network.input_size) for network in (walker, watcher)]
    autocast = torch.autocast(device.type, torch.bfloat16) if how.precision == "bf16" else contextlib.nullcontext()

    total = count * (classes - 1)
    sums = torch.zeros(3, count, steps, dtype=torch.float64)  # of first, second and |first - second|
    examples = torch.zeros(2, min(EXAMPLES, count), classes - 1, steps)
    even = -(-total // -(-total // how.batch_size))  # the same number of batches, of nearly equal size
    for chunk in torch.split(torch.arange(total), even):
        image, turn = chunk // (classes - 1), chunk % (classes - 1)  # (B,) each
        target = ((starts[image] + 1 + turn) % classes).to(device)  # (B,)
        x = walker.normalise(images[image])  # (B, C, H, W)
        curves = torch.zeros(2, len(chunk), steps, dtype=torch.float64, device=device)
        for k in range(steps):
            x = x.detach().contiguous(memory_format=formats[0]).requires_grad_()
            with torch.enable_grad(), autocast:
                logits = walker(x)  # (B, K)
            with torch.no_grad(), autocast:
                others = watcher(renormalised(x, walker, watcher).contiguous(memory_format=formats[1]))  # (B, K)
            curves[0, :, k] = believed(logits.detach(), target)
            curves[1, :, k] = believed(others, target)
            if k + 1 < steps:
                with torch.enable_grad():
                    # A sum, so that each image takes the step that it would take alone.
                    loss = F.cross_entropy(at_least_float32(logits), target, reduction="sum")  # ()
                x = x.detach() - how.step_size * torch.autograd.grad(loss, x)[0]
        if how.stepped == "second":
            curves = curves.flip(0)
        curves = curves.cpu()
        if not torch.isfinite(curves).all():
            raise ZsktError("a network's output contains NaN along a path to another class; give a smaller --step-size")
        gaps = (curves[0] - curves[1]).abs()  # (B, S)
        for side, values in enumerate((*curves, gaps)):
            sums[side].index_add_(0, image, values)
        kept = image < examples.shape[1]
        examples[:, image[kept], turn[kept]] = curves[:, kept].to(examples)
        progress(int(chunk[-1]) + 1, total)
    p, q, gap = (sums / (classes - 1)).unbind()  # (M, S) each
    return Transitions(p, q, gap, starts, examples, images[:EXAMPLES])


def average_curves(transitions: Transitions) -> dict[str, list[float]]:
    """Mean over images of both networks' curves and its standard error, S numbers each. ZSKT, figure 4."""
    found = {}
    for name, curves in (("first", transitions.first), ("second", transitions.second)):
        std = curves.std(dim=0, correction=min(1, len(curves) - 1))  # (S,)
        found[name] = curves.mean(dim=0).tolist()
        found[f"{name}_standard_error"] = (std / len(curves) ** 0.5).tolist()
    return found


def renormalised(x: Tensor, source: Classifier, target: Classifier) -> Tensor:
    """Images (N, C, H, W) in `source`'s normalisation, converted to `target`'s; exactly x if the two are equal."""
    scale, shift = source.std / target.std, (source.mean - target.mean) / target.std  # (C, 1, 1) each
    return x * scale.to(x) + shift.to(x)


def believed(logits: Tensor, target: Tensor) -> Tensor:
    """The probability (B,) of class `target` (B,) under logits (B, K)."""
    probabilities = logits.double().softmax(dim=1)  # (B, K)
    return probabilities.gather(1, target[:, None]).squeeze(1)

"""Do two networks represent images alike inside? Linear centred kernel alignment of their stages.

N images a minibatch, M images in all; features of any shape, which are flattened.
"""

import contextlib
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from zskt.method.stage_pairs import match
from zskt.networks.classifier import Classifier
from zskt.networks.observe import Observer, at_least_float32, evaluating, find_stages, stage_resolutions

MINIBATCH = 250
"""Images whose features are compared with one another at a time, which bounds the memory."""


class Alignment(NamedTuple):
    """A stage of each network and how alike they represent the images: 1 up to rotation and scale, 0 unrelated."""

    first: str
    second: str
    cka: float | None
    """None where a stage is the same for all images, or there are fewer than four images"""


def stage_alignment(first: Classifier, second: Classifier, images: Tensor) -> list[Alignment]:
    """Linear CKA of every pair of stages of like resolution, finest first, and of the logits.

    Images (M, C, H, W) are uint8 or in [0, 1]; stages pair up as for attention transfer.
    """
    stages = [find_stages(network.module, network.input_size) for network in (first, second)]
    sizes = [
        stage_resolutions(network.module, names, network.input_size)
        for network, names in zip((first, second), stages, strict=True)
    ]
    pairs = [(stages[0][i], stages[1][j]) for i, j in match(*sizes)]
    ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    grams: list[list[tuple[Tensor, Tensor]]] = [[] for _ in (*ours, "logits")]
    even = -(-len(images) // -(-len(images) // MINIBATCH))  # as many minibatches as needed, of nearly equal size
    with contextlib.ExitStack() as stack:
        observers = [
            stack.enter_context(contextlib.closing(Observer(network.module, names)))
            for network, names in ((first, ours), (second, theirs))
        ]
        for network in (first, second):
            stack.enter_context(evaluating(network))
        for batch in torch.split(images, even):
            if len(batch) < 4:
                continue
            sides = []
            for network, observer in zip((first, second), observers, strict=True):
                seen = observer(network.normalise(batch))
                sides.append([gram(features) for features in (*seen.stages, seen.logits)])  # (N, N) each
            for entry, pair in zip(grams, zip(*sides, strict=True), strict=True):
                entry.append(pair)
    named = [*pairs, ("logits", "logits")]
    return [Alignment(*pair, cka(entry)) for pair, entry in zip(named, grams, strict=True)]


def gram(features: Tensor) -> Tensor:
    """Inner products (N, N) of features (N, ...), less their mean, on the CPU in float64."""
    x = at_least_float32(features).flatten(1)  # (N, D)
    x = x - x.mean(dim=0)  # HSIC does not change, but digits are not lost to a large common part
    return (x @ x.T).double().cpu()


def cka(grams: Iterable[tuple[Tensor, Tensor]]) -> float | None:
    """Minibatch CKA: mean HSIC(K, L) / sqrt(mean HSIC(K, K) mean HSIC(L, L)) over minibatches' Grams (N, N).

    With the unbiased estimator of HSIC, so that the result depends neither on the size of the minibatches nor on how
    many more features there are than images; the plain estimator is close to 1 for unrelated features if those are
    many. None if either side is constant. Source: Kornblith et al. 2019; Nguyen, Raghu and Kornblith 2021.
    """
    across = first = second = 0.0
    for a, b in grams:
        across, first, second = across + hsic(a, b), first + hsic(a, a), second + hsic(b, b)
    return across / math.sqrt(first * second) if first > 0 and second > 0 else None


def hsic(first: Tensor, second: Tensor) -> float:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion from Grams (N, N), N >= 4.

    (tr(K L) + sum(K) sum(L) / ((n - 1) (n - 2)) - 2 sum(K L) / (n - 2)) / (n (n - 3)), with zeros on both diagonals.
    Source: Song et al. 2012.
    """
    n = len(first)
    a, b = (x.clone().fill_diagonal_(0) for x in (first, second))  # (N, N) each
    rows_a, rows_b = a.sum(dim=1), b.sum(dim=1)  # (N,) each
    total = (a * b).sum() + rows_a.sum() * rows_b.sum() / ((n - 1) * (n - 2)) - 2 * (rows_a @ rows_b) / (n - 2)
    return float(total) / (n * (n - 3))

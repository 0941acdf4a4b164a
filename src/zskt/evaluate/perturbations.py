"""Do two networks still agree away from the test images: under corruptions, and under attacks on either of them?

M images of K classes, all in the space of pixels in [0, 1], where both networks see the same image; each normalises it
itself.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from zskt.evaluate.measures import accuracy, agreement, predict
from zskt.method.views import view
from zskt.networks.classifier import Classifier
from zskt.networks.observe import at_least_float32, evaluating

Done = Callable[[int, int], None]  # called with (images done, total)

SEVERITIES = {"noise": (0.04, 0.08, 0.16), "blur": (0.5, 1.0, 2.0), "shift": (1.0, 2.0, 4.0)}
"""Standard deviation of Gaussian noise on pixels in [0, 1]; that of a Gaussian blur, and the length of a shift, both in
pixels of a 32 x 32 image, and in larger ones in proportion to the shorter side."""

EPSILON = 8 / 255
"""Largest change of a pixel in [0, 1] by an attack."""
ATTACKS = {"fgsm": 1, "pgd": 10}
"""Gradient steps: one of the whole size, or ten of a quarter of it."""


def corrupted(images: Tensor, kind: str, severity: float, seed: int = 0) -> Tensor:
    """Images (M, C, H, W), uint8 or in [0, 1], with a corruption of SEVERITIES; float32 in [0, 1].

    A shift goes up, down, left or right, for each image at random, and repeats the edge; a blur repeats the edge, too.
    """
    x = images / 255 if images.dtype == torch.uint8 else images.float()  # (M, C, H, W)
    rng = torch.Generator().manual_seed(seed)
    pixels = severity * min(x.shape[2:]) / 32
    if kind == "noise":
        return (x + severity * torch.randn(x.shape, generator=rng).to(x.device)).clamp(0, 1)
    if kind == "blur":
        return blurred(x, pixels)
    distance = max(1, round(pixels))
    corners = distance + distance * torch.tensor(
        [[-1, 0], [1, 0], [0, -1], [0, 1]]
    )  # (4, 2), of crops of padded images
    chosen = corners[torch.randint(4, (len(x),), generator=rng)]  # (M, 2)
    return view(x, F.pad(chosen, (0, 1)), distance)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Images (M, C, H, W) convolved with a Gaussian of standard deviation `sigma` pixels, cut at 4 sigma."""
    reach = max(1, round(4 * sigma))
    places = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    weights = torch.softmax(-(places**2) / (2 * sigma**2), dim=0)  # (2 reach + 1,)
    flat = images.flatten(0, 1).unsqueeze(1)  # (M C, 1, H, W)
    padded = F.pad(flat, (reach,) * 4, mode="replicate")
    across = F.conv2d(padded, weights.view(1, 1, 1, -1))
    return F.conv2d(across, weights.view(1, 1, -1, 1)).view_as(images)


def under_corruption(
    first: Classifier,
    second: Classifier,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    seed: int = 0,
    done: Done = lambda done, total: None,
) -> dict[str, list[dict[str, float]]]:
    """Agreement, and given labels (M,) both accuracies, by corruption and severity; images (M, C, H, W)."""
    total = len(images) * sum(map(len, SEVERITIES.values()))
    found: dict[str, list[dict[str, float]]] = {}
    for kind, severities in SEVERITIES.items():
        found[kind] = []
        for severity in severities:
            seen = corrupted(images, kind, severity, seed)
            logits, answers = predict(first, seen), predict(second, seen)  # (M, K) each
            entry = {"severity": severity, "agreement": agreement(logits, answers)}
            if labels is not None:
                entry |= {"accuracy": accuracy(logits, labels), "teacher_accuracy": accuracy(answers, labels)}
            found[kind].append(entry)
            done(len(images) * sum(map(len, found.values())), total)
    return found


def attacked(
    network: Classifier, images: Tensor, classes: Tensor, *, epsilon: float = EPSILON, steps: int = 1
) -> Tensor:
    """Images (M, C, H, W) in [0, 1], changed by at most `epsilon` a pixel to lead the network away from `classes` (M,).

    One step along the sign of the cross-entropy's gradient in the pixels (FGSM, Goodfellow et al. 2015), or several of
    2.5 epsilon / steps, each followed by a projection (PGD, Madry et al. 2018, here from the image itself).
    """
    start = images / 255 if images.dtype == torch.uint8 else images  # (M, C, H, W)
    x, size = start, epsilon if steps == 1 else 2.5 * epsilon / steps
    with evaluating(network):
        for _ in range(steps):
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                logits = network(network.normalise(x))  # (M, K)
                loss = F.cross_entropy(at_least_float32(logits), classes.to(logits.device), reduction="sum")  # ()
            x = x.detach() + size * torch.autograd.grad(loss, x)[0].sign()
            x = torch.minimum(torch.maximum(x, start - epsilon), start + epsilon).clamp(0, 1)
    return x.detach()


def transfer(
    source: Classifier,
    target: Classifier,
    images: Tensor,
    classes: Tensor,
    *,
    batch_size: int = 100,
    done: Done = lambda done, total: None,
) -> dict[str, dict[str, float | None]]:
    """What attacks on `source` do to `target`: images (M, C, H, W) that both take for `classes` (M,).

    By attack of ATTACKS: the share of images on which the source no longer answers the class (`fooled`), the share of
    these on which the target no longer does either (`transferred`; None if there are none), and the agreement of the
    two on all attacked images, whatever they answer. Equal networks have 1 in the last two.
    """
    found: dict[str, dict[str, float | None]] = {}
    for name, steps in ATTACKS.items():
        answers: list[tuple[Tensor, Tensor]] = []
        batches = zip(torch.split(images, batch_size), torch.split(classes, batch_size), strict=True)
        for number, (batch, given) in enumerate(batches):
            x = attacked(source, batch, given, steps=steps)  # (B, C, H, W)
            answers.append((predict(source, x), predict(target, x)))  # (B, K) each
            before = sum(ATTACKS[earlier] for earlier in found) * len(images)
            done(before + steps * min(len(images), (number + 1) * batch_size), sum(ATTACKS.values()) * len(images))
        first, second = (torch.cat(side) for side in zip(*answers, strict=True))  # (M, K) each
        fooled, too = (side.argmax(dim=1) != classes.cpu() for side in (first, second))  # (M,) each
        found[name] = {
            "fooled": float(fooled.double().mean()),
            "transferred": float(too[fooled].double().mean()) if bool(fooled.any()) else None,
            "agreement": agreement(first, second),
        }
    return found

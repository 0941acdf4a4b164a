"""How close are two networks' beliefs? Measures on image tensors, and on pseudo images, which need no data.

M images, K classes. Images are uint8 or in [0, 1]; a network includes its normalisation (`Classifier`). Beliefs near
decision boundaries are in `transitions.py`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zskt.errors import ZsktError
from zskt.networks.classifier import Classifier
from zskt.networks.observe import evaluating, layout

CALIBRATION_BINS = 15
RESAMPLES = 1_000


def check_images(network: Classifier, images: Tensor, labels: Tensor | None = None) -> None:
    """Raise ZsktError unless images (M, C, H, W), uint8 or in [0, 1], and labels (M,) fit a network."""
    for what, tensor in (("images", images), ("labels", labels)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise ZsktError(f"expected {what} as a torch.Tensor, found {type(tensor).__name__}; use torch.as_tensor")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ZsktError(f"expected images of uint8 or floating point, found {images.dtype}; convert them by .byte()")
    if images.is_floating_point() and images.numel() and not 0 <= images.amin() <= images.amax() <= 1:
        found = f"{float(images.amin()):.4g} to {float(images.amax()):.4g}"
        raise ZsktError(f"expected floating-point images in [0, 1], found {found}; divide 0..255 by 255")
    if tuple(images.shape[1:]) != network.input_size:
        expected, found = (" x ".join(map(str, s)) for s in (network.input_size, images.shape[1:]))
        raise ZsktError(f"expected images of {expected}, found {found}; resize them or give other data")
    if labels is None:
        return
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        found = f"shape {tuple(labels.shape)} of {labels.dtype}"
        raise ZsktError(f"expected labels as class numbers (M,), found {found}; of one-hot labels, take argmax(1)")
    if len(labels) != len(images) or not len(labels):
        found = f"{len(images)} images and {len(labels)} labels"
        raise ZsktError(f"expected at least one image and a label for each, found {found}; check the data")
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= network.num_classes:
        raise ZsktError(
            f"expected labels of {network.num_classes} classes, found label {lowest if lowest < 0 else highest}; give "
            "data with the network's classes"
        )


def check_networks(first: Classifier, second: Classifier) -> None:
    """Raise ZsktError unless two networks have equally many classes and take images of the same size."""
    if first.num_classes != second.num_classes:
        a, b = first.num_classes, second.num_classes
        raise ZsktError(f"expected networks of equal class count, found {a} and {b}; compare networks for one task")
    if first.input_size != second.input_size:
        size, other = (" x ".join(map(str, network.input_size)) for network in (first, second))
        raise ZsktError(
            f"expected networks for images of equal size, found {size} and {other}; compare networks for one task"
        )


def predict(network: Classifier, images: Tensor, *, batch_size: int = 500) -> Tensor:
    """Logits (M, K) of images (M, C, H, W), on the CPU, in float32 or float64; the network's state does not change."""
    check_images(network, images)
    memory_format = layout(network.module, network.input_size)
    batches = []
    with evaluating(network):
        for batch in torch.split(images, batch_size):
            batches.append(network(network.normalise(batch).contiguous(memory_format=memory_format)).cpu())
    logits = torch.cat(batches)  # (M, K)
    if bad := int((~torch.isfinite(logits)).any(dim=1).sum()):
        raise ZsktError(
            f"the network's output contains NaN or infinity for {bad:,} of {len(images):,} images; check its weights"
        )
    return logits if logits.dtype == torch.float64 else logits.float()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Fraction of images whose predicted class is their label; logits (M, K), labels (M,)."""
    return float((logits.argmax(dim=1) == labels).double().mean())


def agreement(first: Tensor, second: Tensor) -> float:
    """Fraction of images on which two networks predict the same class; logits (M, K) each."""
    return float((first.argmax(dim=1) == second.argmax(dim=1)).double().mean())


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """Expected calibration error: mean |confidence - accuracy| over 15 equal-width bins of confidence, by count.

    Logits (M, K), labels (M,). Source: Guo et al. 2017.
    """
    confidence, prediction = logits.double().softmax(dim=1).max(dim=1)  # (M,), (M,)
    right = (prediction == labels).double()  # (M,)
    bins = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1  # (M,), upper edge inclusive
    gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add(0, bins, confidence - right)  # (bins,)
    return float(gaps.abs().sum() / len(labels))


def measure(network: Classifier, images: Tensor, labels: Tensor, teacher: Classifier | None = None) -> dict[str, float]:
    """Accuracy and calibration error and, given a teacher, agreement (all in [0, 1]) and KL both ways (nats)."""
    check_images(network, images, labels)
    if teacher is not None:
        check_networks(network, teacher)
    answers = None if teacher is None else predict(teacher, images)  # (M, K)
    return judge(predict(network, images), labels, answers)


def judge(logits: Tensor, labels: Tensor, answers: Tensor | None = None) -> dict[str, float]:
    """The result of `measure`, from logits (M, K), labels (M,) and the teacher's logits `answers` (M, K)."""
    labels = labels.cpu()  # as the logits of `predict` are
    result = {"accuracy": accuracy(logits, labels), "calibration_error": calibration_error(logits, labels)}
    if answers is not None:
        result |= {name: float(value.mean()) for name, value in per_image(logits, answers, labels).items()}
    return result


def per_image(logits: Tensor, answers: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """The per-image values that `judge` averages: name -> (M,); logits (M, K) of student and teacher."""
    student, teacher = F.log_softmax(logits.double(), dim=1), F.log_softmax(answers.double(), dim=1)  # (M, K) each
    values = {
        "agreement": logits.argmax(dim=1) == answers.argmax(dim=1),
        "kl_teacher_student": (teacher.exp() * (teacher - student)).sum(dim=1),
        "kl_student_teacher": (student.exp() * (student - teacher)).sum(dim=1),
    }
    if labels is not None:
        values["accuracy"] = logits.argmax(dim=1) == labels
        values["teacher_accuracy"] = answers.argmax(dim=1) == labels
    return {name: value.double() for name, value in values.items()}


def bootstrap(values: Tensor, *, seed: int = 0) -> list[float]:
    """The 95 % percentile interval [low, high] of the mean of values (M,), from 1,000 resamples of the M images."""
    rng = torch.Generator().manual_seed(seed)
    means = [values[torch.randint(len(values), (len(values),), generator=rng)].mean() for _ in range(RESAMPLES)]
    edges = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.stack(means).double().quantile(edges).tolist()
    return [low, high]


def wilson(count: int, total: int) -> tuple[float, float]:
    """The 95 % interval [low, high] of a fraction, of which `count` of `total` were found; not a point where none was.

    (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), with p = count / n, n = total and z = 1.96.
    Source: Wilson 1927.
    """
    z, p = 1.959964, count / total
    middle, reach = p + z**2 / (2 * total), z * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    low, high = (middle - reach) / (1 + z**2 / total), (middle + reach) / (1 + z**2 / total)
    return max(0.0, min(low, p)), min(1.0, max(high, p))  # at 0 and 1, whatever the rounding


def disagreements(
    logits: Tensor, answers: Tensor, class_names: Sequence[str] | None = None, *, most: int = 10
) -> dict[str, Any]:
    """Where student and teacher disagree: logits (M, K) each.

    `disagreement_by_class` is, for each class, the share of the images predicted so by the teacher on which the student
    disagrees (None if there are none); `most_disagreements` are the most frequent pairs.
    """
    classes = logits.shape[1]
    pairs = answers.argmax(dim=1) * classes + logits.argmax(dim=1)  # (M,)
    counts = torch.bincount(pairs, minlength=classes**2).view(classes, classes)  # (K, K), teacher x student
    seen, same = counts.sum(dim=1).tolist(), counts.diagonal().tolist()
    names = class_names or [str(k) for k in range(classes)]
    off = counts.clone().fill_diagonal_(0).flatten()  # (K * K,)
    top = [(int(i) // classes, int(i) % classes) for i in off.topk(min(most, len(off))).indices if off[i]]
    return {
        "disagreement_by_class": [1 - s / n if n else None for s, n in zip(same, seen, strict=True)],
        "most_disagreements": [{"teacher": names[t], "student": names[s], "images": int(counts[t, s])} for t, s in top],
    }


def pseudo_beliefs(teacher_logits: Tensor, student_logits: Tensor) -> dict[str, Any]:
    """Both networks' beliefs about a pseudo batch; logits (N, K) each.

    `*_confidence` is the mean maximum probability; `class_counts` (K numbers) counts the teacher's predicted classes,
    `student_class_counts` the student's; `*class_entropy` is the normalised class entropy, that of these counts divided
    by log min(N, K): 1 is uniform, 0 a single class.
    """
    found: dict[str, Any] = {"pseudo_agreement": agreement(teacher_logits, student_logits)}
    for who, prefix, logits in (("teacher", "", teacher_logits), ("student", "student_", student_logits)):
        probabilities = logits.float().softmax(dim=1)  # (N, K)
        counts = torch.bincount(probabilities.argmax(dim=1), minlength=probabilities.shape[1]).float()  # (K,)
        share = counts / counts.sum()
        entropy = float(-torch.xlogy(share, share).sum()) / math.log(min(probabilities.shape))
        found[f"{who}_confidence"] = float(probabilities.amax(dim=1).mean())
        found[f"{prefix}class_entropy"] = max(0.0, entropy)  # not -0.0
        found[f"{prefix}class_counts"] = [int(count) for count in counts]
    return found


VANISHED = 1e-3
"""Mean KL (nats) on a searching generator's images below which there is nothing left to learn from them."""


def pseudo_image_warnings(beliefs: Mapping[str, Any], progress: float = 1.0) -> dict[str, str]:
    """Warnings, by their kind, from an evaluation's `pseudo_beliefs` and `pseudo_variation`; none estimates accuracy.

    `adversary_kl` is there if a generator that searches for disagreement made the images: their mean KL, in nats.
    `progress` is the fraction of the run that is done: what is a failure at the end is how a student begins.
    """
    classes = len(beliefs["class_counts"])
    seen = sum(count > 0 for count in beliefs["class_counts"])
    chance = 1 / classes + 0.5 / classes * (1 - 1 / classes)  # with two classes, twice the deviation of 64 coins
    found = {}
    if beliefs["class_entropy"] < 0.5:
        found["collapse"] = (
            f"collapse: the teacher predicts {seen} of {classes} classes on the pseudo images, most of them in very "
            "few; start again with a lower generator.learning_rate or a higher generator.loss.balance"
        )
    if beliefs["teacher_confidence"] < chance:
        found["unrecognised"] = (
            "the teacher recognises nothing in the pseudo images: its confidence is close to chance; set "
            "generator.loss.one_hot or check the normalisation"
        )
    if beliefs.get("pseudo_variation", 1.0) < 0.01:
        found["dead generator"] = (
            "dead generator: the pseudo images are nearly all the same; start again with a lower "
            "generator.learning_rate"
        )
    if progress < 0.75 and beliefs.get("adversary_kl", 1.0) < VANISHED:
        found["vanished adversary"] = (
            "vanished adversary: the generator finds nothing on which the networks differ, so the student learns "
            "nothing more; raise generator.learning_rate, or stop here"
        )
    if progress >= 0.25 and beliefs["pseudo_agreement"] < chance:
        found["chance"] = (
            "the student agrees with the teacher no more than by chance; change student.learning_rate, by a factor of 3"
        )
    elif progress == 1.0 and beliefs["pseudo_agreement"] < 0.5:
        found["disagreement"] = (
            "the student disagrees with the teacher on most pseudo images: try more steps or a larger student"
        )
    return found


def new_warnings(past: Sequence[Mapping[str, Any]], now: Mapping[str, Any], progress: float) -> list[str]:
    """Warnings that hold now and at the evaluation before, as one may be chance, and that no line of `past` has."""
    if not past:
        return []
    said = {text.split(":")[0] for line in past for text in line.get("warnings", [])}
    before, found = pseudo_image_warnings(past[-1], progress), pseudo_image_warnings(now, progress)
    return [text for kind, text in found.items() if kind in before and text.split(":")[0] not in said]


def noise_classes(network: Classifier, count: int = 1_000, seed: int = 0) -> list[int]:
    """How many of `count` images of uniform noise a network assigns to each class (K numbers). ZSKT, figure 5."""
    noise = torch.rand(count, *network.input_size, generator=torch.Generator().manual_seed(seed))
    counts = torch.bincount(predict(network, noise, batch_size=100).argmax(dim=1), minlength=network.num_classes)
    return [int(number) for number in counts]

"""The terms of the generator's and the student's losses: pure functions of logits, stage outputs and images.

N batch, K classes, C x H x W images. Logits (N, K); all functions return a scalar () and compute in at least float32,
whatever precision the networks ran in, but for the squares of `attention_map`. Weights and signs belong to the caller:
minus a divergence is an adversary.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zskt.errors import ZsktError
from zskt.networks import ranks
from zskt.networks.observe import Observation, Resolution, at_least_float32

Scale = Literal["per_class", "batchmean"]


def forward_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    scale: Scale = "batchmean",
    weights: Tensor | None = None,
) -> Tensor:
    """T^2 mean_n w_n sum_k t_nk (log t_nk - log s_nk), with t and s the softmax of logits (N, K) over temperature T.

    `weights` w (N,) are 1 by default.

    `per_class` divides by K too: what the released ZSKT code's `kl_div(reduction='mean')` does, and what its attention
    weight of 250 is relative to. `batchmean` is the true mean divergence in nats. Source: ZSKT eq. 1; T^2 after Hinton
    et al. 2015.
    """
    log_student = F.log_softmax(at_least_float32(student) / temperature, dim=1)  # (N, K)
    log_teacher = F.log_softmax(at_least_float32(teacher) / temperature, dim=1)  # (N, K)
    if weights is None:
        divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2
    else:
        each = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)  # (N,)
        divergence = (weights * each).mean() * temperature**2
    return divergence / student.shape[1] if scale == "per_class" else divergence


def agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """Weights (N,): 1 where the logits (N, K) of both put an image in the same class, else 0. Source: CMI, Fast, NAYER.

    An adversary weighted by them looks for images that the student is unsure about, not for those it gets wrong.
    """
    return (student.argmax(dim=1) == teacher.argmax(dim=1)).to(at_least_float32(student).dtype)


def l1_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_nk |s_nk - t_nk| of the logits (N, K). Source: DFAD (Fang et al. 2019), DFME (Truong et al. 2021)."""
    return (at_least_float32(student) - at_least_float32(teacher)).abs().mean()


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    """mean_n [KL(m || t) + KL(m || s)] / 2 with m = (t + s) / 2, of logits (N, K) at temperature 3, in nats.

    The probabilities t, s and m are clipped to [.01, .99], where the gradient ends. Source: DeepInversion's and CMI's
    code; a Jensen-Shannon divergence has its mean on the other side of the KL.
    """
    sides = [F.softmax(at_least_float32(logits) / 3, dim=1) for logits in (student, teacher)]  # (N, K)
    middle = torch.stack(sides).mean(dim=0).clamp(0.01, 0.99)  # (N, K)
    halves = [F.kl_div(side.clamp(0.01, 0.99).log(), middle, reduction="batchmean") for side in sides]
    return torch.stack(halves).mean()


def attention_map(features: Tensor, size: Resolution | None = None) -> Tensor:
    """Mean over channels of the squared activations (N, C, H, W), as a unit vector per image: (N, H W).

    With a `size` other than (H, W) the map is first averaged down to it. Squares of bfloat16 are rounded to it, which
    spares copies of all activations; everything from their sum on is in at least float32.
    """
    # A sum and a division, not a mean, whose gradient would be written out, in contiguous order, for every channel.
    x = features.float() if features.dtype == torch.float16 else features  # whose squares end at 256^2
    maps = x.square().sum(dim=1, dtype=torch.promote_types(x.dtype, torch.float32)) / x.shape[1]  # (N, H, W)
    if size is not None and maps.shape[1:] != size:
        maps = F.adaptive_avg_pool2d(maps, (size[0], size[1]))
    return F.normalize(maps.flatten(1), dim=1)


def common_sizes(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[Resolution, ...]:
    """(H, W) at which each pair of stage outputs (N, C, H, W) is compared: the coarser of both."""
    if not student or len(student) != len(teacher):
        raise ZsktError(
            f"attention transfer needs as many student stages as teacher stages, found {len(student)} and "
            f"{len(teacher)}; set student.loss.attention to 0 or name the stages"
        )
    return tuple(
        (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])) for a, b in zip(student, teacher, strict=True)
    )


def attention_maps(observation: Observation, sizes: tuple[Resolution, ...]) -> list[Tensor]:
    """Attention maps (N, H W) of an observation's first stages at these sizes, worked out once for each observation."""
    return observation.once(
        sizes, lambda: [attention_map(*stage) for stage in zip(observation.stages, sizes, strict=False)]
    )


def attention_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over stages of mean_n,p (a_np - b_np)^2 of attention maps a and b (N, P) at pixels p.

    Source: released ZSKT code (the paper's eq. 1 has a norm in place of the mean square).
    """
    return torch.stack([(a - b).square().mean() for a, b in zip(student, teacher, strict=True)]).sum()


def attention_transfer(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """The distance between the attention maps of stage outputs (N, C, H, W), whose channels may differ within a pair.

    Where H or W differ, the finer map is averaged down to the coarser one; the released code knows equal sizes only.
    """
    sizes = common_sizes(student, teacher)
    maps = ([attention_map(*stage) for stage in zip(stages, sizes, strict=True)] for stages in (student, teacher))
    return attention_distance(*maps)


def batchnorm_prior(statistics: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Tensor:
    """Sum over BatchNorm layers of ||m - running mean||_2 + ||v - running variance||_2, norms over channels.

    `statistics` holds (m, v, running mean, running variance) per layer, each (C,): mean and biased variance of the
    layer's input over the batch. Source: DeepInversion (Yin et al. 2020), as CMI and Fast compute it.
    """
    if not statistics:
        raise ZsktError(
            "the BatchNorm prior needs a teacher with BatchNorm, found none; set generator.loss.batchnorm to 0"
        )
    layers = [
        torch.linalg.vector_norm(mean - running_mean) + torch.linalg.vector_norm(variance - running_variance)
        for mean, variance, running_mean, running_variance in statistics
    ]
    return torch.stack(layers).sum()


def one_hot(teacher: Tensor, labels: Tensor | None = None) -> Tensor:
    """Cross-entropy of the teacher's logits (N, K) to `labels` (N,), or to their own argmax. Source: DAFL, DFQ."""
    logits = at_least_float32(teacher)
    return F.cross_entropy(logits, logits.argmax(dim=1) if labels is None else labels)


def class_balance(teacher: Tensor) -> Tensor:
    """sum_k p_k log p_k of the batch-mean teacher probability p (K,): minus its entropy in nats. Source: DAFL, DFQ."""
    log_probabilities = F.log_softmax(at_least_float32(teacher), dim=1)  # (N, K)
    # By logarithms: a class that no image belongs to underflows to 0, where the gradient of p log p is infinite.
    log_sums = ranks.gather(torch.logsumexp(log_probabilities, dim=0))  # (R, K)
    log_mean = torch.logsumexp(log_sums, dim=0) - math.log(ranks.size() * len(teacher))  # (K,)
    return (log_mean.exp() * log_mean).sum()


def activation(features: Tensor) -> Tensor:
    """Minus the mean absolute value of the teacher's last stage output, of any shape. Source: DAFL."""
    return -at_least_float32(features).abs().mean()


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference to the right, lower and both diagonal neighbours, summed; images (N, C, H, W).

    Source: DeepInversion, with absolute differences.
    """
    x = at_least_float32(images)
    right = x[..., :, 1:] - x[..., :, :-1]
    lower = x[..., 1:, :] - x[..., :-1, :]
    down_right = x[..., 1:, 1:] - x[..., :-1, :-1]
    down_left = x[..., 1:, :-1] - x[..., :-1, 1:]
    # Images of one row or column have no neighbours in some directions: the sum over none is 0, the mean is not.
    return torch.stack([d.abs().sum() / max(1, d.numel()) for d in (right, lower, down_right, down_left)]).sum()

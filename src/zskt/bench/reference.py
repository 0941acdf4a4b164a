"""The released ZSKT loop and transition curves, restated plainly and with their waste: correct results, honest times.

Sources: Micaelli and Storkey, "Zero-shot Knowledge Transfer via Adversarial Belief Matching", NeurIPS 2019
(algorithms 1 and 2), with the settings of the code they released (polo5/ZeroShotKnowledgeTransfer@e24915d), which
decides where the paper is silent; Ferles et al., ReScience 2020, for fresh pseudo batches; open-mmlab/mmrazor's ZSKT
configs for that variant. Written from descriptions of their behaviour; no code is copied.

The point of this file is to be obviously right, not fast: in float64 it is what an optimised engine has to agree with,
and its wall time is the honest "before". So what the released code wastes is wasted here too, on purpose
(for the transition curves see `released_transitions`):

* the generator is run again for every student update, even where latent and weights, and so the images, are unchanged;
* the pseudo batch is not detached, so every student backward also runs through the generator, whose gradients from it
  are thrown away by the zero_grad before the next generator update;
* the teacher's parameters keep requires_grad as given: where it is True, the generator's backward also computes
  weight gradients of the teacher, which nobody reads or clears; those of the student go at its next zero_grad;
* the teacher runs a second time, after the generator update, on the images the student learns from, and the attention
  maps of its stages are recomputed in each of the ten student updates.

Modes, set at the start of each iteration: teacher eval; generator train; student train, in the generator's update too,
so that its BatchNorm statistics see 11 batches per iteration.

    method          latents  KL weight  student's optimiser             generator's  clip  learning rates
    "zskt"          1        1          Adam 2e-3                       Adam 1e-3    5     cosine to 0
    "zskt-fresh"    1 + 10   1          Adam 2e-3                       Adam 1e-3    5     cosine to 0
    "zskt-mmrazor"  1 + 10   2          SGD 0.1, momentum, decay 5e-4   Adam 1e-3    none  x 0.1 at 1/5 and 2/5

Shapes: N batch, Z latent, K classes, D channels of a stage; images and stage outputs are (N, channels, H, W).
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

METHODS = ("zskt", "zskt-fresh", "zskt-mmrazor")
GENERATOR_UPDATES = 1
STUDENT_UPDATES = 10
ATTENTION_WEIGHT = 250.0  # goes with the KL over N * K of `mean_kl`, not with the usual KL over N
CLIP_NORM = 5.0


@dataclass(frozen=True)
class Iteration:
    """What one outer iteration did; every tensor is a detached scalar on the networks' device."""

    generator_losses: list[Tensor]  # one per generator update
    student_losses: list[Tensor]  # one per student update: KL and attention together
    teacher_confidence: Tensor  # () mean over the last pseudo batch of the teacher's maximum probability
    student_confidence: Tensor  # () same for the student, at the last student update's forward


def released_loop(
    teacher: nn.Module,
    student: nn.Module,
    generator: nn.Module,
    draw_latent: Callable[[], Tensor],
    stages: Sequence[str],
    *,
    total: int,
    method: str = "zskt",
) -> Generator[Iteration, None, None]:
    """Train `student` and `generator` in place for `total` outer iterations, yielding after each of them.

    `teacher` and `student` map images to logits; `generator` maps what `draw_latent` returns, (N, Z), to images.
    `stages` names the submodules, of both networks, whose outputs the attention loss compares.
    The caller may stop early, and may change modes and evaluate between two iterations.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    fresh = method != "zskt"
    mmrazor = method == "zskt-mmrazor"
    kl_weight = 2.0 if mmrazor else 1.0
    student_lr, generator_lr = (0.1 if mmrazor else 2e-3), 1e-3
    student_optimizer: torch.optim.Optimizer
    if mmrazor:
        student_optimizer = torch.optim.SGD(student.parameters(), lr=student_lr, momentum=0.9, weight_decay=5e-4)
    else:
        student_optimizer = torch.optim.Adam(student.parameters(), lr=student_lr)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=generator_lr)

    for t in range(total):
        decay = step_decay(t, total) if mmrazor else cosine_decay(t, total)
        student_optimizer.param_groups[0]["lr"] = student_lr * decay
        generator_optimizer.param_groups[0]["lr"] = generator_lr * decay
        teacher.eval()
        student.train()
        generator.train()

        # The generator climbs the divergence; given the attention term too, it would find the student hard to fool.
        z = draw_latent()  # (N, Z)
        generator_losses: list[Tensor] = []
        for _ in range(GENERATOR_UPDATES):
            generator_optimizer.zero_grad()
            x = generator(z)  # (N, C, H, W)
            loss = -kl_weight * mean_kl(teacher(x), student(x))  # ()
            torch.autograd.backward(loss)
            if not mmrazor:
                clip_grad_norm_(generator.parameters(), CLIP_NORM)
            generator_optimizer.step()
            generator_losses.append(loss.detach())

        # The student descends it. In mmrazor's code nothing clears the student's gradients between the generator's
        # backward and the first student update, so that this update partly climbs the KL: a bug, not copied. BatchNorm
        # is over the whole batch here, where mmrazor's is over the 16 images of each of 8 GPUs.
        student_losses: list[Tensor] = []
        for update in range(STUDENT_UPDATES):
            student_optimizer.zero_grad()
            if fresh:
                z = draw_latent()  # (N, Z)
            x = generator(z)  # (N, C, H, W), with its graph: see the waste above
            if mmrazor:
                x = x.detach()  # the one piece of waste that mmrazor's code does not have
            if fresh or update == 0:
                with torch.no_grad():
                    teacher_logits, teacher_stages = run(teacher, x, stages)  # (N, K), (N, D, H, W) each
            student_logits, student_stages = run(student, x, stages)  # (N, K), (N, D', H, W) each
            loss = kl_weight * mean_kl(teacher_logits, student_logits)  # ()
            for teacher_stage, student_stage in zip(teacher_stages, student_stages, strict=True):
                loss = loss + ATTENTION_WEIGHT * attention_distance(teacher_stage, student_stage)  # ()
            torch.autograd.backward(loss)
            if not mmrazor:
                clip_grad_norm_(student.parameters(), CLIP_NORM)
            student_optimizer.step()
            student_losses.append(loss.detach())

        yield Iteration(generator_losses, student_losses, confidence(teacher_logits), confidence(student_logits))


def released_transitions(
    stepped: Callable[[Tensor], Tensor],
    other: Callable[[Tensor], Tensor],
    images: Tensor,
    starts: Tensor,
    num_classes: int,
    *,
    steps: int,
    step_size: float,
    renormalise: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Walk every image to every other class by gradient steps on `stepped`; p_j of `stepped` and `other` on the way.

    Source: algorithm 2 of the paper ("transition curves"), with what their code decides: p_j is recorded before each
    step, so that column 0 is the untouched image; the steps are taken in the normalised space of `stepped`; the
    cross-entropy is that of one image. Both networks map images to logits and should be in eval mode, the caller's job.

    `images` (M, C, H, W) are normalised for `stepped`; `other` is shown `renormalise(x)`, or x where that is None.
    `starts` (M,) are the classes to start from: the common prediction in the paper, the true label in their code.
    Returns two tensors (M, K - 1, steps) of the images' dtype; target r of an image is class (start + 1 + r) mod K.

    The waste: one image and one target at a time; a full backward, which also computes weight gradients of `stepped`
    (where they are not frozen) that nobody reads; the untouched image re-evaluated for each target; a last step that
    nothing is recorded after. Gradients the parameters of `stepped` had before are restored, if it is a Module; those
    of any other callable add up.
    """
    count = len(images)
    stepped_curves = images.new_empty(count, num_classes - 1, steps)  # (M, K - 1, steps)
    other_curves = images.new_empty(count, num_classes - 1, steps)  # (M, K - 1, steps)
    parameters = list(stepped.parameters()) if isinstance(stepped, nn.Module) else []
    kept = [parameter.grad for parameter in parameters]
    try:
        for m, start in enumerate(starts.tolist()):
            for r in range(num_classes - 1):
                j = (start + 1 + r) % num_classes
                target = torch.tensor([j], device=images.device)  # (1,)
                x = images[m : m + 1].detach()  # (1, C, H, W)
                for k in range(steps):
                    for parameter in parameters:
                        parameter.grad = None
                    x.requires_grad_()
                    logits = stepped(x)  # (1, K)
                    with torch.no_grad():
                        other_logits = other(x if renormalise is None else renormalise(x))  # (1, K)
                    stepped_curves[m, r, k] = logits.detach().softmax(dim=1)[0, j]  # ()
                    other_curves[m, r, k] = other_logits.softmax(dim=1)[0, j]  # ()
                    torch.autograd.backward(F.cross_entropy(logits, target))
                    assert x.grad is not None
                    x = x.detach() - step_size * x.grad  # (1, C, H, W)
    finally:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
    return stepped_curves, other_curves  # (M, K - 1, steps) each


def run(network: nn.Module, x: Tensor, stages: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """Logits of `network` and outputs of its submodules `stages`, in that order (the last, where one runs twice)."""
    outputs: dict[nn.Module, Tensor] = {}
    modules = [network.get_submodule(name) for name in stages]
    handles = [m.register_forward_hook(lambda m, _, output: outputs.update({m: output})) for m in modules]
    try:
        logits: Tensor = network(x)  # (N, K)
    finally:
        for handle in handles:
            handle.remove()
    return logits, [outputs[m] for m in modules]  # (N, K), (N, D, H, W) each


def mean_kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """KL(teacher || student) at temperature 1, summed over images and classes and divided by N * K ('mean').

    The target goes in as logarithms: given probabilities, kl_div differentiates to nan where one underflows to 0.
    """
    log_p = F.log_softmax(teacher_logits, dim=1)  # (N, K)
    log_q = F.log_softmax(student_logits, dim=1)  # (N, K)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / log_p.numel()  # ()


def attention_distance(teacher_stage: Tensor, student_stage: Tensor) -> Tensor:
    """Mean over images and pixels of the squared difference between the two attention maps."""
    return (attention_map(teacher_stage) - attention_map(student_stage)).square().mean()  # ()


def attention_map(stage: Tensor) -> Tensor:
    """Mean over channels of the squared activations, as one vector of length 1 (L2) per image."""
    return F.normalize(stage.square().mean(dim=1).flatten(1), dim=1)  # (N, D, H, W) -> (N, H * W)


def confidence(logits: Tensor) -> Tensor:
    """Mean over the batch of the largest probability."""
    return logits.detach().softmax(dim=1).amax(dim=1).mean()  # (N, K) -> ()


def cosine_decay(t: int, total: int) -> float:
    """From 1 at iteration 0 along half a cosine to 0 at iteration `total`, one after the last."""
    return (1 + math.cos(math.pi * t / total)) / 2


def step_decay(t: int, total: int) -> float:
    """1, then 0.1 from iteration total // 5 on and 0.01 from 2 * total // 5 on (mmrazor: 5,000, 10,000 of 25,000)."""
    return 0.01 if t >= max(1, 2 * total // 5) else 0.1 if t >= max(1, total // 5) else 1.0

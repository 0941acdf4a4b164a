"""The oracle itself, by hand: loops over numbers (losses), hand-written optimisers (updates), numpy (curves)."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from zskt.bench.reference import METHODS, Iteration, attention_distance, mean_kl, released_loop, released_transitions

BATCH, LATENT, CLASSES, SIZE = 5, 6, 4, 6
STAGES = ["low", "high"]
LATENTS_DRAWN = {"zskt": 1, "zskt-fresh": 11, "zskt-mmrazor": 11}  # per iteration


class Net(nn.Module):
    """Two stages; `trace` returns their outputs beside the logits, so that the tests need no hooks to see them."""

    def __init__(self, width: int, sharpness: float) -> None:
        super().__init__()
        self.low = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU())
        self.high = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.LeakyReLU())
        self.out = nn.Linear(2 * width, CLASSES)
        self.sharpness = sharpness

    def trace(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        low = self.low(x)
        high = self.high(low)
        return self.sharpness * self.out(high.mean((2, 3))), [low, high]

    def forward(self, x: Tensor) -> Tensor:
        return self.trace(x)[0]


class Painter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fill = nn.Linear(LATENT, 3 * SIZE * SIZE)
        self.norm = nn.BatchNorm2d(3)
        with torch.no_grad():  # small weights, which norm undoes, have gradients as much larger: clipping bites
            for parameter in self.fill.parameters():
                parameter.mul_(0.02)

    def forward(self, z: Tensor) -> Tensor:
        image: Tensor = self.norm(self.fill(z).view(-1, 3, SIZE, SIZE))
        return image


class Latents:
    """Draws batches from a seed and keeps them."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.random = torch.Generator().manual_seed(7)
        self.dtype = dtype
        self.drawn: list[Tensor] = []

    def __call__(self) -> Tensor:
        self.drawn.append(torch.randn(BATCH, LATENT, generator=self.random, dtype=torch.float64).to(self.dtype))
        return self.drawn[-1]


def networks(dtype: torch.dtype = torch.float64, sharpness: float = 5.0) -> tuple[Net, Net, Painter]:
    """A teacher with BatchNorm statistics of its own, a narrower student, a generator."""
    torch.manual_seed(0)
    teacher, student, generator = Net(4, sharpness), Net(2, sharpness), Painter()
    with torch.no_grad():
        for _ in range(20):
            teacher(0.2 + 1.2 * torch.randn(16, 3, SIZE, SIZE))
    return teacher.to(dtype), student.to(dtype), generator.to(dtype)


# The two losses, against loops over plain numbers


def softmax(row: list[float]) -> list[float]:
    exponentials = [math.exp(value - max(row)) for value in row]
    return [e / sum(exponentials) for e in exponentials]


def test_mean_kl_is_the_forward_kl_over_batch_times_classes() -> None:
    torch.manual_seed(1)
    teacher, student = 3 * torch.randn(2, BATCH, CLASSES, dtype=torch.float64)
    total = 0.0
    for row_t, row_s in zip(teacher.tolist(), student.tolist(), strict=True):
        for p, q in zip(softmax(row_t), softmax(row_s), strict=True):
            total += p * (math.log(p) - math.log(q))
    assert mean_kl(teacher, student).item() == pytest.approx(total / (BATCH * CLASSES), rel=1e-12)


def test_mean_kl_has_a_gradient_for_the_teacher_where_its_probabilities_underflow() -> None:
    teacher = torch.tensor([[300.0, 0.0, 0.0]], requires_grad=True)
    mean_kl(teacher, torch.tensor([[0.0, 1.0, 0.0]])).backward()
    assert teacher.grad is not None
    assert teacher.grad.isfinite().all()


def test_attention_distance_is_the_mean_squared_difference_of_normalised_maps() -> None:
    torch.manual_seed(2)
    height, width = 3, 2
    teacher = torch.randn(BATCH, 7, height, width, dtype=torch.float64)
    student = torch.randn(BATCH, 4, height, width, dtype=torch.float64)

    def maps(stage: Tensor) -> list[list[float]]:
        rows, places = [], list(itertools.product(range(height), range(width)))
        for image in stage.tolist():
            flat = [sum(channel[i][j] ** 2 for channel in image) / len(image) for i, j in places]
            length = math.sqrt(sum(value**2 for value in flat))
            rows.append([value / length for value in flat])
        return rows

    total = 0.0
    for map_t, map_s in zip(maps(teacher), maps(student), strict=True):
        total += sum((a - b) ** 2 for a, b in zip(map_t, map_s, strict=True))
    expected = total / (BATCH * height * width)
    assert attention_distance(teacher, student).item() == pytest.approx(expected, rel=1e-12)


# Whole iterations, against updates written out by hand


class ByHand:
    """Adam or SGD with momentum from their formulas, with clipping; `norms` keeps what clipping saw."""

    def __init__(self, network: nn.Module, clip: float | None, sgd: bool = False) -> None:
        self.parameters = list(network.parameters())
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]
        self.clip, self.sgd, self.steps = clip, sgd, 0
        self.norms: list[float] = []

    def descend(self, loss: Tensor, lr: float) -> None:
        gradients = torch.autograd.grad(loss, self.parameters)
        self.norms.append(math.sqrt(sum((g**2).sum().item() for g in gradients)))
        factor = 1.0 if self.clip is None else min(1.0, self.clip / (self.norms[-1] + 1e-6))
        self.steps += 1
        with torch.no_grad():
            for i, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
                g = factor * gradient
                if self.sgd:
                    self.first[i] = 0.9 * self.first[i] + (g + 5e-4 * parameter)
                    parameter.sub_(lr * self.first[i])
                else:
                    self.first[i] = 0.9 * self.first[i] + 0.1 * g
                    self.second[i] = 0.999 * self.second[i] + 0.001 * g**2
                    mean = self.first[i] / (1 - 0.9**self.steps)
                    spread = (self.second[i] / (1 - 0.999**self.steps)).sqrt()
                    parameter.sub_(lr * mean / (spread + 1e-8))


def kl_by_hand(teacher: Tensor, student: Tensor) -> Tensor:
    p = teacher.exp() / teacher.exp().sum(1, keepdim=True)
    q = student.exp() / student.exp().sum(1, keepdim=True)
    return (p * (p / q).log()).sum() / (BATCH * CLASSES)


def attention_by_hand(teacher: list[Tensor], student: list[Tensor]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for stage_t, stage_s in zip(teacher, student, strict=True):
        for image_t, image_s in zip(stage_t, stage_s, strict=True):
            map_t, map_s = (image_t**2).mean(0), (image_s**2).mean(0)
            difference = map_t / (map_t**2).sum().sqrt() - map_s / (map_s**2).sum().sqrt()
            total = total + (difference**2).sum() / (BATCH * difference.numel())
    return total


def rates(method: str, t: int, total: int) -> tuple[float, float]:
    """Learning rates of the student and the generator at outer iteration t."""
    if method == "zskt-mmrazor":
        decay = 1.0
        for milestone in (total // 5, 2 * total // 5):
            if t >= milestone:
                decay = decay / 10
        return 0.1 * decay, 1e-3 * decay
    return 2e-3 * (1 + math.cos(math.pi * t / total)) / 2, 1e-3 * (1 + math.cos(math.pi * t / total)) / 2


@pytest.mark.parametrize("method", METHODS)
def test_iterations_agree_with_updates_written_out_by_hand(method: str) -> None:
    total = 6
    mmrazor = method == "zskt-mmrazor"
    teacher, student, generator = networks(sharpness=1.0 if mmrazor else 5.0)
    hand_student, hand_generator, hand_latents = copy.deepcopy(student), copy.deepcopy(generator), Latents()
    weight, clip = (2.0, None) if mmrazor else (1.0, 5.0)
    student_steps = ByHand(hand_student, clip, sgd=mmrazor)
    generator_steps = ByHand(hand_generator, clip)

    loop = released_loop(teacher, student, generator, Latents(), STAGES, total=total, method=method)
    for t, seen in zip(range(4), loop, strict=False):
        student_lr, generator_lr = rates(method, t, total)
        z = hand_latents()
        x = hand_generator(z)
        loss = -weight * kl_by_hand(teacher(x), hand_student(x))
        generator_steps.descend(loss, generator_lr)
        torch.testing.assert_close(seen.generator_losses, [loss.detach()], rtol=1e-8, atol=1e-10)

        losses = []
        for _ in range(10):
            x = hand_generator(z if method == "zskt" else hand_latents()).detach()
            logits_t, stages_t = teacher.trace(x)
            logits_s, stages_s = hand_student.trace(x)
            loss = weight * kl_by_hand(logits_t.detach(), logits_s)
            loss = loss + 250 * attention_by_hand([stage.detach() for stage in stages_t], stages_s)
            student_steps.descend(loss, student_lr)
            losses.append(loss.detach())
        torch.testing.assert_close(seen.student_losses, losses, rtol=1e-8, atol=1e-10)
        for logits, confidence in ((logits_t, seen.teacher_confidence), (logits_s, seen.student_confidence)):
            largest = [max(softmax(row)) for row in logits.tolist()]
            assert confidence.item() == pytest.approx(sum(largest) / BATCH, rel=1e-8)

    for hand, network in ((hand_student, student), (hand_generator, generator)):
        torch.testing.assert_close(network.state_dict(), hand.state_dict(), rtol=1e-8, atol=1e-10)
    if not mmrazor:  # or the comparison would say nothing about clipping
        assert max(student_steps.norms) > 6
        assert max(generator_steps.norms) > 6


# The waste


@pytest.mark.parametrize("method", METHODS)
def test_forwards_and_backwards_are_as_many_as_in_the_released_code(method: str) -> None:
    teacher, student, generator = networks()
    painted: list[bool] = []
    backwards: list[int] = []
    taught: list[bool] = []
    learnt: list[bool] = []

    def paint(_module: nn.Module, _inputs: object, x: Tensor) -> None:
        painted.append(generator.training)
        x.register_hook(lambda _gradient: backwards.append(1))

    generator.register_forward_hook(paint)
    teacher.register_forward_hook(lambda module, _, logits: taught.append(logits.requires_grad and not module.training))
    student.register_forward_hook(lambda module, inputs, _: learnt.append(inputs[0].requires_grad and module.training))
    loop = released_loop(teacher, student, generator, Latents(), STAGES, total=4, method=method)
    for _ in range(2):
        for record in (painted, backwards, taught, learnt):
            record.clear()
        next(loop)
        assert painted == [True] * 11
        assert len(backwards) == (1 if method == "zskt-mmrazor" else 11)
        assert taught == [True] + [False] * (1 if method == "zskt" else 10)
        assert learnt == [True] + [method != "zskt-mmrazor"] * 10


@pytest.mark.parametrize("frozen", [True, False])
def test_weight_gradients_of_the_teacher_are_computed_unless_it_is_frozen_and_stays_so(frozen: bool) -> None:
    teacher, student, generator = networks()
    teacher.requires_grad_(not frozen)
    next(released_loop(teacher, student, generator, Latents(), STAGES, total=4, method="zskt"))
    for p in teacher.parameters():
        assert p.requires_grad != frozen
        assert p.grad is None if frozen else p.grad is not None and p.grad.abs().sum() > 0


# Modes, latents, rates, hooks


@pytest.mark.parametrize("method", METHODS)
def test_modes_hold_whatever_the_caller_does_in_between(method: str) -> None:
    teacher, student, generator = networks()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.train()
    student.eval()
    generator.eval()
    loop = released_loop(teacher, student, generator, Latents(), STAGES, total=4, method=method)
    for count in (1, 2):
        next(loop)
        assert student.low[1].num_batches_tracked == 11 * count
        assert generator.norm.num_batches_tracked == 11 * count
        assert (teacher.training, student.training, generator.training) == (False, True, True)
        teacher.train()
        student.eval()
        generator.eval()
    for name, value in teacher.state_dict().items():  # weights and BatchNorm's buffers
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_latents_are_drawn_once_per_batch_and_used_in_order(method: str) -> None:
    teacher, student, generator = networks()
    latents, used = Latents(), []
    generator.register_forward_hook(lambda _, inputs, __: used.append(inputs[0]))
    loop = released_loop(teacher, student, generator, latents, STAGES, total=4, method=method)
    next(loop)
    next(loop)
    assert len(latents.drawn) == 2 * LATENTS_DRAWN[method]
    repeats = 11 if method == "zskt" else 1
    expected = [z for z in latents.drawn for _ in range(repeats)]
    assert all(a is b for a, b in zip(used, expected, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_learning_rates_settings_and_clipping_at_every_optimiser_step(method: str) -> None:
    teacher, student, generator = networks()
    total = 10
    steps: list[tuple[str, float]] = []
    norms: list[float] = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        (group,) = optimizer.param_groups
        adam = isinstance(optimizer, torch.optim.Adam)
        if adam:
            assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0)
        else:
            assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, False)
        whose = "student" if group["params"][0] is next(student.parameters()) else "generator"
        assert adam == (whose == "generator" or method != "zskt-mmrazor")
        steps.append((whose, group["lr"]))
        norms.append(math.sqrt(sum((p.grad**2).sum().item() for p in group["params"])))

    handle = register_optimizer_step_pre_hook(look)
    try:
        iterations = list(released_loop(teacher, student, generator, Latents(), STAGES, total=total, method=method))
    finally:
        handle.remove()

    assert len(iterations) == total
    expected: list[tuple[str, Any]] = []
    for t in range(total):
        student_lr, generator_lr = rates(method, t, total)
        expected += [("generator", pytest.approx(generator_lr))] + [("student", pytest.approx(student_lr))] * 10
    assert steps == expected
    if method == "zskt-mmrazor":
        assert [round(lr / 0.1, 6) for _, lr in steps[1::11]] == [1, 1, 0.1, 0.1] + [0.01] * 6
        assert max(norms) > 6
    else:
        assert steps[0][1] == 1e-3
        assert steps[1][1] == 2e-3
        assert max(norms) == pytest.approx(5, rel=1e-5)


def test_no_hook_is_left_behind() -> None:
    teacher, student, generator = networks()
    loop = released_loop(teacher, student, generator, Latents(), STAGES, total=4)
    next(loop)
    modules = [*teacher.modules(), *student.modules(), *generator.modules()]
    assert not any(module._forward_hooks for module in modules)

    class Broken(Exception):
        pass

    def fail(_module: nn.Module, _inputs: object) -> None:
        if student.low._forward_hooks:  # only where the stages are recorded
            raise Broken

    handle = student.out.register_forward_pre_hook(fail)
    with pytest.raises(Broken):
        next(loop)
    handle.remove()
    assert not any(module._forward_hooks for module in modules)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_results_are_detached_scalars_of_the_networks_dtype(method: str, dtype: torch.dtype) -> None:
    loop = released_loop(*networks(dtype), Latents(dtype), STAGES, total=2, method=method)
    for seen in loop:
        assert isinstance(seen, Iteration)
        assert (len(seen.generator_losses), len(seen.student_losses)) == (1, 10)
        for value in (*seen.generator_losses, *seen.student_losses, seen.teacher_confidence, seen.student_confidence):
            assert (value.shape, value.dtype, value.requires_grad) == ((), dtype, False)


def test_an_unknown_method_is_an_error() -> None:
    with pytest.raises(ValueError, match="zskt-frsh"):
        next(released_loop(*networks(), Latents(), STAGES, total=1, method="zskt-frsh"))


# Transition curves, on linear classifiers, whose gradients have a closed form: weights^T (p - one-hot of j)


def linear_pair(dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    """Two linear softmax classifiers of four classes, and two images for them."""
    torch.manual_seed(3)
    stepped = nn.Sequential(nn.Flatten(), nn.Linear(3 * 2 * 2, CLASSES)).to(dtype)
    other = nn.Sequential(nn.Flatten(), nn.Linear(3 * 2 * 2, CLASSES)).to(dtype)
    return stepped, other, torch.randn(2, 3, 2, 2, dtype=dtype)


def test_transitions_agree_with_numpy() -> None:
    stepped, other, images = linear_pair()
    scale, shift = torch.tensor([0.5, 2.0, 1.5]).view(3, 1, 1), torch.tensor([0.3, -1.0, 0.7]).view(3, 1, 1)
    before = images.clone()
    settings: dict[str, Any] = {"steps": 3, "step_size": 0.7, "renormalise": lambda x: scale * x + shift}
    curves = released_transitions(stepped, other, images, torch.tensor([2, 0]), CLASSES, **settings)
    assert torch.equal(images, before)

    weights_a, bias_a, weights_b, bias_b = (p.detach().numpy() for p in (*stepped.parameters(), *other.parameters()))
    spread, offset = np.repeat(scale.flatten().numpy(), 4), np.repeat(shift.flatten().numpy(), 4)
    expected_a, expected_b = np.empty((2, 3, 3)), np.empty((2, 3, 3))
    for m, targets in enumerate([[3, 0, 1], [1, 2, 3]]):
        for r, j in enumerate(targets):
            x = images[m].numpy().flatten()
            for k in range(3):
                exp_a = np.exp(weights_a @ x + bias_a)
                exp_b = np.exp(weights_b @ (spread * x + offset) + bias_b)
                p = exp_a / exp_a.sum()
                expected_a[m, r, k], expected_b[m, r, k] = p[j], exp_b[j] / exp_b.sum()
                x = x - 0.7 * weights_a.T @ (p - np.eye(4)[j])
    for curve, expected in zip(curves, (expected_a, expected_b), strict=True):
        np.testing.assert_allclose(curve.numpy(), expected, rtol=1e-12)
    assert (np.diff(expected_a) > 0.02).all()  # or a step more or less would hardly show


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transitions_begin_at_the_untouched_image_and_show_it_as_it_is(dtype: torch.dtype) -> None:
    stepped, _, images = linear_pair(dtype)
    starts = torch.tensor([1, 3])
    curves, same = released_transitions(stepped, lambda x: stepped(x), images, starts, CLASSES, steps=2, step_size=1.0)
    assert torch.equal(curves, same)
    assert (curves.shape, curves.dtype, curves.requires_grad) == ((2, 3, 2), dtype, False)
    p = stepped(images).softmax(dim=1)
    torch.testing.assert_close(curves[:, :, 0], torch.stack([p[0, [2, 3, 0]], p[1, [0, 1, 2]]]))


def test_transitions_compute_weight_gradients_and_leave_the_networks_as_they_were() -> None:
    stepped, other, images = linear_pair()
    weight, bias = stepped.parameters()
    weight.grad = torch.ones_like(weight)
    stepped.train()
    other.eval()
    kept, before = weight.grad, copy.deepcopy([stepped.state_dict(), other.state_dict()])
    shapes: list[torch.Size] = []
    gradients: dict[nn.Parameter, list[Tensor]] = {weight: [], bias: []}
    for network in (stepped, other):
        network.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    for parameter in (weight, bias):
        parameter.register_post_accumulate_grad_hook(lambda p: gradients[p].append(p.grad.clone()))
    curves, _ = released_transitions(stepped, other, images, torch.tensor([2, 0]), CLASSES, steps=3, step_size=0.7)

    assert shapes == [(1, 3, 2, 2)] * (2 * 2 * 3 * 3)
    assert len(gradients[weight]) == 2 * 3 * 3
    targets = [j for j in (3, 0, 1, 1, 2, 3) for _ in range(3)]
    seen = [gradient[j].item() for gradient, j in zip(gradients[bias], targets, strict=True)]
    assert seen == pytest.approx((curves - 1).flatten().tolist())  # p_j - 1: nothing adds up over the steps

    assert weight.grad is kept
    assert (kept == 1).all()
    assert bias.grad is None
    assert all(p.grad is None for p in other.parameters())
    assert all(p.requires_grad for p in (*stepped.parameters(), *other.parameters()))
    torch.testing.assert_close([stepped.state_dict(), other.state_dict()], before, rtol=0, atol=0)
    assert (stepped.training, other.training) == (True, False)


def test_transitions_put_gradients_back_when_a_network_fails() -> None:
    stepped, _, images = linear_pair()
    for parameter in stepped.parameters():
        parameter.grad = torch.ones_like(parameter)

    def fail(_x: Tensor) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        released_transitions(stepped, fail, images, torch.tensor([2, 0]), CLASSES, steps=1, step_size=1.0)
    assert all(p.grad is not None and (p.grad == 1).all() for p in stepped.parameters())

"""Corruptions against scipy and plain slicing; attacks against the closed form of a linear network."""

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from small import make_teacher
from zskt.evaluate.measures import accuracy, agreement, predict
from zskt.evaluate.perturbations import (
    ATTACKS,
    EPSILON,
    SEVERITIES,
    attacked,
    blurred,
    corrupted,
    transfer,
    under_corruption,
)
from zskt.networks.classifier import Classifier

SIZE = (3, 12, 20)


def pictures(count: int = 6, size: tuple[int, int, int] = SIZE) -> Tensor:
    return torch.rand(count, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.0, 6.0])
def test_blur_is_scipys(sigma: float) -> None:
    x = pictures()
    expected = gaussian_filter(x.numpy(), sigma=(0, 0, sigma, sigma), mode="nearest", truncate=4)
    torch.testing.assert_close(blurred(x, sigma), torch.from_numpy(expected), rtol=1e-9, atol=1e-12)


def test_a_shift_moves_each_image_in_one_of_four_directions_and_repeats_its_edge() -> None:
    x = pictures(40, (1, 32, 64)).float()
    found = corrupted(x, "shift", 4)
    down, right = x.clone(), x.clone()
    down[:, :, 4:] = x[:, :, :-4]
    down[:, :, :4] = x[:, :, :1]
    right[..., 4:] = x[..., :-4]
    right[..., :4] = x[..., :1]
    up, left = (corner.flip(2, 3) for corner in (x.flip(2, 3).clone(), x.flip(2, 3).clone()))
    up[:, :, :-4], up[:, :, -4:] = x[:, :, 4:], x[:, :, -1:]
    left[..., :-4], left[..., -4:] = x[..., 4:], x[..., -1:]
    matches = torch.stack([(found == moved).flatten(1).all(dim=1) for moved in (down, right, up, left)])  # (4, M)
    assert matches.sum(dim=0).tolist() == [1] * 40
    assert (matches.sum(dim=1) > 2).all()


def test_noise_has_its_deviation_and_stays_in_range() -> None:
    grey = torch.full((20, *SIZE), 128, dtype=torch.uint8)
    found = corrupted(grey, "noise", 0.08)
    assert float((found - 128 / 255).std()) == pytest.approx(0.08, rel=0.02)
    assert torch.equal(found, corrupted(grey, "noise", 0.08))
    assert not torch.equal(found, corrupted(grey, "noise", 0.08, seed=1))
    white = corrupted(torch.full((2, *SIZE), 255, dtype=torch.uint8), "noise", 0.5)
    assert white.max() == 1
    assert white.min() >= 0


@pytest.mark.parametrize("kind", SEVERITIES)
def test_severities_scale_with_the_image_and_increase(kind: str) -> None:
    x = blurred(pictures(8, (3, 32, 32)), 3).float()  # smooth, so that shifts and blurs are small changes
    changes = [float((corrupted(x, kind, severity) - x).abs().mean()) for severity in SEVERITIES[kind]]
    assert changes == sorted(changes)
    assert changes[0] > 1e-4
    if kind != "noise":
        twice = nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        large = float((corrupted(twice, kind, SEVERITIES[kind][1]) - twice).abs().mean())
        assert large == pytest.approx(changes[1], rel=0.2)


class Linear(nn.Module):
    """Two classes; logits (N, 2) are -w x and w x, for normalised x."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.flatten())

    def forward(self, x: Tensor) -> Tensor:
        margin = x.flatten(1) @ self.weight  # (N,)
        return torch.stack([-margin, margin], dim=1)


def linear(weight: Tensor, std: tuple[float, ...] = (0.2, 0.3, 0.4)) -> Classifier:
    return Classifier(Linear(weight), input_size=SIZE, mean=[0.5, 0.4, 0.6], std=list(std)).double()


def test_under_corruption_is_measured_on_the_corrupted_images() -> None:
    rng = torch.Generator().manual_seed(0)
    first, second = (linear(torch.randn(SIZE, generator=rng)) for _ in range(2))
    images = torch.randint(256, (30, *SIZE), dtype=torch.uint8, generator=rng)
    labels = predict(second, images).argmax(dim=1)
    calls: list[tuple[int, int]] = []
    found = under_corruption(first, second, images, labels, seed=3, done=lambda *call: calls.append(call))
    assert {kind: [entry["severity"] for entry in entries] for kind, entries in found.items()} == {
        kind: list(severities) for kind, severities in SEVERITIES.items()
    }
    seen = corrupted(images, "shift", 2.0, 3)
    logits, answers = predict(first, seen), predict(second, seen)
    assert found["shift"][1] == {
        "severity": 2.0,
        "agreement": agreement(logits, answers),
        "accuracy": accuracy(logits, labels),
        "teacher_accuracy": accuracy(answers, labels),
    }
    assert found["shift"][1]["teacher_accuracy"] < 1
    assert 0 < found["shift"][1]["agreement"] < 1
    assert calls == [(30 * (i + 1), 270) for i in range(9)]
    assert under_corruption(first, second, images)["noise"][0].keys() == {"severity", "agreement"}


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_an_attack_on_a_linear_network_is_the_worst_case(steps: int, as_bytes: bool) -> None:
    """Which is known: epsilon against the sign of every weight, whatever its size and the normalisation."""
    weight = torch.randn(SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    network = linear(weight / 100)
    x = (pictures() * 255).byte() if as_bytes else pictures()
    start = x / 255 if as_bytes else x
    classes = torch.tensor([0, 1, 0, 1, 1, 0])
    found = attacked(network, x, classes, epsilon=0.1, steps=steps)
    away = (1 - 2 * classes).view(-1, 1, 1, 1)  # class 1 is attacked by going down
    torch.testing.assert_close(found, (start + 0.1 * away * weight.sign()).clamp(0, 1).to(found), rtol=0, atol=1e-7)


def test_an_attack_stays_within_its_bounds_and_leaves_the_network_alone() -> None:
    network = make_teacher()
    network.module.get_submodule("block1").train()
    before = network.fingerprint()
    x = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    classes = predict(network, x).argmax(dim=1)
    losses = []
    for steps in (1, 10):
        found = attacked(network, x, classes, steps=steps)
        assert (found - x).abs().max() <= EPSILON + 1e-6
        assert found.min() >= 0
        assert found.max() <= 1
        losses.append(nn.functional.cross_entropy(predict(network, found), classes))
    assert losses[1] > losses[0] > nn.functional.cross_entropy(predict(network, x), classes)
    assert network.fingerprint() == before
    assert network.module.get_submodule("block1").training
    assert all(p.grad is None for p in network.parameters())


def test_attacks_transfer_to_an_equal_network_and_not_to_one_that_looks_elsewhere() -> None:
    weight = torch.zeros(SIZE, dtype=torch.float64)
    weight[0] = 1
    red, blue = linear(weight), linear(weight.flip(0))
    x = torch.full((5, *SIZE), 0.5, dtype=torch.float64)
    x[:, 0] += 0.01  # barely red
    x[:, 2] += 0.2  # clearly blue (its mean is 0.6)
    classes = predict(red, x).argmax(dim=1)
    assert torch.equal(classes, predict(blue, x).argmax(dim=1))
    calls: list[tuple[int, int]] = []
    same = transfer(red, red, x, classes, batch_size=2, done=lambda *call: calls.append(call))
    assert same == {name: {"fooled": 1, "transferred": 1, "agreement": 1} for name in ATTACKS}
    assert calls[-1] == (55, 55)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert transfer(red, blue, x, classes)["pgd"] == {"fooled": 1, "transferred": 0, "agreement": 0}
    x[:3, 0] += 0.3  # too far for an attack
    some = {"fooled": pytest.approx(0.4), "transferred": 1, "agreement": 1}
    assert transfer(red, red, x, classes) == {name: some for name in ATTACKS}
    x[3:, 0] += 0.3
    assert transfer(red, blue, x, classes)["fgsm"] == {"fooled": 0, "transferred": None, "agreement": 1}

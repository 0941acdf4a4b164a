"""Measures against plain loops; measuring does not change a network; warnings."""

import copy
import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from small import make_teacher, refused
from zskt.errors import ZsktError
from zskt.evaluate.measures import (
    accuracy,
    agreement,
    bootstrap,
    calibration_error,
    disagreements,
    measure,
    new_warnings,
    noise_classes,
    predict,
    pseudo_beliefs,
    pseudo_image_warnings,
    wilson,
)
from zskt.networks import models
from zskt.networks.classifier import Classifier

M, K = 200, 7


@pytest.fixture
def answers() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two networks (M, K) and labels (M,)."""
    rng = torch.Generator().manual_seed(0)
    first, second = 2 * torch.randn(2, M, K, generator=rng)
    return first, (first + second) / 2, torch.randint(K, (M,), generator=rng)


def probabilities(logits: Tensor) -> list[list[float]]:
    powers = [[math.exp(x) for x in row] for row in logits.double().tolist()]
    return [[power / sum(row) for power in row] for row in powers]


def best(row: list[float]) -> int:
    return max(range(len(row)), key=row.__getitem__)


def test_accuracy_and_agreement(answers: tuple[Tensor, Tensor, Tensor]) -> None:
    first, second, labels = answers
    p, q = probabilities(first), probabilities(second)
    assert accuracy(first, labels) == sum(best(p[m]) == int(labels[m]) for m in range(M)) / M
    assert agreement(first, second) == sum(best(p[m]) == best(q[m]) for m in range(M)) / M
    assert agreement(first, first) == 1


@pytest.mark.parametrize(("classes", "scale", "threshold"), [(K, 2.0, 0.5), (30, 0.3, 1 / 15)])
def test_calibration_error(classes: int, scale: float, threshold: float) -> None:
    first = scale * torch.randn(M, classes, generator=torch.Generator().manual_seed(0))
    confident = first.softmax(dim=1).amax(dim=1) > threshold  # right exactly then, so that gaps have both signs
    labels = torch.where(confident, first.argmax(dim=1), first.argmin(dim=1))
    assert 10 < confident.sum() < M - 10
    expected = 0.0
    p = probabilities(first)
    for lower in range(15):
        inside = [m for m in range(M) if lower / 15 < max(p[m]) <= (lower + 1) / 15]
        if inside:
            confidence = sum(max(p[m]) for m in inside) / len(inside)
            right = sum(best(p[m]) == int(labels[m]) for m in inside) / len(inside)
            expected += len(inside) / M * abs(confidence - right)
    assert calibration_error(first, labels) == pytest.approx(expected, rel=1e-9)
    assert expected > 0.1


def test_perfect_calibration_is_no_error() -> None:
    logits = torch.tensor([[math.log(7), math.log(3)]] * 10 + [[0.0, math.log(9)]] * 20)  # 0.7 confident, then 0.9
    labels = torch.tensor([0] * 7 + [1] * 3 + [1] * 18 + [0] * 2)
    assert calibration_error(logits, labels) == pytest.approx(0, abs=1e-7)
    assert calibration_error(100 * logits, labels) == pytest.approx(5 / 30, abs=1e-7)  # confident of all, 5 wrong


def test_measure_agrees_with_its_parts_on_bytes_and_fractions() -> None:
    teacher = make_teacher()
    student = teacher.like(models.wide_resnet(10, 1).eval())
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (30, 3, 16, 16), dtype=torch.uint8, generator=rng)
    labels = torch.randint(10, (30,), generator=rng)
    found = measure(student, images, labels, teacher)
    assert found == pytest.approx(measure(student, images / 255, labels, teacher), abs=1e-6)
    x = (images.float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        s, t = student.module(x), teacher.module(x)
    p, q = probabilities(s), probabilities(t)
    assert found["accuracy"] == accuracy(s, labels)
    assert found["teacher_accuracy"] == accuracy(t, labels)
    assert found["agreement"] == agreement(s, t)
    assert found["calibration_error"] == pytest.approx(calibration_error(s, labels), abs=1e-6)
    for key, a, b in (("kl_teacher_student", q, p), ("kl_student_teacher", p, q)):
        kl = sum(x * math.log(x / y) for rows in zip(a, b, strict=True) for x, y in zip(*rows, strict=True)) / 30
        assert found[key] == pytest.approx(kl, abs=1e-5)
    assert set(measure(student, images, labels)) == {"accuracy", "calibration_error"}


IMAGES, LABELS = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 9])


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.rand(4, 3, 8, 16), LABELS, "expected images of 3 x 16 x 16, found 3 x 8 x 16"),
        (torch.rand(4, 1, 16, 16), LABELS, "found 1 x 16 x 16"),
        (IMAGES, LABELS + 1, "10 classes, found label 10"),
        (IMAGES, LABELS - 1, "label"),
        (IMAGES, LABELS[:3], "found 4 images and 3 labels"),
        (IMAGES[:0], LABELS[:0], "at least one image"),
    ],
    ids=["size", "channels", "label too large", "label negative", "too few labels", "empty"],
)
def test_what_cannot_be_measured_is_refused(images: Tensor, labels: Tensor, words: str) -> None:
    assert words in refused(lambda: measure(make_teacher(), images, labels))


def test_networks_of_different_classes_are_not_compared() -> None:
    other = make_teacher(models.wide_resnet(10, 1, num_classes=12))
    with pytest.raises(ZsktError, match="equal class count"):
        measure(make_teacher(), IMAGES, LABELS, other)


def test_predict_leaves_the_network_alone() -> None:
    network = make_teacher()
    network.module.get_submodule("block1").train()  # by the user, so it must stay
    before, modes = copy.deepcopy(network.state_dict()), [child.training for child in network.modules()]
    images = torch.rand(7, 3, 16, 16)
    logits = predict(network, images)
    assert logits.shape == (7, 10)
    assert not logits.requires_grad
    assert [child.training for child in network.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    torch.testing.assert_close(predict(network, images, batch_size=3), logits)  # batches do not affect one another
    half = predict(make_teacher(models.wide_resnet(10, 2).bfloat16()), images)
    assert half.dtype == torch.float32
    assert predict(make_teacher(models.wide_resnet(10, 2).double()), images).dtype == torch.float64


def test_beliefs_on_pseudo_images(answers: tuple[Tensor, Tensor, Tensor]) -> None:
    first, second, _ = answers
    found = pseudo_beliefs(first, second)
    p, q = probabilities(first), probabilities(second)
    assert found["teacher_confidence"] == pytest.approx(sum(map(max, p)) / M, rel=1e-5)
    assert found["student_confidence"] == pytest.approx(sum(map(max, q)) / M, rel=1e-5)
    assert found["pseudo_agreement"] == agreement(first, second)
    counts = [sum(best(row) == k for row in p) for k in range(K)]
    assert found["class_counts"] == counts
    entropy = -sum(c / M * math.log(c / M) for c in counts if c)
    assert found["class_entropy"] == pytest.approx(entropy / math.log(K), rel=1e-5)


def test_normalised_class_entropy_is_one_for_uniform_and_zero_for_one_class() -> None:
    uniform, single = torch.eye(K).repeat(3, 1), torch.eye(K)[:1].repeat(9, 1)
    assert pseudo_beliefs(uniform, uniform)["class_entropy"] == pytest.approx(1)
    entropy = pseudo_beliefs(single, single)["class_entropy"]
    assert (entropy, math.copysign(1, entropy)) == (0, 1)  # not -0.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, s: (t, s), []),
        (lambda t, s: (t[:1].expand(70, K), s[:1].expand(70, K)), [f"collapse: the teacher predicts 1 of {K} classes"]),
        (lambda t, s: (t / 1000, s / 1000), ["recognises nothing"]),
        (lambda t, s: (t, torch.cat([s[:28], s[28:].roll(1, dims=1)])), ["disagrees"]),
        (lambda t, s: (t, s.roll(1, dims=1)), ["no more than by chance"]),
    ],
    ids=["fine", "collapse", "unsure", "disagreement", "chance"],
)
def test_warnings(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], words: list[str]) -> None:
    confident = 5 * torch.eye(K).repeat(10, 1)
    beliefs = pseudo_beliefs(*change(confident, confident))
    found = pseudo_image_warnings(beliefs)
    assert all(word in line for word, line in zip(words, found.values(), strict=True))
    if "chance" in found:
        assert pseudo_image_warnings(beliefs, progress=0.1) == {}  # as every student begins


def test_a_warning_is_given_once_and_only_if_it_holds_twice() -> None:
    fine = pseudo_beliefs(5 * torch.eye(K), 5 * torch.eye(K)) | {"pseudo_variation": 0.2}
    dead = fine | {"pseudo_variation": 0.001}
    assert new_warnings([], dead, 0.1) == []
    assert new_warnings([fine], dead, 0.1) == []
    (line,) = new_warnings([fine, dead], dead, 0.1)
    assert line.startswith("dead generator: ")
    assert new_warnings([dead, dead | {"warnings": [line]}, fine, dead], dead, 0.5) == []


def test_two_classes_are_not_called_chance_where_they_are_not() -> None:
    """46 of 64 is 3.5 standard deviations above chance; 36 of 64 is one."""
    counts = {"class_counts": [32, 32], "class_entropy": 1.0}
    for right, words in ((46, set()), (36, {"chance"})):
        assert (
            pseudo_image_warnings(counts | {"teacher_confidence": 0.72, "pseudo_agreement": right / 64}).keys() == words
        )
    unsure = pseudo_image_warnings(counts | {"teacher_confidence": 0.55, "pseudo_agreement": 0.9})
    assert unsure.keys() == {"unrecognised"}


def test_a_vanished_adversary_is_no_failure_near_the_end_nor_where_nothing_searches() -> None:
    beliefs = pseudo_beliefs(5 * torch.eye(K), 5 * torch.eye(K))
    found = {"vanished adversary"}
    assert pseudo_image_warnings(beliefs, 0.5).keys() == set()
    assert pseudo_image_warnings(beliefs | {"adversary_kl": 1e-4}, 0.5).keys() == found
    assert pseudo_image_warnings(beliefs | {"adversary_kl": 1e-2}, 0.5).keys() == set()
    assert pseudo_image_warnings(beliefs | {"adversary_kl": 1e-4}, 0.9).keys() == set()


def test_bootstrap_intervals_have_their_coverage() -> None:
    rng = torch.Generator().manual_seed(0)
    inside = 0
    for seed in range(60):
        low, high = bootstrap(torch.randn(50, generator=rng, dtype=torch.float64), seed=seed)
        inside += low <= 0 <= high
        assert 0.3 < high - low < 0.9  # 2 x 1.96 / sqrt(50) = 0.55
    assert 50 <= inside <= 60
    assert bootstrap(torch.ones(5)) == [1, 1]


@pytest.mark.parametrize(("count", "total"), [(0, 100), (3, 100), (50, 100), (100, 100), (1, 7)])
def test_intervals_of_fractions_are_scipys(count: int, total: int) -> None:
    expected = binomtest(count, total).proportion_ci(0.95, method="wilson")
    assert wilson(count, total) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_disagreements_are_counted_by_class(answers: tuple[Tensor, Tensor, Tensor]) -> None:
    first, second, _ = answers
    found = disagreements(first, second, [f"class {k}" for k in range(K)], most=3)
    mine, theirs = first.argmax(dim=1).tolist(), second.argmax(dim=1).tolist()
    for k, share in enumerate(found["disagreement_by_class"]):
        seen = [a for a, b in zip(mine, theirs, strict=True) if b == k]
        assert share == pytest.approx(sum(a != k for a in seen) / len(seen))
    pairs = Counter((b, a) for a, b in zip(mine, theirs, strict=True) if a != b)
    assert [pair["images"] for pair in found["most_disagreements"]] == [n for _, n in pairs.most_common(3)]
    for pair in found["most_disagreements"]:
        assert pairs[int(pair["teacher"][6:]), int(pair["student"][6:])] == pair["images"]
    same = disagreements(first, first)
    assert same["most_disagreements"] == []
    assert set(same["disagreement_by_class"]) <= {0.0, None}


def test_a_class_that_the_teacher_never_predicts_has_no_disagreement() -> None:
    logits = torch.eye(4)[[0, 1, 1]]
    assert disagreements(logits, logits)["disagreement_by_class"] == [0, 0, None, None]


def test_noise_classes_are_those_of_the_network() -> None:
    class Brightness(nn.Module):
        """Class 1 for images brighter than the mean."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([-x.mean(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3))], dim=1)

    network = Classifier(Brightness(), input_size=(1, 4, 4), mean=[0.5], std=[0.25])
    counts = noise_classes(network)
    assert sum(counts) == 1000
    assert 400 < counts[1] < 600  # noise is as often bright as dark
    assert noise_classes(network) == counts
    assert len({tuple(noise_classes(network, seed=seed)) for seed in range(5)}) > 1


def test_images_with_nan_logits_are_counted() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sqrt(x.mean(dim=(2, 3)) + 3)

    network = Classifier(Root(), input_size=(3, 4, 4), mean=[1.0] * 3, std=[0.25] * 3)
    images = torch.ones(5, 3, 4, 4)
    predict(network, images)
    images[3:] = 0  # (0 - 1) / 0.25 + 3 < 0
    with pytest.raises(ZsktError, match="NaN or infinity for 2 of 5 images"):
        predict(network, images)

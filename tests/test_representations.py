"""CKA against its definition over all tuples of images, and what it must and must not depend on."""

import itertools

import pytest
import torch
from torch import Tensor

from small import GREY, FourStages, Tokens, make_teacher
from zskt.evaluate import representations
from zskt.evaluate.representations import cka, gram, hsic, stage_alignment
from zskt.networks import models
from zskt.networks.classifier import Classifier


def features(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alone(x: Tensor, y: Tensor) -> float:
    """CKA of one minibatch."""
    found = cka([(gram(x), gram(y))])
    assert found is not None
    return found


def plain(x: Tensor, y: Tensor) -> float:
    """The plain, biased estimate, from features: |Y'X|^2 / (|X'X| |Y'Y|)."""
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    return float((y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def test_hsic_is_the_average_over_all_tuples_of_different_images() -> None:
    """Its definition as a U-statistic: E[k_ij l_ij] + E[k_ij l_qr] - 2 E[k_ij l_iq]."""
    x = features(7, 3)
    y = x[:, :2] + features(7, 2, seed=1)
    k, m = (x @ x.T).tolist(), (y @ y.T).tolist()
    terms = [
        k[i][j] * m[i][j] + k[i][j] * m[q][r] - 2 * k[i][j] * m[i][q]
        for i, j, q, r in itertools.permutations(range(7), 4)
    ]
    expected = sum(terms) / len(terms)
    assert hsic(x @ x.T, y @ y.T) == pytest.approx(expected, rel=1e-9)
    assert hsic(gram(x), gram(y)) == pytest.approx(expected, rel=1e-9)  # the mean makes no difference
    assert abs(expected) > 0.1


def test_rotation_scale_and_shift_are_no_difference() -> None:
    x = features(40, 6)
    rotation = torch.linalg.qr(features(6, 6, seed=2)).Q
    assert alone(x, 3 * x @ rotation + 100) == pytest.approx(1, abs=1e-6)
    stretched = x * torch.tensor([5.0, 1, 1, 1, 1, 1])
    assert alone(x, stretched) < 0.9  # not so for any linear map


def test_many_unrelated_features_are_not_alike() -> None:
    """Where the plain estimate fails."""
    x, y = features(60, 3_000), features(60, 3_000, seed=1)
    assert plain(x, y) > 0.9
    assert abs(alone(x, y)) < 0.1


def test_many_images_make_it_the_plain_one() -> None:
    x = features(3_000, 4)
    y = torch.cat([x[:, :2], features(3_000, 2, seed=1)], dim=1)
    assert alone(x, y) == pytest.approx(plain(x, y), abs=0.01)
    assert 0.3 < plain(x, y) < 0.7


def test_the_size_of_minibatches_makes_no_difference_on_average() -> None:
    x = features(4_000, 4)
    y = torch.cat([x[:, :2], features(4_000, 2, seed=1)], dim=1)
    small = cka((gram(a), gram(b)) for a, b in zip(x.split(8), y.split(8), strict=True))
    assert small == pytest.approx(alone(x, y), abs=0.02)


def test_constant_features_have_no_alignment() -> None:
    assert cka([(gram(torch.ones(9, 4)), gram(features(9, 4)))]) is None


def test_stages_of_like_resolution_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(representations, "MINIBATCH", 10)
    torch.manual_seed(0)
    first = make_teacher(FourStages(4), seed=1)
    second = Classifier(models.wide_resnet(10, 1), input_size=(3, 16, 16), mean=[0.4] * 3, std=[0.2] * 3)
    images = torch.rand(25, 3, 16, 16)
    found = stage_alignment(first, second, images)
    stages = [("stage1", "block1"), ("stage2", "block2"), ("stage3", "block3")]
    assert [pair[:2] for pair in found] == [*stages, ("logits", "logits")]
    with torch.no_grad():
        x = first.module.get_submodule("stage1")((images - 0.5) / 0.25)
        outputs: list[Tensor] = []
        block = second.module.get_submodule("block1")
        handle = block.register_forward_hook(lambda *call: outputs.append(call[2]))
        second.module.eval()((images - 0.4) / 0.2)
        handle.remove()
    sizes = [9, 9, 7]
    batches = zip(x.split(sizes), outputs[0].split(sizes), strict=True)
    assert found[0].cka == pytest.approx(cka((gram(a), gram(b)) for a, b in batches), abs=1e-4)
    assert [pair.cka for pair in stage_alignment(first, first, images)] == pytest.approx([1] * 5, abs=1e-4)


def test_networks_without_stages_have_their_logits_compared() -> None:
    torch.manual_seed(0)
    tokens = Classifier(Tokens(), input_size=(3, 16, 16), **GREY)
    (found,) = stage_alignment(tokens, make_teacher(), torch.rand(8, 3, 16, 16))
    assert found[:2] == ("logits", "logits")
    assert found.cka is not None


def test_observed_networks_are_left_alone() -> None:
    network = make_teacher()
    child = network.module.get_submodule("block1").train()
    before = network.fingerprint()
    stage_alignment(network, network, torch.rand(5, 3, 16, 16))
    assert network.fingerprint() == before
    assert child.training
    assert not any(module._forward_hooks for module in network.modules())


def test_fewer_than_four_images_have_no_alignment() -> None:
    network = make_teacher()
    found = stage_alignment(network, network, torch.rand(3, 3, 16, 16))
    assert [pair.cka for pair in found] == [None] * 4

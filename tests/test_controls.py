"""P-values against the normal approximation and their distribution without a difference; networks with new weights."""

import math

import pytest
import torch
from scipy.stats import norm
from torch import nn

from small import GREY, Tokens, make_teacher, refused
from zskt.evaluate.controls import p_value, untrained
from zskt.networks import models
from zskt.networks.checks import as_teacher
from zskt.networks.classifier import Classifier


@pytest.mark.parametrize("difference", [-0.1, 0.0, 0.1, 0.25])
def test_for_many_images_it_is_the_normal_approximation(difference: float) -> None:
    """Welch's statistic of two means, one-sided."""
    rng = torch.Generator().manual_seed(0)
    control = torch.randn(400, generator=rng)
    student = 2 * torch.randn(900, generator=rng)
    student += control.mean() - student.mean() + difference
    z = difference / math.sqrt(float(control.var() / 400 + student.var() / 900))
    assert p_value(student, [control], paired=False) == pytest.approx(norm.sf(z), abs=0.04)


def test_paired_images_show_a_small_difference() -> None:
    rng = torch.Generator().manual_seed(0)
    difficulty = torch.rand(300, generator=rng)
    control = (difficulty > 0.5).double()
    student = (difficulty > 0.46).double()  # never worse on any image, better on few
    z = float((student - control).mean() / (student - control).std() * math.sqrt(300))
    assert p_value(student, [control], paired=True) == pytest.approx(norm.sf(z), abs=0.01)
    assert p_value(student, [control], paired=False) > 0.05


def test_without_a_difference_p_values_are_uniform() -> None:
    rng = torch.Generator().manual_seed(0)
    found = torch.tensor(
        [p_value(torch.rand(60, generator=rng), [torch.rand(60, generator=rng)], paired=False) for _ in range(60)]
    )
    for level in (0.1, 0.5, 0.9):  # three standard deviations of a share of 60
        assert abs(float((found <= level).double().mean()) - level) < 3 * math.sqrt(level * (1 - level) / 60)


def test_extremes() -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert p_value(values, [values], paired=True) == 1  # as close
    assert p_value(values + 2, [values], paired=True) == 1 / 1001
    assert p_value(values, [values + 2], paired=False) == 1


def test_each_control_counts() -> None:
    """One of three is closer to the teacher than the student is."""
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    found = p_value(values, [values - 2, values + 2, values - 2], paired=True)
    assert found == pytest.approx(1 / 3, abs=0.05)


def test_untrained_networks_have_new_weights_of_the_same_kind() -> None:
    network = make_teacher()
    before, state = network.fingerprint(), torch.get_rng_state()
    first, again, second = (untrained(network, seed) for seed in (0, 0, 1))
    assert network.fingerprint() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert first.fingerprint() == again.fingerprint() != second.fingerprint() != before
    for layer in first.module.modules():
        if isinstance(layer, nn.Conv2d):  # uniform up to 1 / sqrt(fan in)
            fan_in = layer.weight[0].numel()
            assert float(layer.weight.std()) == pytest.approx((3 * fan_in) ** -0.5, rel=0.25)
        elif isinstance(layer, nn.BatchNorm2d):
            assert float(layer.running_mean.abs().max()) == 0  # type: ignore[union-attr]
    assert not any(p.requires_grad for p in first.parameters())
    images = torch.rand(4, 3, 16, 16)
    assert not torch.equal(first(first.normalise(images)), second(second.normalise(images)))


def test_a_network_that_returns_probabilities_stays_one() -> None:
    network = as_teacher(
        Classifier(nn.Sequential(models.wide_resnet(10, 1), nn.Softmax(1)), input_size=(3, 16, 16), **GREY)
    )
    assert network.output == untrained(network).output == "probabilities"


def test_weights_that_cannot_be_drawn_anew_are_refused() -> None:
    network = Classifier(Tokens(), input_size=(3, 16, 16), **GREY)
    line = refused(lambda: untrained(network))
    assert "found the network itself (Tokens) with 1 tensors of its own; give control networks" in line

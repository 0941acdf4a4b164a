"""Transition curves against a plain loop of batch size 1, and every known way to get them wrong."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zskt
from small import Viewing, make_teacher
from zskt.bench.reference import released_transitions
from zskt.errors import UsageError, ZsktError
from zskt.evaluate.fidelity import compare
from zskt.evaluate.transitions import Paths, Transitions, transition_curves
from zskt.networks import models
from zskt.networks.classifier import Classifier

K, STEPS, XI = 4, 5, 0.8
SIZE = (3, 9, 14)


def confident(module: nn.Module) -> nn.Module:
    """The classifier in float64, confident and without a favourite class, so that a few steps change its beliefs."""
    last = [layer for layer in module.double().modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        logits = module.eval()(4 * make_images(50)[0] - 2)
        last.weight.mul_(2 / logits.std(dim=0).mean())
        last.bias.sub_(module(4 * make_images(50)[0] - 2).mean(dim=0))
    return module


def make_pair() -> tuple[Classifier, Classifier]:
    """Two architectures with different normalisations, in float64."""
    torch.manual_seed(1)
    first = confident(models.wide_resnet(10, 1, num_classes=K))
    second = confident(models.build("convnet-6", K, SIZE))
    one = Classifier(first, input_size=SIZE, mean=[0.5] * 3, std=[0.25] * 3)
    other = Classifier(second, input_size=SIZE, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.35])
    return one, other


def make_images(count: int = 3) -> tuple[Tensor, Tensor]:
    """Coloured noise in [0, 1], (count, *SIZE), and classes (count,)."""
    rng = torch.Generator().manual_seed(2)
    colours, noise = torch.rand(count, 3, 1, 1, generator=rng), torch.rand(count, *SIZE, generator=rng)
    return ((colours + noise) / 2).double(), torch.randint(K, (count,), generator=rng)


def plain(
    stepped: Classifier, other: Classifier, images: Tensor, starts: Tensor, *, same: bool = False, **changes: Any
) -> tuple[Tensor, Tensor]:
    """The reference; `same` omits the conversion between the networks' normalisations."""

    def renormalise(x: Tensor) -> Tensor:
        return (x * stepped.std + stepped.mean - other.mean) / other.std

    settings = {"steps": STEPS, "step_size": XI, "renormalise": None if same else renormalise} | changes
    return released_transitions(stepped, other, stepped.normalise(images), starts, K, **settings)


@pytest.mark.parametrize("stepped", ["first", "second"])
@pytest.mark.parametrize("batch_size", [2, 64])
def test_curves_are_those_of_the_plain_loop(stepped: Any, batch_size: int) -> None:
    first, second = make_pair()
    images, starts = make_images()
    paths = Paths(steps=STEPS, step_size=XI, stepped=stepped, batch_size=batch_size)
    found = transition_curves(first, second, images, starts, paths)
    if stepped == "first":
        one, two = plain(first, second, images, starts)
    else:
        two, one = plain(second, first, images, starts)
    torch.testing.assert_close(found.examples, torch.stack([one, two]).float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.first, one.mean(dim=1), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.second, two.mean(dim=1), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.gaps, (one - two).abs().mean(dim=1), rtol=0, atol=1e-6)
    assert found.error == pytest.approx(float((one - two).abs().mean()), abs=1e-9)
    assert (one[..., -1] - one[..., 0]).abs().max() > 0.1  # the steps change something


def wrong_curves(how: str, first: Classifier, second: Classifier, images: Tensor, starts: Tensor) -> Tensor:
    """Both networks' curves (2, M, K - 1, S) under a mistake."""
    if how == "recorded after the step":
        return torch.stack(plain(first, second, images, starts, steps=STEPS + 1))[..., 1:]
    if how == "the other network stepped":
        return torch.stack(plain(second, first, images, starts)).flip(0)
    if how == "steps in [0, 1] pixels":  # x = std * x' + mean, so steps are smaller by std^2
        one = Classifier(_Rescaled(first), input_size=SIZE, mean=[0.0] * 3, std=[1.0] * 3)
        return torch.stack(plain(one, second, images, starts))
    if how == "mean over the batch":
        return torch.stack(plain(first, second, images, starts, step_size=XI / (len(images) * (K - 1))))
    if how == "the other network's normalisation ignored":
        return torch.stack(plain(first, second, images, starts, same=True))
    return torch.stack(plain(first, second, images, (starts + 1) % K))  # another start class


class _Rescaled(nn.Module):
    """A network on [0, 1] pixels."""

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.network.normalise(x))


MISTAKES = ["recorded after the step", "the other network stepped", "steps in [0, 1] pixels", "mean over the batch"]
MISTAKES += ["the other network's normalisation ignored", "another start class"]


@pytest.mark.parametrize("how", MISTAKES)
def test_each_known_mistake_changes_the_curves(how: str) -> None:
    first, second = make_pair()
    images, starts = make_images()
    found = transition_curves(first, second, images, starts, Paths(steps=STEPS, step_size=XI))
    assert (wrong_curves(how, first, second, images, starts) - found.examples).abs().max() > 1e-3


def test_networks_are_unchanged() -> None:
    first, second = make_pair()
    before = [first.fingerprint(), second.fingerprint()]
    images, starts = make_images()
    transition_curves(first, second, images, starts, Paths(steps=3))
    assert [first.fingerprint(), second.fingerprint()] == before
    assert all(p.grad is None for p in (*first.parameters(), *second.parameters()))


def test_equal_networks_have_no_error_and_memory_is_bounded() -> None:
    first, _ = make_pair()
    images, starts = make_images()
    shapes: list[int] = []
    handle = first.module.register_forward_pre_hook(lambda _, inputs: shapes.append(len(inputs[0])))
    found = transition_curves(first, first, images, starts, Paths(steps=2, batch_size=4))
    handle.remove()
    assert found.error == 0
    assert 2 < max(shapes) <= 4


def test_bf16_is_close_and_off_by_default() -> None:
    first, second = make_pair()
    first.float(), second.float()
    images, starts = make_images()
    exact = transition_curves(first, second, images, starts, Paths(steps=3))
    near = transition_curves(first, second, images, starts, Paths(steps=3, precision="bf16"))
    assert 0 < abs(near.error - exact.error) < 0.05


def test_a_network_that_needs_contiguous_feature_maps_can_be_followed() -> None:
    network = Classifier(Viewing(size=SIZE, classes=K), input_size=SIZE, mean=[0.5] * 3, std=[0.25] * 3)
    images, starts = make_images()
    assert transition_curves(network, network, images.float(), starts, Paths(steps=2)).error == 0


def test_compare_agrees_with_its_definitions() -> None:
    first, second = make_pair()
    images, _ = make_images(40)
    labels = first(first.normalise(images)).argmax(dim=1)
    agreeing = (second(second.normalise(images)).argmax(dim=1) == labels).nonzero().squeeze(1)
    number = len(agreeing) - 2
    assert number > 2
    result = compare(first, second, images, labels, Paths(images=number, steps=3, seed=1))
    measured = result.measured
    assert measured["agreement"] == pytest.approx(len(agreeing) / 40)
    assert measured["accuracy"] == 1
    assert measured["teacher_accuracy"] == measured["agreement"]
    assert measured["mean_transition_error"] == result.mean_transition_error
    for name, (low, high) in measured["intervals"].items():
        assert low <= measured[name] <= high, name
    low, high = measured["intervals"]["mean_transition_error"]
    assert low < high
    again = compare(first, second, images, labels, Paths(images=number, steps=3, seed=1))
    other = compare(first, second, images, labels, Paths(images=number, steps=3, seed=2))
    assert again.measured == measured
    assert other.mean_transition_error != result.mean_transition_error
    assert set(result.transitions.starts.tolist()) <= set(labels[agreeing].tolist())


def test_paths_start_from_the_label_if_requested() -> None:
    first, second = make_pair()
    images, _ = make_images(20)
    labels = (first(first.normalise(images)).argmax(dim=1) + 1) % K  # always wrong
    by_prediction = compare(first, second, images, labels, Paths(images=2, steps=2, start="prediction"))
    by_label = compare(first, second, images, labels, Paths(images=2, steps=2, start="label"))
    assert torch.equal((by_prediction.transitions.starts + 1) % K, by_label.transitions.starts)


def test_a_bare_module_uses_the_other_normalisation() -> None:
    first, second = make_pair()
    images, labels = make_images(20)
    bare = compare(first.module, second, images, labels, Paths(images=2, steps=2))
    wrapped = second.like(first.module)
    assert bare.measured == compare(wrapped, second, images, labels, Paths(images=2, steps=2)).measured
    assert zskt.compare is compare
    with pytest.raises(UsageError, match="two bare modules"):
        compare(first.module, second.module, images)


def test_too_few_agreeing_images_are_counted_in_the_error() -> None:
    first, second = make_pair()
    images, labels = make_images(20)
    with pytest.raises(ZsktError, match=r"expected 1,000 images .* found \d+ of 20"):
        compare(first, second, images, labels)


@pytest.mark.parametrize("change", [{"steps": 0}, {"step_size": -1.0}, {"step_size": float("nan")}, {"batch_size": 0}])
def test_settings_must_be_positive(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(change))} = .*: expected a positive number"):
        Paths(**change)


def test_networks_that_do_not_fit_together_are_refused() -> None:
    first, _ = make_pair()
    images, labels = make_images(20)
    classes = make_teacher(models.wide_resnet(10, 1, num_classes=7).double(), size=SIZE)
    larger = make_teacher(models.wide_resnet(10, 1, num_classes=K).double(), size=(3, 16, 16))
    with pytest.raises(ZsktError, match="equal class count, found 4 and 7"):
        compare(first, classes, images, labels)
    with pytest.raises(ZsktError, match="equal size, found 3 x 9 x 14 and 3 x 16 x 16"):
        compare(first, larger, images, labels)


def test_networks_with_nan_logits_are_refused() -> None:
    class Brittle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.log(x.mean(dim=(2, 3)) + 3)  # NaN for dark images, not for the noise of the checks

    network = Classifier(Brittle(), input_size=SIZE, mean=[1.0] * 3, std=[0.25] * 3)
    with pytest.raises(ZsktError, match="NaN or infinity for 20 of 20 images"):
        compare(network, network, torch.zeros(20, *SIZE))


def test_steps_so_large_that_logits_are_nan_are_refused() -> None:
    first, second = make_pair()
    images, starts = make_images()
    with pytest.raises(ZsktError, match="smaller --step-size"):
        transition_curves(first, second, images, starts, Paths(steps=4, step_size=1e308))


def test_transitions_keep_examples_for_plots() -> None:
    first, second = make_pair()
    images, starts = make_images(10)
    found: Transitions = transition_curves(first, second, images, starts, Paths(steps=2, batch_size=5))
    assert found.examples.shape == (2, 8, K - 1, 2)
    assert torch.equal(found.images, images[:8])
    torch.testing.assert_close(found.examples[0].mean(dim=1).double(), found.first[:8], rtol=0, atol=1e-6)

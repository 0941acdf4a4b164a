"""The generator: exact image sizes, the released network's parameters, a width within a budget."""

import pytest
import torch

from zskt.method.generator import WIDTHS, Generator, choose_width
from zskt.networks.classifier import count_parameters
from zskt.networks.observe import forward_flops

SIZES = [(8, 8), (28, 28), (32, 32), (64, 64), (32, 96), (30, 45), (224, 224), (5, 7)]


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_images_have_the_exact_size(size: tuple[int, int], channels: int) -> None:
    generator = Generator(10, (channels, *size), 16)
    images = generator(torch.randn(2, 10))
    assert images.shape == (2, channels, *size)
    assert images.isfinite().all()
    _, height, width = generator.start
    assert 2**generator.doublings * height >= size[0]  # the last interpolation never more than doubles
    assert 2**generator.doublings * width >= size[1]
    assert 5 <= min(height, width) <= 11  # near 8 pixels wide, whatever the size
    assert count_parameters(generator) < 100_000  # starting at a quarter of 224 would take half a million


def test_images_are_neither_squashed_nor_blank() -> None:
    torch.manual_seed(0)
    images = Generator(100, (3, 32, 32), 16)(torch.randn(64, 100))
    assert images.max() > 1.5  # BatchNorm at the end: about unit variance per channel, beyond any tanh
    torch.testing.assert_close(images.var(dim=(0, 2, 3), correction=0), torch.ones(3), rtol=0.01, atol=0.01)
    assert not torch.equal(images[0], images[1])


def test_parameters_are_the_released_ones_without_the_biases() -> None:
    # Linear 100 -> 128 x 8 x 8, BN; up x2, conv 128 + BN; up x2, conv 64 + BN; conv 3, BN with weight and bias
    linear = 100 * 128 * 8 * 8 + 128 * 8 * 8
    batchnorms = 2 * (128 + 128 + 64 + 3)
    weights = 9 * (128 * 128 + 128 * 64 + 64 * 3)
    biases = 128 + 64 + 3
    released = linear + batchnorms + weights + biases
    generator = Generator(100, (3, 32, 32), 128)
    assert count_parameters(generator) == released - biases
    assert generator.start == (128, 8, 8)
    convolutions = [tuple(p.shape) for p in generator.parameters() if p.ndim == 4]
    assert convolutions == [(128, 128, 3, 3), (64, 128, 3, 3), (3, 64, 3, 3)]


def test_the_removed_biases_had_no_effect() -> None:
    torch.manual_seed(0)
    generator, z = Generator(100, (3, 32, 32), 16), torch.randn(8, 100)
    before = generator(z)
    generator.conv.bias = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    torch.testing.assert_close(generator(z), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 30, 45)])
def test_the_width_is_the_widest_within_the_budget(size: tuple[int, int, int]) -> None:
    cost = {width: forward_flops(Generator(100, size, width), (100,)) for width in WIDTHS}
    assert sorted(cost.values()) == list(cost.values())
    for width in WIDTHS:
        assert choose_width(100, size, cost[width]) == width
        assert choose_width(100, size, cost[width] - 1) == max(min(WIDTHS), width // 2)
    assert choose_width(100, size, 0) == min(WIDTHS)  # none fits: the narrowest
    assert choose_width(100, size, 10**15) == max(WIDTHS)
    chosen = [choose_width(100, size, budget) for budget in range(0, 2 * cost[128], cost[128] // 3)]
    assert chosen == sorted(chosen)

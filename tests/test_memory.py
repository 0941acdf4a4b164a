"""Which pseudo batches the student sees, and how often anybody is asked for them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from zskt.method.replay import Bank, Fresh, Memory, PseudoBatch, Same
from zskt.networks.observe import Observation

N, SHAPE = 4, (4, 1, 2, 2)


class Counting:
    """Stands in for generator and teacher: batch i of drawn images is full of i; every call is remembered."""

    def __init__(self) -> None:
        self.drawn = 0
        self.taught: list[Tensor] = []

    def draw(self) -> Tensor:
        self.drawn += 1
        return torch.full(SHAPE, float(self.drawn))

    def teach(self, images: Tensor) -> PseudoBatch:
        self.taught.append(images)
        return PseudoBatch(images, Observation(images.flatten(1)))

    def batches(self, memory: Memory, images: Tensor | None, updates: int) -> list[PseudoBatch]:
        return list(memory.batches(images, updates, self.draw, self.teach))


def filled(value: float) -> Tensor:
    return torch.full(SHAPE, float(value))


def bank(capacity: int = 3, seed: int = 0) -> Bank:
    return Bank(capacity, torch.Generator().manual_seed(seed))


def test_same_is_one_object_and_the_teacher_is_asked_once() -> None:
    counting, images = Counting(), filled(7)
    batches = counting.batches(Same(), images, 5)
    assert len(batches) == 5
    assert all(batch is batches[0] for batch in batches)
    assert batches[0].images is images
    assert (len(counting.taught), counting.drawn) == (1, 0)


def test_fresh_draws_one_for_each_update() -> None:
    counting = Counting()
    batches = counting.batches(Fresh(), None, 5)
    assert [float(batch.images.mean()) for batch in batches] == [1, 2, 3, 4, 5]
    assert (len(counting.taught), counting.drawn) == (5, 5)


def test_fresh_draws_only_when_the_student_is_ready() -> None:
    counting = Counting()
    batches = Fresh().batches(None, 5, counting.draw, counting.teach)
    next(batches)
    assert counting.drawn == 1  # ten batches at once would be ten times the memory


def test_bank_keeps_the_newest_in_bfloat16() -> None:
    memory, counting = bank(), Counting()
    for value in range(1, 6):
        counting.batches(memory, filled(value), 2)
        kept = set(range(max(1, value - 2), value + 1))
        assert set(memory.images.flatten().tolist()) == kept
    assert memory.images.dtype == torch.bfloat16
    assert memory.images.shape == (3, *SHAPE)
    assert (counting.drawn, len(counting.taught)) == (0, 10)
    assert all(images.dtype == torch.float32 and images.shape == SHAPE for images in counting.taught)


def test_bank_draws_from_all_of_it_and_keeps_large_values() -> None:
    memory, counting = bank(), Counting()
    for value in (1e5, -3.0, 2.0):  # 1e5 is beyond float16
        counting.batches(memory, filled(value), 1)
    batches = counting.batches(memory, filled(0.5), 200)  # now holds -3, 2, 0.5
    values = torch.cat([batch.images[:, 0, 0, 0] for batch in batches])
    shares = [float((values == value).double().mean()) for value in (-3, 2, 0.5)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.06)  # 4 standard deviations at 800 draws
    counting = Counting()
    (batch,) = counting.batches(bank(), filled(1e5), 1)
    assert float(batch.images.max()) == pytest.approx(1e5, rel=0.01)


@pytest.mark.parametrize("before", [0, 2, 5])
def test_bank_continues_identically_from_its_state(before: int) -> None:
    first, second = bank(), bank(seed=9)
    for value in range(before):
        Counting().batches(first, filled(value), 2)
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    second.rng.set_state(first.rng.get_state())  # the caller's to save
    for value in range(10, 15):
        one, two = Counting(), Counting()
        one.batches(first, filled(value), 3)
        two.batches(second, filled(value), 3)
        assert all(torch.equal(a, b) for a, b in zip(one.taught, two.taught, strict=True))
    assert torch.equal(first.images, second.images)
    assert first.slot == second.slot == (before + 5) % 3


@pytest.mark.gpu
def test_bank_from_a_checkpoint_goes_back_to_its_device() -> None:
    memory, counting = Bank(3, torch.Generator("cuda")), Counting()
    memory.load_state_dict({"images": torch.zeros(2, *SHAPE).bfloat16(), "slot": torch.tensor([2])})
    (batch,) = counting.batches(memory, filled(1).cuda(), 1)
    assert batch.images.is_cuda
    assert memory.slot.is_cuda


@pytest.mark.parametrize("make", [Same, Fresh])
def test_the_others_have_no_state(make: Callable[[], Memory]) -> None:
    memory = make()
    assert memory.state_dict() == {}
    memory.load_state_dict({})
    assert memory.needs_images == (make is Same)
    assert bank().needs_images

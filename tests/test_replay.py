"""Which pseudo batches the student sees, and how often anybody is asked for them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from zskt.method.replay import Fresh, Replay, ReplayBuffer, Same
from zskt.method.updates import Batch
from zskt.networks.observe import Observation

N, SHAPE = 4, (4, 1, 2, 2)


class Counting:
    """Stands in for generator and teacher: batch i of drawn images is full of i; every call is remembered."""

    def __init__(self) -> None:
        self.drawn = 0
        self.asked: list[Tensor] = []

    def draw(self) -> Batch:
        self.drawn += 1
        return filled(self.drawn)

    def ask(self, batch: Batch) -> Batch:
        self.asked.append(batch.images)
        return Batch(batch.images, batch.labels, Observation(batch.images.flatten(1)))

    def batches(self, replay: Replay, newest: Batch | None, updates: int) -> list[Batch]:
        return list(replay.batches(newest, updates, self.draw, self.ask))


def filled(value: float) -> Batch:
    """Images full of a value, whose labels are that value too."""
    return Batch(torch.full(SHAPE, float(value)), torch.full((N,), int(value)))


def buffer(capacity: int = 3, seed: int = 0) -> ReplayBuffer:
    return ReplayBuffer(capacity, torch.Generator().manual_seed(seed))


def test_same_is_one_object_and_the_teacher_is_asked_once() -> None:
    counting, newest = Counting(), filled(7)
    batches = counting.batches(Same(), newest, 5)
    assert len(batches) == 5
    assert all(batch is batches[0] for batch in batches)
    assert batches[0].images is newest.images
    assert (len(counting.asked), counting.drawn) == (1, 0)


def test_fresh_draws_one_for_each_update() -> None:
    counting = Counting()
    batches = counting.batches(Fresh(), None, 5)
    assert [float(batch.images.mean()) for batch in batches] == [1, 2, 3, 4, 5]
    assert (len(counting.asked), counting.drawn) == (5, 5)


def test_fresh_draws_only_when_the_student_is_ready() -> None:
    counting = Counting()
    batches = Fresh().batches(None, 5, counting.draw, counting.ask)
    next(batches)
    assert counting.drawn == 1  # ten batches at once would be ten times the replay


def test_a_buffer_keeps_the_newest_in_bfloat16() -> None:
    replay, counting = buffer(), Counting()
    for value in range(1, 6):
        counting.batches(replay, filled(value), 2)
        kept = set(range(max(1, value - 2), value + 1))
        assert replay.images is not None
        assert set(replay.images.flatten().tolist()) == kept
    assert replay.images is not None
    assert replay.images.dtype == torch.bfloat16
    assert replay.images.shape == (3, *SHAPE)
    assert (counting.drawn, len(counting.asked)) == (0, 10)
    assert all(images.dtype == torch.float32 and images.shape == SHAPE for images in counting.asked)


def test_a_buffer_draws_from_all_of_it_and_keeps_large_values() -> None:
    replay, counting = buffer(), Counting()
    for value in (1e5, -3.0, 2.0):  # 1e5 is beyond float16
        counting.batches(replay, filled(value), 1)
    batches = counting.batches(replay, filled(0.5), 200)  # now holds -3, 2, 0.5
    values = torch.cat([batch.images[:, 0, 0, 0] for batch in batches])
    assert torch.equal(
        torch.cat([batch.labels for batch in batches if batch.labels is not None]), values.int().long()
    )  # labels go with images
    shares = [float((values == value).double().mean()) for value in (-3, 2, 0.5)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.06)  # 4 standard deviations at 800 draws
    counting = Counting()
    (batch,) = counting.batches(buffer(), filled(1e5), 1)
    assert float(batch.images.max()) == pytest.approx(1e5, rel=0.01)


@pytest.mark.parametrize("before", [0, 2, 5])
def test_a_buffer_continues_identically_from_its_state(before: int) -> None:
    first, second = buffer(), buffer(seed=9)
    for value in range(before):
        Counting().batches(first, filled(value), 2)
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    for value in range(10, 15):
        one, two = Counting(), Counting()
        one.batches(first, filled(value), 3)
        two.batches(second, filled(value), 3)
        assert all(torch.equal(a, b) for a, b in zip(one.asked, two.asked, strict=True))
    for ours, theirs in ((first.images, second.images), (first.labels, second.labels)):
        assert ours is not None
        assert theirs is not None
        assert torch.equal(ours, theirs)
    assert first.slot == second.slot == (before + 5) % 3


@pytest.mark.gpu
def test_a_buffer_from_a_checkpoint_goes_back_to_its_device() -> None:
    replay, counting = ReplayBuffer(3, torch.Generator("cuda")), Counting()
    replay.load_state_dict(
        {"images": torch.zeros(2, *SHAPE).bfloat16(), "slot": torch.tensor([2]), "rng": torch.get_rng_state()}
    )
    (batch,) = counting.batches(replay, Batch(filled(1).images.cuda()), 1)
    assert batch.images.is_cuda
    assert replay.slot.is_cuda


@pytest.mark.parametrize("make", [Same, Fresh])
def test_the_others_have_no_state(make: Callable[[], Replay]) -> None:
    replay = make()
    assert replay.state_dict() == {}
    replay.load_state_dict({})
    assert replay.needs_images == (make is Same)
    assert buffer().needs_images

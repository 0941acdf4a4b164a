"""Training a teacher: augmentation, schedule, exact resume."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import zskt
from zskt import models
from zskt.baselines import Epoch, Teaching, TeachResult, augment, decayed, one_cycle, teach


def stripes(count: int) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 8, 8) of one bright row or column: two classes that a small network learns at once."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (count, 1, 8, 8), generator=rng, dtype=torch.uint8)
    labels = torch.arange(count) % 2
    for image, label, place in zip(images, labels, torch.randint(0, 8, (count,), generator=rng), strict=True):
        image[(0, place) if label else (0, slice(None), place)] = 255
    return images, labels


def train(out: Path | None, epochs: int = 4, **options: object) -> TeachResult:
    torch.manual_seed(0)
    module = models.convnet(4, num_classes=2, channels=1)
    settings = Teaching(epochs=epochs, batch_size=16, shift=1, mirrored=True)
    return teach(module, stripes(96), stripes(40), settings, mean=[0.2], std=[0.3], out=out, **options)


def test_it_learns_and_writes_a_teacher(tmp_path: Path) -> None:
    seen: list[Epoch] = []
    result = train(tmp_path / "teacher", callbacks=[seen.append])
    assert result.finished
    assert result.measured["accuracy"] > 0.9
    loaded = zskt.load_teacher(tmp_path / "teacher")
    trained = result.teacher.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in loaded.state_dict().items())
    assert seen[-1].update == seen[-1].updates == 24
    assert seen[-1].accuracy == result.measured["accuracy"]


def test_resume_is_bitwise_equal(tmp_path: Path) -> None:
    train(tmp_path / "whole")
    part = train(tmp_path / "parts", stop_after="2")
    assert (part.finished, part.epoch) == (False, 2)
    train(tmp_path / "parts", resume=True)
    files = [(tmp_path / name / "teacher.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_other_settings_are_refused_on_resume(tmp_path: Path) -> None:
    train(tmp_path / "parts", stop_after="1")
    with pytest.raises(zskt.ZsktError, match="other settings"):
        train(tmp_path / "parts", epochs=5, resume=True)
    with pytest.raises(zskt.ZsktError, match="unfinished training"):
        train(tmp_path / "parts")


def test_augmentation_shifts_within_bounds_and_mirrors() -> None:
    torch.manual_seed(0)
    image = torch.zeros(1, 3, 9, 9, dtype=torch.uint8)
    image[:, :, 4, 3] = 255
    places = set()
    for moved in augment(image.expand(400, -1, -1, -1), 2, True):
        assert moved.dtype == torch.uint8
        assert torch.equal(moved[0], moved[2])
        ((row, column),) = moved[0].nonzero().tolist()
        places.add((row, column))
    rows, columns = {2, 3, 4, 5, 6}, {1, 2, 3, 4, 5} | {8 - c for c in (1, 2, 3, 4, 5)}
    assert places == {(row, column) for row in rows for column in columns}


def test_no_augmentation_changes_nothing() -> None:
    images = torch.randint(0, 256, (5, 1, 7, 9), dtype=torch.uint8)
    assert torch.equal(augment(images, 0, False), images)


def test_one_cycle_rises_then_falls_to_zero() -> None:
    rates = [one_cycle(i / 1000) for i in range(1000)]
    peak = rates.index(max(rates))
    assert peak == 200
    assert rates[200] == pytest.approx(1)
    assert rates[:200] == sorted(rates[:200])
    assert rates[200:] == sorted(rates[200:], reverse=True)
    assert rates[-1] < 1e-4


def test_only_weights_decay() -> None:
    weights, others = decayed(models.convnet(4, channels=1), 5e-4)
    assert all(p.ndim > 1 for p in weights["params"])
    assert (weights["weight_decay"], others["weight_decay"]) == (5e-4, 0.0)
    assert len(weights["params"]) + len(others["params"]) == len(list(models.convnet(4, channels=1).parameters()))

"""The loop on labelled images: batches, augmentation, schedules, exact resume, what it refuses."""

import dataclasses
import itertools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zskt
from small import stripes
from zskt.method.schedule import learning_rate
from zskt.networks import models
from zskt.paper import training
from zskt.paper.baselines import cross_entropy, teach
from zskt.paper.training import Training, TrainingResult, augment, decayed, endless_batches, updates_in
from zskt.run.checkpoint import Interrupted
from zskt.run.lifecycle import Event

CPU = torch.device("cpu")


def train(out: Path | None, updates: int = 24, images: int = 96, **options: Any) -> TrainingResult:
    """A small teacher; options of `Training` are taken from `options` too."""
    named = {field.name for field in dataclasses.fields(Training)} & options.keys()
    settings = {"batch_size": 16, "random_crop": 1, "horizontal_flip": True}
    training = Training(updates, **settings | {name: options.pop(name) for name in named})
    torch.manual_seed(0)
    module = models.convnet(4, num_classes=2, channels=1)
    return teach(module, stripes(images), stripes(40), training, mean=[0.2], std=[0.3], out=out, **options)


def weights(folder: Path) -> bytes:
    return (folder / "teacher.safetensors").read_bytes()


def some_batches(images: int, count: int, first: int = 0, **settings: Any) -> list[tuple[Tensor, Tensor]]:
    """Batches of images that hold their own index, so that one sees which they are."""
    data = torch.arange(images).view(-1, 1, 1, 1).expand(-1, 1, 2, 2), torch.arange(images)
    batches = endless_batches(data, Training(100, random_crop=0, **settings), first, CPU)
    return list(itertools.islice(batches, count))


@pytest.mark.parametrize("schedule", ["one_cycle", "step"])
@pytest.mark.parametrize(
    "stops",
    [["1"], ["12"], ["9", "4"], ["0.000001s"]],
    ids=["after the first update", "between passes", "twice within a pass", "out of time"],
)
def test_resume_at_any_update_is_bitwise_equal(stops: list[str], schedule: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"schedule": schedule, "images": 90}  # a pass is 5 batches of 16 and one of 10
    whole = train(tmp_path / "whole", **settings)
    done = 0
    for i, stop in enumerate(stops):
        part = train(tmp_path / "parts", stop_after=stop, resume=i > 0, **settings)
        assert not part.finished
        done += 1 if stop.endswith("s") else int(stop)
        assert part.update == done
        assert part.measured["accuracy"] >= 0
    last = train(tmp_path / "parts", resume=True, **settings)
    assert last.finished
    assert last.measured == whole.measured
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")
    written = {"teacher.json", "teacher.safetensors", "metrics.jsonl", "timing.jsonl"}
    assert {path.name for path in (tmp_path / "parts").iterdir()} == written


def test_a_signal_leaves_a_checkpoint_to_resume_from(tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if event.step == 9:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped at step 9 of 24; continue with --resume") as caught:
        train(tmp_path / "parts", callbacks=[interrupt])
    assert caught.value.status == 143
    train(tmp_path / "parts", resume=True)
    train(tmp_path / "whole")
    assert weights(tmp_path / "whole") == weights(tmp_path / "parts")


def test_a_finished_training_whose_writing_failed_is_written_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **facts: object) -> None:
        raise zskt.ZsktError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_network", refuse)
        with pytest.raises(zskt.ZsktError, match="no space"):
            train(tmp_path / "a", updates=3)
    assert train(tmp_path / "a", updates=3, resume=True).measured["accuracy"] >= 0
    assert (tmp_path / "a" / "teacher.json").exists()


def test_a_training_that_was_killed_after_its_end_ends_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(training, "remove", lambda path: None)
        train(tmp_path / "a", updates=3)
    written = weights(tmp_path / "a")
    assert train(tmp_path / "a", updates=3, resume=True).finished
    assert weights(tmp_path / "a") == written
    assert not (tmp_path / "a" / "checkpoint").exists()


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "samples").mkdir()
    (tmp_path / "thesis.tex").touch()
    for resume in (True, False):
        with pytest.raises(zskt.ZsktError, match="expected a new or empty folder"):
            train(tmp_path, resume=resume)
    assert {path.name for path in tmp_path.iterdir()} == {"samples", "thesis.tex"}


def test_other_settings_and_data_are_refused_on_resume(tmp_path: Path) -> None:
    train(tmp_path / "parts", stop_after="1")
    changes: list[dict[str, Any]] = [{"updates": 25}, {"seed": 1}, {"schedule": "step"}]
    for changed in changes:
        with pytest.raises(zskt.ZsktError, match="differs in settings: resume"):
            train(tmp_path / "parts", resume=True, **changed)
    with pytest.raises(zskt.ZsktError, match=r"differs in data .*: resume"):
        train(tmp_path / "parts", resume=True, images=94)
    with pytest.raises(zskt.ZsktError, match="unfinished training"):
        train(tmp_path / "parts")


def test_other_random_numbers_neither_matter_nor_change(tmp_path: Path) -> None:
    """The seed is all that order and augmentation depend on, and the global random numbers go on as before."""
    first = train(None, 6).network.state_dict()
    before = torch.get_rng_state()
    again = train(None, 6, callbacks=[lambda event: torch.rand(3)]).network.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    torch.manual_seed(0)
    models.convnet(4, num_classes=2, channels=1)
    assert torch.equal(before, torch.get_rng_state())
    other = train(None, 6, seed=1).network.state_dict()
    assert not all(torch.equal(tensor, other[name]) for name, tensor in first.items())


def test_every_update_is_told_and_a_twentieth_of_them_measured() -> None:
    seen: list[Event] = []
    result = train(None, 45, callbacks=[seen.append])
    assert [event.step for event in seen] == list(range(1, 46))
    assert {event.steps for event in seen} == {45}
    assert [event.step for event in seen if event.line] == [1, *range(2, 45, 2), 45]
    assert seen[-1].line is not None
    assert seen[-1].line["accuracy"] == result.measured["accuracy"]


def test_bf16_trains_with_weights_in_fp32() -> None:
    network = train(None, 12, precision="bf16").network
    assert {tensor.dtype for tensor in network.parameters()} == {torch.float32}
    exact = train(None, 12).network
    pairs = zip(network.parameters(), exact.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_a_pass_sees_every_image_once_and_the_next_in_another_order() -> None:
    batches = some_batches(90, 12, batch_size=16)
    passes = [torch.cat([labels for _, labels in part]) for part in (batches[:6], batches[6:])]
    for order in passes:
        assert sorted(order.tolist()) == list(range(90))
    assert not torch.equal(*passes)
    for images, labels in batches:
        assert torch.equal(images[:, 0, 0, 0], labels)


@pytest.mark.parametrize("first", [1, 5, 6, 8])
def test_batches_begin_anywhere(first: int) -> None:
    whole, later = some_batches(90, 12, batch_size=16)[first:], some_batches(90, 12 - first, first, batch_size=16)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(whole, later, strict=True))


def test_a_last_batch_of_one_image_is_left_out() -> None:
    assert [len(labels) for _, labels in some_batches(33, 4, batch_size=16)] == [16] * 4
    assert [len(labels) for _, labels in some_batches(34, 4, batch_size=16)] == [16, 16, 2, 16]
    assert [updates_in(1, images, 16) for images in (2, 16, 17, 18, 32, 33, 34)] == [1, 1, 1, 2, 2, 2, 3]
    assert updates_in(3, 34, 16) == 9


def test_fewer_images_than_a_batch_are_all_taken_in_ever_other_orders() -> None:
    orders = [tuple(labels.tolist()) for _, labels in some_batches(10, 5, batch_size=64)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len(set(orders)) == 5


def test_images_too_many_for_the_device_come_in_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    on_device = some_batches(40, 4, batch_size=16)
    monkeypatch.setattr(training, "ON_DEVICE", 0)
    for there, here in zip(on_device, some_batches(40, 4, batch_size=16), strict=True):
        assert torch.equal(there[1], here[1])


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
    rate = learning_rate(training.SCHEDULES["one_cycle"], 1.0, 1000)
    rates = [rate(i) for i in range(1000)]
    peak = rates.index(max(rates))
    assert peak == 200
    assert rates[200] == pytest.approx(1)
    assert rates[:200] == sorted(rates[:200])
    assert rates[200:] == sorted(rates[200:], reverse=True)
    assert rates[-1] < 1e-4


@pytest.mark.parametrize("updates", [10, 200, 78_125 - 5])
def test_step_divides_by_five_at_30_60_and_80_percent(updates: int) -> None:
    rates = list(map(learning_rate(training.SCHEDULES["step"], 1.0, updates), range(updates)))
    drops = [update for update in range(1, updates) if rates[update] != rates[update - 1]]
    assert drops == [updates * 3 // 10, updates * 6 // 10, updates * 8 // 10]
    assert sorted(set(rates), reverse=True) == pytest.approx([1, 1 / 5, 1 / 25, 1 / 125])


def test_the_schedule_reaches_the_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    step = torch.optim.SGD.step

    def watched(self: torch.optim.SGD, closure: None = None) -> None:
        seen.append(self.param_groups[0]["lr"])
        assert {group["lr"] for group in self.param_groups} == {seen[-1]}
        step(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    train(None, 10, learning_rate=0.5, schedule="step")
    assert seen == pytest.approx([0.5] * 3 + [0.1] * 3 + [0.02] * 2 + [0.004] * 2)


def test_only_weights_decay() -> None:
    decaying, others = decayed(models.convnet(4, channels=1), 5e-4)
    assert all(p.ndim > 1 for p in decaying["params"])
    assert (decaying["weight_decay"], others["weight_decay"]) == (5e-4, 0.0)
    assert len(decaying["params"]) + len(others["params"]) == len(list(models.convnet(4, channels=1).parameters()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates": 0}, "updates = 0: expected a positive number"),
        ({"batch_size": 0}, "batch_size = 0: expected a positive number"),
        ({"batch_size": 1}, "batch_size = 1: expected at least 2"),
        ({"learning_rate": 0.0}, "learning_rate = 0.0: expected a positive number"),
        ({"learning_rate": float("nan")}, "expected a finite number"),
        ({"weight_decay": -1.0}, "expected 0 or more"),
        ({"seed": 10**30}, "expected at most"),
        ({"schedule": "steps"}, "unknown schedule 'steps': did you mean step"),
        ({"precision": "fp16"}, "unknown precision 'fp16'"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(zskt.UsageError) as caught:
        Training(**{"updates": 10} | settings)
    assert message in str(caught.value)


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(zskt.UsageError, match="need a folder"):
        train(None, stop_after="1")
    with pytest.raises(zskt.UsageError, match="expected a time such as 90s"):
        train(tmp_path / "a", stop_after="soon")
    with pytest.raises(zskt.UsageError, match="expected less than the image's 8 pixels"):
        train(None, random_crop=8)
    with pytest.raises(zskt.ZsktError, match="as BatchNorm needs, found 1; give more"):
        train(None, images=1)
    with pytest.raises(zskt.UsageError, match="epochs = 0"):
        updates_in(0, 10, 16)
    with pytest.raises(zskt.ZsktError, match=r"loss of the teacher is nan at step 5, first in .*lower --learning-rate"):
        train(tmp_path / "b", updates=100, learning_rate=1e30, schedule="step")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "config.toml").touch()
    with pytest.raises(zskt.ZsktError, match="already holds a run"):
        train(tmp_path / "c")
    assert {path.name for path in tmp_path.iterdir()} == {"b", "c"}  # b holds the state that diverged


def test_an_objective_of_another_network_is_noticed() -> None:
    module, other = (models.convnet(4, num_classes=2, channels=1) for _ in range(2))
    like = zskt.Classifier(module, input_size=(1, 8, 8), mean=[0.2], std=[0.3])
    data = stripes(20)
    with pytest.raises(zskt.ZsktError, match="compute it from that network"):
        training.fit("student", module, like, data, data, Training(2, random_crop=0), cross_entropy(other), metadata={})
    assert all(p.grad is None for p in other.parameters())


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    module = models.convnet(4, num_classes=2, channels=1)
    first = next(iter(module.parameters())).requires_grad_(False)
    before = first.clone()
    data = stripes(20)
    teach(module, data, data, Training(2, 8, random_crop=0), mean=[0.2], std=[0.3])
    assert torch.equal(first, before)
    with pytest.raises(zskt.ZsktError, match=r"expected a network with trainable parameters, found none"):
        teach(module.requires_grad_(False), data, data, Training(2, 8, random_crop=0), mean=[0.2], std=[0.3])

"""Runs sized by a time budget."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zskt
from small import make_teacher
from zskt.errors import UsageError
from zskt.method import recipe
from zskt.method.budget import Cost, duration, expected_seconds, fit, operations, probe, same_when_flipped
from zskt.method.build import METHODS
from zskt.method.config import Config
from zskt.method.recipe import load_recipe, plan
from zskt.networks import models
from zskt.settings import replace

SIZE = (3, 8, 8)
TINY = {
    "batch_size": 8,
    "generator.width": 8,
    "generator.latent": 12,
    "generator.updates": 2,
    "bank.batch_size": 8,
    "bank.views": 2,
}


def bank(budget: str) -> Config:
    return replace(load_recipe("bank"), {"budget": budget})


def new_student() -> nn.Module:
    torch.manual_seed(1)
    return models.build("convnet-4", 10, SIZE)


def test_a_bank_fills_its_budget() -> None:
    cost = Cost(round=1.0, step=0.1)
    config = fit(bank("100s"), cost, 100)
    assert config.bank.rounds == 33  # 35 % of 95 s
    assert config.bank.warmup == 6
    assert config.steps == 6 * config.generator.updates + 620
    assert 94 < expected_seconds(config, cost) <= 95


def test_images_of_the_users_own_take_their_share_of_a_budget() -> None:
    cost = Cost(round=1.0, step=0.1, asked=0.01)
    config = fit(bank("100s"), cost, 100, own=2_500)  # 25 s
    assert config.bank.rounds == 24  # 35 % of 70 s
    assert 94 < expected_seconds(config, cost, own=2_500) <= 95
    with pytest.raises(UsageError, match=r"expected at least 71 s, for two rounds"):
        fit(bank("60s"), cost, 60, own=6_000)


def test_evaluations_take_their_share_of_a_budget() -> None:
    """Twenty, and one at the end, of both networks on 64 images: dear where images are large."""
    cost = Cost(round=1.0, step=0.1, look=2.0)
    for budget in ("100s", "300s"):
        config = fit(bank(budget), cost, float(budget[:-1]))
        assert 0.94 * float(budget[:-1]) < expected_seconds(config, cost) <= 0.95 * float(budget[:-1])
    steps = fit(replace(load_recipe("zskt"), {"budget": "60s"}), Cost(step=0.5, look=1.0), 60).steps
    assert steps == (0.95 * 60 - 21) / 0.5
    teacher, student = make_teacher(size=SIZE), new_student()
    config = plan(teacher, student, "bank", TINY | {"steps": 600}).config
    assert probe(teacher, student, config, METHODS["bank"]).look > 0


def test_time_beyond_the_largest_bank_goes_to_the_student() -> None:
    config = fit(bank("2h"), Cost(round=1.0, step=0.1), 7_200)
    assert config.bank.rounds == 200
    assert config.steps - config.bank.warmup * config.generator.updates == int((0.95 * 7_200 - 200) / 0.1)


def test_other_methods_get_steps() -> None:
    assert fit(replace(load_recipe("zskt"), {"budget": "10s"}), Cost(step=0.5), 10).steps == 19


@pytest.mark.parametrize(
    ("name", "cost", "words"),
    [
        ("bank", Cost(round=2.0, step=0.1), "expected at least 10 s, for two rounds of synthesis of 2 s"),
        ("zskt", Cost(step=7.0), "expected at least 8 s, for one step"),
    ],
)
def test_a_budget_for_nothing_is_refused(name: str, cost: Cost, words: str) -> None:
    with pytest.raises(UsageError, match=f"budget = 5s: {words}"):
        fit(replace(load_recipe(name), {"budget": "5s"}), cost, 5)


@pytest.mark.parametrize("budget", ["300", "soon", "0s"])
def test_a_budget_is_a_time(budget: str) -> None:
    with pytest.raises(UsageError, match=f"budget = '{budget}'"):
        bank(budget)


@pytest.mark.parametrize("budget", ["60s", ""])
def test_what_is_named_as_enough_is_enough(budget: str) -> None:
    cost = Cost(round=65.0, step=0.2)
    config = replace(load_recipe("bank"), {"budget": budget})
    with pytest.raises(UsageError, match=r"at least 3 min, for two rounds of synthesis of 65 s"):
        fit(config, cost, 60)
    assert fit(config, cost, 180).bank.rounds == 2


def test_budget_and_sizes_are_not_given_together() -> None:
    for settings in ({"budget": "10s", "bank.rounds": 50}, {"budget": "10s", "steps": 200}):
        with pytest.raises(UsageError, match=r"budget chooses (bank.rounds|steps): give one of them"):
            zskt.distill(make_teacher(size=SIZE), new_student(), "bank", settings=settings)


def test_the_adversary_is_timed_too() -> None:
    """It asks the student, which the first rounds do not."""
    terms: list[set[str]] = []

    def watched(*arguments: Any) -> Any:
        method: Any = METHODS["bank"](*arguments)
        update = method.synthesis.update

        def updated() -> Any:
            losses, made = update()
            terms.append(set(losses.terms))
            return losses, made

        method.synthesis.update = updated
        return method

    teacher, student = make_teacher(size=SIZE), new_student()
    config = plan(teacher, student, "bank", TINY | {"steps": 600}).config
    probe(teacher, student, config, watched)
    assert {"batchnorm", "one_hot"} in terms
    assert {"batchnorm", "one_hot", "kl"} in terms


def test_the_parts_of_a_run_are_timed_without_a_trace() -> None:
    teacher, student = make_teacher(size=SIZE), new_student()
    for name in ("bank", "zskt-prior"):
        settings = {key: value for key, value in TINY.items() if name == "bank" or not key.startswith("bank.")}
        planned = plan(teacher, student, name, settings | {"steps": 600})
        before = {key: tensor.clone() for key, tensor in student.state_dict().items()}
        state = torch.get_rng_state()
        cost = probe(teacher, student, planned.config, METHODS[planned.config.method])
        assert cost.step > 0
        assert (cost.round > 0) == (name == "bank")
        assert 0 <= cost.flips <= 1
        assert all(torch.equal(tensor, before[key]) for key, tensor in student.state_dict().items())
        assert torch.equal(torch.get_rng_state(), state)


def test_views_are_flipped_if_the_teacher_does_not_mind(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(40, *SIZE)

    class Left(nn.Module):
        """Tells by how much brighter the left half is than the right, or, symmetric, by the first channel."""

        def __init__(self, symmetric: bool) -> None:
            super().__init__()
            self.symmetric = symmetric
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            side = x[..., :4].mean(dim=(1, 2, 3)) - x[..., 4:].mean(dim=(1, 2, 3))
            score = self.weight * (x[:, 0].mean(dim=(1, 2)) if self.symmetric else side)
            return torch.stack([score, -score], dim=1)

    for symmetric, share in ((True, 1.0), (False, 0.0)):
        teacher = zskt.Classifier(Left(symmetric), input_size=SIZE, mean=[0.5] * 3, std=[0.25] * 3)
        assert same_when_flipped(teacher, images) == share
    once = plan(make_teacher(size=SIZE), new_student(), "bank", TINY | {"steps": 600, "generator.updates": 1})
    assert once.cost is not None  # what the command line says, without a second probe
    settings = TINY | {"steps": 600}
    for flips in (0.2, 0.9):
        monkeypatch.setattr(recipe, "probe", lambda *_, flips=flips: Cost(1.0, 1.0, flips))
        config = plan(make_teacher(size=SIZE), new_student(), "bank", settings).config
        assert config.bank.horizontal_flip == (flips > 0.5)
        assert config.steps == 600


def test_operations_are_those_of_all_forwards_and_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = make_teacher(size=SIZE), new_student()
    costs = {id(teacher.module): 100, id(student): 10}
    monkeypatch.setattr("zskt.method.budget.forward_flops", lambda module, size: costs.get(id(module), 1))
    settings = TINY | {"steps": 30, "bank.rounds": 5, "bank.warmup": 5}
    config = plan(teacher, student, "bank", settings).config
    made, learnt = 5 * 8, (30 - 5 * 2) * 8
    alone, update = 2 * 100 + 3 * 1, 2 * 100 + 2 * 10 + 3 * 1  # without the student, as all warm-up is, and with it
    assert operations(teacher, student, config) == made * 2 * alone + made * 2 * 100 + learnt * 30
    later = replace(config, {"bank.warmup": 2, "steps": 24})
    found = operations(teacher, student, later)
    assert found == 2 * 8 * 2 * alone + 3 * 8 * 2 * update + made * 2 * 100 + learnt * 30
    no_adversary = {"kl": 0.0, "kl_scale": "per_class", "kl_where": "everywhere"}
    without = replace(later, {f"generator.loss.{name}": value for name, value in no_adversary.items()})
    never = operations(teacher, student, without)
    assert never == made * 2 * alone + made * 2 * 100 + learnt * 30
    assert operations(teacher, student, config, own=7) == operations(teacher, student, config) + 7 * 2 * 100
    asked = dataclasses.replace(config, bank=dataclasses.replace(config.bank, views=0))
    assert operations(teacher, student, asked) == made * 2 * alone + learnt * 100 + learnt * 30
    for name, teacher_forwards, draws in (("zskt", 1, 1), ("zskt-fresh", 10, 10)):
        config = plan(teacher, student, name, {"steps": 3, "batch_size": 8}).config
        each = update + 100 * teacher_forwards + draws * 1 + 10 * 30
        assert operations(teacher, student, config) == 3 * 8 * each
    dafl = plan(teacher, student, "dafl", {"steps": 3, "batch_size": 8}).config  # the student's outputs, no gradient
    ours = replace(dafl, {"generator.loss.kl": -1.0})
    assert (
        operations(teacher, student, ours) - operations(teacher, student, dafl) == 3 * 8 * dafl.generator.updates * 10
    )


def test_a_resumed_run_keeps_the_sizes_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "probe", lambda *_: Cost(round=0.5, step=0.02))
    teacher, out = make_teacher(size=SIZE), tmp_path / "run"
    first = zskt.distill(teacher, new_student(), "bank", budget="4s", settings=TINY, out=out, stop_after=20)
    assert first.config.budget == "4s"
    assert first.config.bank.rounds == 2
    assert not first.finished
    monkeypatch.setattr(recipe, "probe", lambda *_: Cost(round=9.0, step=9.0))  # not asked
    second = zskt.distill(teacher, new_student(), "bank", budget="4s", settings=TINY, out=out, resume=True)
    assert second.finished
    assert second.config == first.config
    with pytest.raises(UsageError, match="expected at least"):
        plan(teacher, new_student(), "bank", TINY | {"budget": "5s"}, begun=first.config)  # another budget is measured


def test_without_steps_or_budget_a_bank_stays_within_half_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = make_teacher(size=SIZE)
    monkeypatch.setattr(recipe, "probe", lambda *_: Cost(round=1.0, step=0.01))
    assert plan(teacher, new_student(), "bank").config.steps == load_recipe("bank").steps
    slow = Cost(round=10.0, step=0.1)
    monkeypatch.setattr(recipe, "probe", lambda *_: slow)
    config = plan(teacher, new_student(), "bank").config
    assert 1_600 < expected_seconds(config, slow) <= 1_800
    assert plan(teacher, new_student(), "fast").config.steps == load_recipe("fast").steps  # as published


def test_durations_are_readable() -> None:
    assert [duration(s) for s in (0.2, 45, 600, 7_200)] == ["1 s", "45 s", "10 min", "2.0 h"]

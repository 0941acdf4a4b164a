"""Recipes become objects: rates, terms, widths, pairs of stages; every recipe that comes with the package runs."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from small import FourStages, make_matching, make_teacher, refused
from zskt.errors import UsageError
from zskt.method.build import METHODS, arrange
from zskt.method.config import Config
from zskt.method.generator import WIDTHS, Generator
from zskt.method.losses import attention_map
from zskt.method.recipe import (
    BF16_COMPARED,
    OURS,
    choose,
    load_recipe,
    plan,
    recipe_texts,
    settle_precision,
    settle_sizes,
)
from zskt.method.replay import Fresh, ReplayBuffer, Same
from zskt.method.schedule import Schedule, learning_rate
from zskt.method.terms import generator_terms, student_terms
from zskt.method.updates import Beliefs
from zskt.networks import models
from zskt.networks.classifier import Classifier
from zskt.networks.observe import forward_flops
from zskt.runtime import pick_device
from zskt.settings import flat, replace

MLP = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
NO_BATCHNORM = models.lenet5(half=True, num_classes=10, input_size=(3, 16, 16))


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)


@pytest.mark.parametrize("clock", ["step", "update"])
def test_cosine_is_torchs(clock: Any) -> None:
    steps, updates = 8, 5
    rate = learning_rate(Schedule(clock=clock), 0.3, steps, updates)
    sgd = optimizer()
    each_update = clock == "update"
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps * updates if each_update else steps)
    for t in range(steps * updates):
        assert rate(t) == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-9)
        sgd.step()
        if each_update or t % updates == updates - 1:
            torchs.step()
    assert rate(0) == 0.3
    assert rate(steps * updates) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("clock", ["step", "update"])
@pytest.mark.parametrize(("milestones", "steps"), [((0.2, 0.4), 10), ((0.29, 0.57), 100)])
def test_multistep_is_torchs(clock: Any, milestones: tuple[float, ...], steps: int) -> None:
    updates = 3
    schedule = Schedule(kind="multistep", milestones=milestones, factor=0.5, clock=clock)
    sgd = optimizer()
    torchs = torch.optim.lr_scheduler.MultiStepLR(sgd, [round(steps * m) for m in milestones], 0.5)
    rate = learning_rate(schedule, 0.3, steps, updates)
    for step in range(steps):
        assert [rate(step * updates + u) for u in range(updates)] == pytest.approx([sgd.param_groups[0]["lr"]] * 3)
        sgd.step()
        torchs.step()


def test_multistep_begins_with_the_initial_rate_however_short_the_run() -> None:
    assert learning_rate(Schedule(kind="multistep", milestones=(0.2, 0.4)), 0.3, 2, 10)(0) == 0.3


def test_constant_stays() -> None:
    assert {learning_rate(Schedule(kind="constant"), 0.3, 5, 2)(t) for t in range(12)} == {0.3}


def test_auto_looks_at_the_teacher() -> None:
    config, reason = choose("auto", make_teacher())
    assert config == load_recipe("bank")
    assert "has BatchNorm" in reason
    config, reason = choose("auto", make_teacher(NO_BATCHNORM))
    assert config == load_recipe("bank-adversary")
    assert config.generator.loss.batchnorm == 0
    assert "without BatchNorm" in reason
    assert choose("zskt", make_teacher())[0] == Config()


@pytest.mark.parametrize("name", OURS)
def test_a_bank_of_no_published_length_has_rounds_for_its_steps(name: str) -> None:
    teacher, student, whole = make_teacher(), models.wide_resnet(10, 1), load_recipe(name)
    for share in (0.5, 0.1, 0.01):
        steps = round(share * whole.steps)
        bank = plan(teacher, student, name, {"steps": steps, "bank.horizontal_flip": False}).config.bank
        assert bank.rounds == pytest.approx(share * whole.bank.rounds, abs=1)
        assert bank.warmup == pytest.approx(share * whole.bank.warmup, abs=1)
    given = {"steps": whole.steps // 10, "bank.rounds": 9, "bank.warmup": 3, "bank.horizontal_flip": False}
    bank = plan(teacher, student, name, given).config.bank
    assert (bank.rounds, bank.warmup) == (9, 3)
    config = plan(teacher, student, name, {"steps": 2, "bank.horizontal_flip": False}).config  # a trial
    assert (config.bank.rounds, config.bank.warmup, config.generator.updates) == (2, 1, 1)
    with pytest.raises(UsageError, match="steps = 1: expected more than the 1 of the warm-up"):
        plan(teacher, student, name, {"steps": 1})


@pytest.mark.parametrize("name", OURS)
def test_batches_shrink_with_the_pixels_of_large_images_unless_given(name: str) -> None:
    whole, given = load_recipe(name), {"steps": 400, "bank.horizontal_flip": False, "generator.width": 16}
    for side, share in ((64, 1), (128, 1 / 4), (256, 1 / 16)):
        teacher = make_teacher(FourStages(2), size=(3, side, side))
        config = plan(teacher, FourStages(2), name, given).config
        assert (config.batch_size, config.bank.batch_size) == (whole.batch_size * share, whole.bank.batch_size * share)
    assert plan(teacher, FourStages(2), config, given).config == config  # settled once
    config = plan(teacher, FourStages(2), name, given | {"batch_size": 50}).config
    assert (config.batch_size, config.bank.batch_size) == (50, whole.bank.batch_size / 16)


def test_a_width_left_open_is_settled_by_cost() -> None:
    teacher, student = make_teacher(), models.wide_resnet(10, 1)
    config = settle_sizes(load_recipe("zskt-prior"), teacher, student)
    budget = forward_flops(teacher.module, (3, 16, 16)) + forward_flops(student, (3, 16, 16))
    costs = {width: forward_flops(Generator(100, (3, 16, 16), width), (100,)) for width in WIDTHS}
    assert config.generator.width == max(width for width in WIDTHS if costs[width] <= budget)
    assert min(WIDTHS) < config.generator.width < max(WIDTHS)  # so that the budget decided
    assert replace(config, {"generator.width": "auto"}) == load_recipe("zskt-prior")
    assert settle_sizes(load_recipe("zskt"), teacher, student).generator.width == 128


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean zskt-fresh"):
        load_recipe("zskt-frehs")
    with pytest.raises(UsageError, match="auto, bank, bank-adversary, cmi"):
        choose("x", make_teacher())
    with pytest.raises(UsageError, match="expected auto, cpu, cuda"):
        pick_device("gpu")
    assert pick_device("cpu").type == "cpu"


@pytest.mark.parametrize(
    ("recipe", "teacher", "student", "words"),
    [
        ("zskt", make_teacher(), MLP, "and none in the student"),
        (
            "zskt",
            make_teacher(MLP),
            FourStages(4),
            "none in the teacher and 16 x 16, 8 x 8.*student.loss.attention=0",
        ),
        ("zskt-prior", make_teacher(NO_BATCHNORM), FourStages(4), r"no BatchNorm.*bank-adversary"),
        ("zskt", make_teacher(), FourStages(4, num_classes=7), "10 classes, found 7"),
        ("zskt-prior", make_teacher(), models.wide_resnet(10, 1, channels=1), "rejects the teacher's images"),
    ],
    ids=["no student stages", "no teacher stages", "no BatchNorm", "classes", "channels"],
)
def test_what_does_not_fit_together_is_refused(
    recipe: str, teacher: Classifier, student: nn.Module, words: str
) -> None:
    assert re.search(words, refused(lambda: make_matching(recipe, teacher, student)))


@pytest.mark.parametrize("name", ["recipe", "method", "format"])
def test_a_run_is_not_renamed_by_its_settings(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is not among the settings"):
        load_recipe("zskt", {name: "zskt"})
    with pytest.raises(UsageError, match=f"{name} is not among the settings"):
        plan(make_teacher(), models.wide_resnet(10, 1), "zskt", {name: "belief_matching"})


def test_every_weight_brings_its_term_and_nothing_else_does() -> None:
    none = {"generator.loss.kl": 0.0, "student.loss.kl": 0.0, "student.loss.attention": 0.0}
    for name in flat(Config()):
        side, _, term = name.partition(".loss.")
        if term and term not in ("kl_scale", "kl_where", "temperature", "stages"):
            rest = {"student.loss.kl": 1.0} if side == "generator" else {"generator.loss.kl": -1.0}  # some is needed
            adversarial = side == "generator" and term in ("kl", "l1", "jensen_shannon")
            config = replace(Config(), none | rest | {name: -2.0 if adversarial else 2.0})
            both = {"generator": generator_terms(config.generator.loss), "student": student_terms(config.student.loss)}
            assert list(both[side]) == [term]


def test_every_number_arrives() -> None:
    changes = {
        "student.loss.stages": "block1=block2, block3=block3",
        "batch_size": 6,
        "generator.latent": 17,
        "generator.updates": 2,
        "generator.learning_rate": 0.11,
        "generator.clip": 1.5,
        "generator.beta1": 0.6,
        "student.updates": 3,
        "student.optimizer": "sgd",
        "student.learning_rate": 0.22,
        "student.momentum": 0.33,
        "student.nesterov": True,
        "student.weight_decay": 0.44,
        "student.clip": 0,
        "replay.kind": "buffer",
        "replay.capacity": 5,
    }
    matching, _ = make_matching("zskt", make_teacher(), models.wide_resnet(10, 1), changes)
    generator, student = matching.generator_updates, matching.student_updates
    assert (matching.batch_size, matching.latent) == (6, 17)
    assert matching.sample_latent().z.shape == (6, 17)
    assert generator.rate is not None
    assert student.rate is not None
    assert (generator.count, generator.clip, generator.rate(0)) == (2, 1.5, 0.11)
    assert (student.count, student.clip, student.rate(0)) == (3, None, 0.22)
    assert isinstance(generator.optimizer, torch.optim.Adam)
    assert generator.optimizer.defaults["betas"] == (0.6, 0.999)
    assert isinstance(student.optimizer, torch.optim.SGD)
    assert (student.optimizer.defaults["momentum"], student.optimizer.defaults["weight_decay"]) == (0.33, 0.44)
    assert student.optimizer.defaults["nesterov"]
    assert isinstance(matching.replay, ReplayBuffer)
    assert matching.replay.capacity == 5
    assert (matching.ask_teacher._names, matching.ask_student._names) == (("block1", "block3"), ("block2", "block3"))
    for kind, replay in (("same", Same), ("fresh", Fresh)):
        matching, _ = make_matching("zskt", make_teacher(), models.wide_resnet(10, 1), {"replay.kind": kind})
        assert type(matching.replay) is replay


def test_the_activation_prior_looks_at_the_last_stage_whatever_attention_compares() -> None:
    teacher, student = make_teacher(), models.wide_resnet(10, 1)
    changes = {"generator.loss.activation": 1.0, "student.loss.stages": "block3=block3,block1=block1"}
    matching, config = make_matching("zskt", teacher, student, changes)
    x = torch.randn(4, 3, 16, 16)
    beliefs = Beliefs(x, None, matching.ask_teacher(x), matching.ask_student(x))
    last = x
    for name in ("conv1", "block1", "block2", "block3"):
        last = teacher.module.get_submodule(name)(last)
    torch.testing.assert_close(generator_terms(config.generator.loss)["activation"](beliefs), -last.abs().mean())
    pairs = [(beliefs.student.stages[i], beliefs.teacher.stages[i]) for i in range(2)]
    expected = sum((attention_map(a) - attention_map(b)).square().mean() for a, b in pairs)
    torch.testing.assert_close(student_terms(config.student.loss)["attention"](beliefs), 250 * expected)


def test_stages_without_attention_are_refused() -> None:
    with pytest.raises(UsageError, match=r"student\.loss\.stages has no effect without student\.loss\.attention"):
        replace(Config(), {"student.loss.attention": 0.0, "student.loss.stages": "a=b"})
    with pytest.raises(UsageError, match="expected a list of words"):
        replace(Config(), {"student.loss.stages": [1]})


SHAPES = [((1, 8, 8), 10), ((3, 12, 20), 10), ((3, 8, 8), 37)]  # (C, H, W) and classes


@pytest.mark.parametrize(("size", "classes"), SHAPES, ids=str)
def test_every_recipe_runs(size: tuple[int, int, int], classes: int) -> None:
    ran = 0
    for name in recipe_texts():
        torch.manual_seed(0)
        teacher = make_teacher(models.convnet(8, num_classes=classes, channels=size[0]), size=size)
        student = models.convnet(4, num_classes=classes, channels=size[0])
        short = {"bank.rounds": 2, "bank.warmup": 1, "bank.batch_size": 4, "generator.updates": 1}
        short["bank.horizontal_flip"] = False
        bank = load_recipe(name).method == "bank"
        config = replace(load_recipe(name), {"steps": 2, "batch_size": 4} | (short if bank else {}))  # else as shipped
        config = settle_sizes(config, teacher, student)
        arrange(teacher, config)
        arrange(student, config)
        method = METHODS[config.method](teacher, student, config)
        for _ in range(2):
            losses = method.step()
        method.close()
        assert all(value.isfinite().all() for value in losses.values())
        ran += 1
    assert ran == len(recipe_texts()) >= 4


@pytest.mark.parametrize(
    ("recipe", "capable", "dtype", "expected"),
    [
        ("zskt-prior", True, torch.float32, "bf16"),
        ("zskt-prior", False, torch.float32, "fp32"),
        ("zskt-prior", True, torch.float64, "fp32"),
        ("zskt-mmrazor", True, torch.float32, "fp32"),  # never compared
    ],
)
def test_auto_precision_is_bf16_only_where_that_was_compared(
    recipe: str, capable: bool, dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: capable)
    config = replace(load_recipe(recipe), {"machine.precision": "auto", "machine.device": "cpu"})
    assert settle_precision(config, make_teacher().to(dtype)).machine.precision == expected


def test_each_recipe_that_auto_runs_in_bf16_has_its_comparison() -> None:
    folder = Path(__file__).parent.parent / "benchmarks" / "results"
    found = json.loads(sorted(folder.glob("*-precision.json"))[-1].read_text())
    for recipe in BF16_COMPARED:
        fp32, bf16 = (found[recipe]["accuracy"][precision] for precision in ("fp32", "bf16"))
        assert len(fp32) == len(bf16) >= 3
        assert statistics.fmean(fp32) - statistics.fmean(bf16) <= statistics.stdev(fp32)

"""The roofline: its counts against formulas, its clock against a phase of known duration."""

import json
import time
from typing import Any

import pytest
import torch
from torch import nn

from small import call, make_matching, make_teacher
from zskt.bench import roofline
from zskt.bench import step_time as bench
from zskt.method.matching import BeliefMatching
from zskt.method.updates import Batch
from zskt.networks import models
from zskt.networks.observe import forward_flops

CPU = torch.device("cpu")


def tiny(recipe: str = "zskt", **changes: Any) -> BeliefMatching:
    return make_matching(recipe, make_teacher(), models.wide_resnet(10, 1), changes)[0]


def test_operations_match_a_formula() -> None:
    matching = tiny()
    works = roofline.count(matching)
    teacher, student = matching.ask_teacher.module, matching.student
    t, s = (forward_flops(module, (3, 16, 16)) for module in (teacher, student))
    g = forward_flops(matching.generator, (12,))
    assert works["draw"].operations == 8 * g
    assert works["ask"].operations == 8 * t
    stem = 2 * student.get_parameter("conv1.weight").numel() * 16 * 16  # no gradient with respect to images
    assert works["student_step"].operations == 8 * 10 * (3 * s - stem)
    assert set(works) == set(roofline.PHASES)


def test_bytes_are_those_of_operands_and_results() -> None:
    layer = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    counter = roofline.Counter()
    with counter:
        y = layer(torch.zeros(2, 3, 5, 5))
    work = counter.phases["other"]
    forward = 4 * (2 * 3 * 25 + 8 * 3 * 9 + 2 * 8 * 25)
    assert work.bytes == forward
    assert work.operations == 2 * 9 * 3 * 8 * 2 * 25
    with counter:
        torch.autograd.backward(y.sum())
    # reads the gradient of the result and both operands; writes the gradient of the weights, but not of the input
    assert work.bytes == forward + 4 * (2 * 8 * 25 + 2 * 3 * 25 + 2 * 8 * 3 * 9)


def test_a_fused_optimiser_reads_and_writes_its_state() -> None:
    weight = nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.Adam([weight], fused=True)
    weight.grad = torch.ones(1000)
    counter = roofline.Counter()
    with counter:
        optimizer.step()
    steps = 2 * 4  # bytes of the optimiser's step counter, read and written
    assert counter.phases["other"].bytes == 4 * 7 * 1000 + steps


def test_the_least_time_is_the_larger_bound_of_each_product() -> None:
    work = roofline.Work(products={(100, 1): 2, (1, 50): 3})
    assert work.at_best(rate=10, bandwidth=5) == 2 * 10 + 3 * 10


def test_the_clock_times_each_phase_and_unwraps_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    matching = tiny("zskt-fresh", **{"student.updates": 3})
    inner = BeliefMatching.ask

    def slow(self: BeliefMatching, batch: Batch) -> Batch:
        time.sleep(0.02)
        return inner(self, batch)

    monkeypatch.setattr(BeliefMatching, "ask", slow)
    seconds = roofline.clock(matching, CPU, steps=2)
    assert seconds["ask"] >= 3 * 0.02
    assert sum(seconds[name] for name in roofline.PHASES) <= seconds["step"]
    assert not set(roofline.PHASES) & set(vars(matching))


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roofline.MATRIX, "cpu", 64)
    monkeypatch.setattr(roofline, "COPIED", 2**16)
    monkeypatch.setitem(bench.PAIRS, "digits", bench.Pair("convnet-4", "convnet-2", (1, 8, 8), batch_size=4))


@pytest.mark.usefixtures("small_machine")
def test_the_command() -> None:
    status, out, err = call("bench", "--pair", "digits", "--rounds", 1, "--explain")
    assert status == 0
    result = json.loads(out)
    for arm in ("fp32", "bf16"):
        phases = result[arm]["phases"]
        assert set(phases) == {*roofline.PHASES, "step"}
        for row in phases.values():
            assert row["seconds_at_best"] > 0
            assert row["fraction"] == pytest.approx(row["seconds_at_best"] / row["seconds"])
        parts = [row for name, row in phases.items() if name != "step"]
        assert phases["step"]["operations"] == sum(row["operations"] for row in parts)
    assert result["bf16"]["phases"]["step"]["bytes"] < result["fp32"]["phases"]["step"]["bytes"]
    assert "teacher forward" in err

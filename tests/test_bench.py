"""The cost of a step in operations instead of seconds, so that these tests cannot be flaky."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import zskt
from small import call, fails, make_matching, make_teacher, run
from zskt.bench import step_time as bench
from zskt.networks import models
from zskt.networks.observe import forward_flops


@pytest.mark.parametrize("name", ["wrn", "lenet", "digits"])
def test_the_references_operations_match_a_formula(name: str) -> None:
    assert bench.check_operations(bench.PAIRS[name]) > 0


def test_a_handicapped_reference_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zskt.bench.reference.STUDENT_UPDATES", 11)
    with pytest.raises(zskt.ZsktError, match="operations per image in a reference step"):
        bench.check_operations(bench.PAIRS["digits"])


def test_the_engine_computes_no_unused_gradient() -> None:
    """Per image, with t, s, g the forward operations, against 4 t + 33 s + 33 g of the reference."""
    teacher, student = make_teacher(), models.wide_resnet(10, 1)
    matching, config = make_matching("zskt", teacher, student)
    size = teacher.input_size
    t, s = forward_flops(teacher.module, size), forward_flops(student, size)
    g = forward_flops(matching.generator, (config.generator.latent,))
    linear = 2 * matching.generator.get_parameter("linear.weight").numel()  # no gradient with respect to the latent,
    stem = 2 * student.conv1.weight.numel() * size[1] * size[2]  # nor to the images in the student's updates
    generator_update = 2 * t + 2 * s + 3 * g - linear  # no gradients of the networks' weights
    expected = generator_update + (g + t) + 10 * (3 * s - stem)
    with FlopCounterMode(display=False) as counter:
        matching.step()
    assert counter.get_total_flops() == expected * config.batch_size


def test_timings_are_interleaved_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(bench, "start", lambda pair, arm, device: lambda: order.append(arm))
    seconds = bench.time_pair(bench.PAIRS["digits"], torch.device("cpu"), rounds=3)
    assert order == ["reference", "fp32", "bf16"] * 4
    assert {arm: len(values) for arm, values in seconds.items()} == {"reference": 3, "fp32": 3, "bf16": 3}


def test_the_command_prints_its_documented_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench.PAIRS, "digits", bench.Pair("convnet-4", "convnet-2", (1, 8, 8), batch_size=4))
    monkeypatch.setattr(bench, "peak_memory", lambda *pair: 1.0)  # measured below
    result = run("bench", "--pair", "digits", "--rounds", 1)
    keys = {"speedup_fp32", "speedup_bf16", "seconds_reference", "seconds_fp32", "seconds_bf16"}
    assert keys | {"peak_mib_reference", "peak_mib_fp32"} <= set(result)
    assert all(result[key] > 0 for key in keys)


def test_without_peak_memory_the_timings_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS and Windows."""
    monkeypatch.setattr("zskt.bench.step_time.STATUS", tmp_path / "status")
    monkeypatch.setitem(bench.PAIRS, "digits", bench.Pair("convnet-4", "convnet-2", (1, 8, 8), batch_size=4))
    status, out, err = call("bench", "--pair", "digits", "--rounds", 1)
    assert status == 0
    assert json.loads(out)["seconds_fp32"] > 0
    assert re.search(r"peak MiB\W+-\W+-\W+-", err)
    assert re.search(r"speedup\W+1\b", err)


def test_peak_memory_excludes_the_calling_process() -> None:
    held = torch.ones(2**28)  # 1 GiB
    found = {arm: bench.peak_memory("digits", arm, "cpu") for arm in bench.ARMS}
    del held
    assert all(1 < mib < 500 for mib in found.values())
    assert found["fp32"] <= found["reference"]


def test_unknown_pairs_are_refused() -> None:
    assert "did you mean wrn" in fails(2, "bench", "--pair", "wrm")

"""The examples run as they stand, and a method of one's own has all that a run has."""

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import zskt
from small import fails, make_teacher, run
from zskt.method.config import Config
from zskt.networks import models
from zskt.networks.observe import ChannelStatistics, Observation

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python examples/own_method.py FOLDER` leaves."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["own_method.py", str(folder)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(EXAMPLES / "own_method.py"), run_name="__main__")
    assert end.value.code == 0
    return folder


def test_examples_are_short() -> None:
    assert len((EXAMPLES / "own_method.py").read_text().splitlines()) <= 100
    assert len((EXAMPLES / "own_loss.py").read_text().splitlines()) <= 40


def test_a_method_of_ones_own_learns_and_leaves_a_whole_run(digits: Path) -> None:
    student = json.loads((digits / "run" / "student.json").read_text())
    assert student["method"] == "own_method.py:ImageBank"
    assert student["measured"]["accuracy"] > 0.9
    written = {path.name for path in (digits / "run").iterdir()}
    assert {"report.html", "samples", "config.toml", "metrics.jsonl", "student.safetensors"} <= written
    assert (digits / "samples.png").exists()
    assert (digits / "student.onnx").exists()
    assert (digits / "run" / "report.html").read_text().count("<img") >= 3


def test_stopped_half_way_it_ends_bit_for_bit_as_if_it_had_not_been(digits: Path, tmp_path: Path) -> None:
    """The example was stopped after half of its steps and resumed."""
    own = ["--method", f"{EXAMPLES / 'own_method.py'}:ImageBank", "--trust", "--steps", "80", "--eval", "digits"]
    run("distill", digits / "teacher", "--student", "convnet-8", *own, "--out", tmp_path / "run")
    for name in ("student", "generator", "method"):
        whole, parts = (load_file(folder / "run" / f"{name}.safetensors") for folder in (tmp_path, digits))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(tensor, parts[key]) for key, tensor in whole.items())
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (digits / "run" / "metrics.jsonl").read_text()


def test_what_an_own_method_needs_is_said(digits: Path, tmp_path: Path) -> None:
    head = ["distill", digits / "teacher", "--student", "convnet-8", "--out", tmp_path / "run"]
    head += ["--method", f"{EXAMPLES / 'own_method.py'}:ImageBank"]
    assert "runs that code: add --trust" in fails(2, *head, "--steps", 5)
    assert "has no default number of steps: give steps" in fails(2, *head, "--trust")
    assert "give a recipe or a method, not both" in fails(2, *head, "--trust", "--recipe", "zskt", "--steps", 5)
    for command, out in (("sample", tmp_path / "s.png"), ("export", tmp_path / "s.onnx")):
        line = fails(1, command, digits / "run", "--out", out)
        assert "give --teacher, --method FILE:FUNCTION and --trust" in line
    assert list(tmp_path.iterdir()) == []


def test_the_example_works_on_its_networks_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On "meta", which every machine has: only the optimisers would ask it for values."""
    monkeypatch.setattr(zskt.Updates, "_step", lambda updates: None)
    bank = example("own_method").ImageBank(make_teacher().to("meta"), models.wide_resnet(10, 1).to("meta"), Config())
    for _ in range(2):
        bank.step()
        bank.load_state_dict({"images": torch.ones(9, 3, 16, 16), "done": torch.tensor(1)})  # read to the CPU
    assert bank.sample(4, 0).device.type == "meta"


def test_another_loss_is_one_function() -> None:
    own = example("own_loss")
    teacher, student = make_teacher(), models.wide_resnet(10, 1)
    config = zskt.load_recipe("zskt-prior", {"steps": 2, "batch_size": 8, "generator.width": 8, "log_every": 1})
    lines: list[Any] = []
    zskt.distill(teacher, student, config, method=own.make, callbacks=[lambda event: lines.append(event.line)])
    assert set(lines[0]["generator_terms"]) == {"kl", "batchnorm", "one_hot"}
    statistics = ChannelStatistics(*torch.rand(4, 3).double())
    mean, variance, running_mean, running_variance = statistics
    seen, unseen = Observation(torch.empty(0), statistics=[statistics]), Observation(torch.empty(0))
    beliefs = zskt.Beliefs(torch.empty(0), None, teacher=seen, student=unseen)
    expected = 10 * (((mean - running_mean) ** 2).sum() + ((variance - running_variance) ** 2).sum()) / 3
    assert float(own.mean_square_prior(beliefs)) == pytest.approx(float(expected))

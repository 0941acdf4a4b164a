"""What `zskt inspect` and `zskt distill` say of a pair that runs and is probably not what was meant."""

from pathlib import Path
from typing import Any

import pytest
import torch

from small import call, fails, make_teacher, run
from zskt.networks import models
from zskt.networks.folder import save_teacher

SIZE = (1, 8, 8)
HOW: list[Any] = ["--input-size", *SIZE, "--mean", 0.5, "--std", 0.25]
TINY: list[Any] = ["--batch-size", 4, "--generator.width", 4, "--generator.latent", 4, "--student.updates", 2]
TINY += ["--recipe", "zskt-prior", "--steps", 2]
FACTORIES = """
import torch, zskt
from torch import nn

def make():
    torch.manual_seed(0)
    return zskt.models.convnet(2, num_classes=3, channels=1)

class Sigmoid(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = make()
    def forward(self, x):
        return self.network(x).sigmoid()

class Detector(Sigmoid):
    def forward(self, x):
        return {"boxes": x, "cls_score": self.network(x)}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FACTORIES)
    torch.manual_seed(0)
    trained = make_teacher(models.convnet(2, num_classes=3, channels=1), size=SIZE)
    save_teacher(tmp_path / "teacher", trained)
    torch.save(trained.module.state_dict(), "trained.pth")


def lines(word: str, *arguments: object) -> list[str]:
    status, _, err = call(*arguments)
    assert status == 0, err
    return [line for line in err.splitlines() if word in line and not line.startswith("│")]


def commands(network: str, student: str = "convnet-1") -> list[list[Any]]:
    how = [] if network == "teacher" else HOW
    return [
        ["inspect", network, *how, "--student", student],
        ["distill", network, *how, "--student", student, *TINY, "--out", f"out-{network[-5:]}"],
    ]


@pytest.mark.parametrize("number", [0, 1], ids=["inspect", "distill"])
def test_both_commands_say_it(number: int) -> None:
    (line,) = lines("untrained", *commands("mine.py:make")[number])
    assert "running mean 0 and variance 1 in all of its 2 BatchNorm layers: give its weights, or check them" in line
    (line,) = lines("sigmoid", *commands("mine.py:Sigmoid")[number])
    assert "taken as logits" in line
    (line,) = lines("more than the teacher's", *commands("teacher", "convnet-4")[number])
    assert "the student has 735 parameters, more than the teacher's 297; for a smaller one give, say," in line
    line = fails(1, *commands("mine.py:Detector")[number])
    assert "found dict without logits, with boxes, cls_score" in line
    assert "returns its output['cls_score']" in line


def test_nothing_is_said_where_nothing_is_wrong() -> None:
    for command in commands("teacher"):
        status, _, err = call(*command)
        assert status == 0
        assert not any(word in err for word in ("untrained", "sigmoid", "more than the teacher's"))
    weights = ["--teacher-weights", "trained.pth"]
    assert not lines("untrained", "inspect", "mine.py:make", *HOW, *weights)
    found = run("inspect", "mine.py:make", *HOW)
    assert any("looks untrained" in note for note in found["notes"])  # in the JSON, too

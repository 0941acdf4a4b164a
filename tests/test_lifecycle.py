"""What is repeated is logged, stopped, kept and resumed, whatever it is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zskt
from zskt.run import checkpoint, lifecycle
from zskt.run.lifecycle import Intervals, Lifecycle, describe


class Walk:
    """The least that can be repeated: a weight that goes a random way, and a count of its own."""

    steps = 10

    def __init__(self) -> None:
        self.module = nn.Linear(1, 1)
        nn.init.zeros_(self.module.weight)
        self.optimiser = torch.optim.Adam(self.module.parameters(), lr=0.1)
        self.count = 0
        self.bad_from = 99

    def step(self) -> Mapping[str, Tensor]:
        loss = (self.module.weight - torch.rand(())).square().sum()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.count += 1
        return {"walk": loss.detach() * (float("nan") if self.count >= self.bad_from else 1)}

    def modules(self) -> Mapping[str, nn.Module]:
        return {"walk": self.module}

    def optimisers(self) -> Mapping[str, torch.optim.Optimizer]:
        return {"walk": self.optimiser}

    def state_dict(self) -> Mapping[str, Tensor]:
        return {"count": torch.tensor(self.count)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = int(state["count"])

    def close(self) -> None: ...


def life(folder: Path | None, **options: Any) -> Lifecycle:
    torch.manual_seed(0)
    if folder is not None:
        folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {"intervals": Intervals(log=1, evaluate=4, checkpoint=3), "identity": {"what": "walk"}}
    return Lifecycle(Walk(), folder, **settings | options)


def outcome(folder: Path) -> tuple[bytes, bytes]:
    (newest,) = sorted((folder / "checkpoint").iterdir())[-1:]
    return newest.read_bytes(), (folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("stops", [["1"], ["3"], ["4", "4"], ["0.0001s", "5"]])
def test_whatever_is_repeated_resumes_bit_for_bit(
    stops: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lifecycle, "seconds", 0.0)  # of the clock, which a checkpoint remembers
    life(tmp_path / "whole").run([])
    for i, stop in enumerate([*stops, None]):
        part = life(tmp_path / "parts")
        if i:
            part.restore()
        part.run([], stop)
    assert part.finished
    assert isinstance(part.repeated, Walk)
    assert part.repeated.count == 10
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "parts")


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path: Path) -> None:
    killed = life(tmp_path / "run")
    killed.step = 1
    killed.log({"walk": torch.tensor(1.0)})
    again = life(tmp_path / "run")
    again.restore()
    again.run([])
    lines = checkpoint.read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 11))


def test_another_identity_is_refused_and_another_machine_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life(tmp_path / "run", identity={"what": "walk", "teacher": "a", "settings": {"x": 1}}).run([], 2)
    other = life(tmp_path / "run", identity={"what": "walk", "teacher": "b", "settings": {"x": 2}})
    with pytest.raises(zskt.ZsktError, match=r"differs in teacher a, now b; settings: resume it with the same"):
        other.restore()
    monkeypatch.setattr(lifecycle, "cpu_name", lambda: "another processor")
    same = life(tmp_path / "run", identity={"what": "walk", "teacher": "a", "settings": {"x": 1}})
    same.restore()
    assert same.step == 2
    (line,) = same.warnings
    assert "processor another processor instead of" in line
    assert "not bit for bit" in line


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    life(tmp_path / "run").run([], 2)
    tensors, metadata = checkpoint.load(tmp_path / "run" / "checkpoint")
    checkpoint.save(tmp_path / "run" / "checkpoint", 2, tensors, metadata | {"format": 1})
    with pytest.raises(zskt.ZsktError, match="expected a checkpoint of format 2"):
        life(tmp_path / "run").restore()


def test_losses_that_are_not_finite_end_a_run_at_its_next_line(tmp_path: Path) -> None:
    run = life(tmp_path / "run", intervals=Intervals(log=4, evaluate=100, checkpoint=2))
    assert isinstance(run.repeated, Walk)
    run.repeated.bad_from = 6
    with pytest.raises(zskt.ZsktError, match=r"loss of the walk is nan at step 8: .*lower walk\.learning_rate"):
        run.run([])


@pytest.mark.parametrize("folder", [True, False])
def test_weights_that_are_not_finite_are_neither_kept_nor_returned(folder: bool, tmp_path: Path) -> None:
    """Even where no loss showed it: the last update comes after the last loss."""
    run = life(tmp_path / "run" if folder else None, intervals=Intervals(log=100, evaluate=100, checkpoint=100))

    def break_it(event: lifecycle.Event) -> None:
        assert isinstance(run.repeated, Walk)
        if event.step == 10:
            nn.init.constant_(run.repeated.module.weight, float("inf"))

    with pytest.raises(zskt.ZsktError, match=r"walk/weight contains NaN or infinity at step 10"):
        run.run([break_it])
    assert not checkpoint.exists(tmp_path / "run" / "checkpoint")


def test_losses_become_lines() -> None:
    losses = {"student": torch.tensor([1.0, 2.0]), "student.kl": torch.tensor(2.0), "teacher": torch.tensor(3.0)}
    assert describe(losses) == {"student_loss": [1.0, 2.0], "student_terms": {"kl": 2.0}, "teacher_loss": 3.0}

"""What a command says while it works: lines in a file, nothing when silence is asked for, a note on a busy machine."""

import os
import re
from pathlib import Path

import pytest
import torch

import zskt
from small import call, make_teacher, run
from zskt.cli import progress
from zskt.cli.main import main
from zskt.cli.runs import LONG_WORK
from zskt.method.budget import disk
from zskt.method.recipe import plan


class Clock:
    """Time that passes when the test says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("zskt.cli.progress.time", clock)
    return clock


def test_into_a_file_there_is_a_line_every_half_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("distilling", "steps") as show:
        for step in range(1, 101):
            clock.now = step - 1
            show(step, 100, "loss 0.5", ["warning at step 7: collapse"] if step == 7 else [])
        show(100, 100)
    assert capsys.readouterr().err.splitlines() == [
        "warning at step 7: collapse",
        "distilling: 31 of 100 steps, 69 s left  loss 0.5",
        "distilling: 61 of 100 steps, 39 s left  loss 0.5",
        "distilling: 91 of 100 steps, 9 s left  loss 0.5",
        "distilling: 100 of 100 steps, in 2 min  loss 0.5",
    ]


def test_the_time_left_counts_from_where_a_run_is_continued(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("distilling", "steps") as show:
        show(900, 1_000)
        clock.now = 40
        show(920, 1_000)
    assert capsys.readouterr().err == "distilling: 920 of 1,000 steps, 3 min left\n"


def test_work_of_a_few_seconds_is_not_mentioned(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("reading", "images") as show:
        show(1, 2)
        clock.now = 4
        show(2, 2)
    assert capsys.readouterr().err == ""


def test_quiet_leaves_warnings_errors_and_the_result(tmp_path: Path) -> None:
    assert "one_hot" in call("recipes", "zskt")[2]
    for command in (["--quiet", "recipes", "zskt"], ["recipes", "zskt", "--quiet"]):
        status, out, err = call(*command)
        assert (status, err) == (0, "")
        assert out.startswith('{"')
    assert "one_hot" in call("recipes", "zskt")[2]  # the next command is not silent
    status, out, err = call("recipes", "none", "--quiet")
    assert (status, out) == (2, "")
    assert err.startswith("zskt: unknown recipe")
    zskt.save_teacher(tmp_path / "teacher", make_teacher())
    tiny = ["--steps", 2, "--batch-size", 8, "--generator.width", 8, "--recipe", "zskt"]
    distil = ["distill", tmp_path / "teacher", "--student", "wrn-10-1", "--out", tmp_path / "run", *tiny]
    assert not run(*distil, "--stop-after", "1")["finished"]
    status, _, err = call(*distil, "--resume", "--threads", "2", "--quiet")
    assert status == 0
    assert "not bit for bit" in err
    assert [line for line in err.splitlines() if not line.startswith("warning")] == []


def test_a_shell_can_complete_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--tyro-print-completion", "bash"])
    assert not end.value.code
    script = capsys.readouterr().out
    for word in ("distill", "--student", "--least-agreement"):
        assert word in script


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == (0, f"zskt {zskt.__version__}\n", "")


def test_a_busy_machine_on_which_one_thread_is_faster_is_noted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    slow = 3.0  # times as long with four threads

    def work() -> None:
        clock.now += slow if torch.get_num_threads() == 4 else 1.0

    def noted(load: float = 3.0, count: int | str = 4) -> str:
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0), raising=False)
        progress.say_if_busy(count, work)
        assert torch.get_num_threads() == 1
        return capsys.readouterr().err

    assert "busy (load 3.0 on 4 cores), and one thread is 3.0 times as fast as 4 now: --threads 1" in noted()
    assert noted(load=1.0) == noted(count=1) == noted(count="auto") == ""  # "auto": the tests have one thread
    slow = 0.5
    assert noted() == ""
    slow = 3.0
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert noted() == ""
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.delattr(os, "getloadavg")  # as on Windows
    progress.say_if_busy(4, work)
    assert capsys.readouterr().err == ""


def test_long_work_is_timed_before_it_starts_and_its_disk_space_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zskt.save_teacher(tmp_path / "teacher", make_teacher())
    tiny = ["--steps", 2, "--batch-size", 8, "--generator.width", 8, "--recipe", "zskt"]
    distil = ["distill", tmp_path / "teacher", "--student", "wrn-10-1", *tiny, "--out"]
    err = call(*distil, tmp_path / "short")[2]
    assert "this takes " in err
    assert re.search(r"this takes \S+ PFLOP and about 4 MB in ", err)
    monkeypatch.setattr("zskt.cli.runs.LONG_WORK", 1)
    assert LONG_WORK > 1e12
    assert re.search(r"this takes about \d+ s, ", call(*distil, tmp_path / "long")[2])


def test_disk_space_is_about_what_a_run_leaves(tmp_path: Path) -> None:
    """In weights, checkpoints and bank."""
    teacher = make_teacher()
    tiny = {"batch_size": 8, "generator.width": 8, "bank.rounds": 2, "bank.warmup": 1, "steps": 14}
    for recipe in ("zskt", "bank"):
        changes = tiny if recipe == "bank" else {"batch_size": 8, "generator.width": 8, "steps": 4}
        student = zskt.models.wide_resnet(10, 1)
        with torch.random.fork_rng():
            planned = plan(teacher, student, recipe, {**changes, "checkpoint_every": 1})
            zskt.distill(teacher, student, planned, out=tmp_path / recipe, stop_after=3)
        found = sum(path.stat().st_size for path in (tmp_path / recipe).rglob("*.safetensors"))
        assert 0.5 < found / disk(teacher, student, planned.config) < 1.2


def test_a_cpu_that_emulates_bf16_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def said(precision: str, device: str, able: bool, machine: str = "x86_64") -> str:
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able)
        monkeypatch.setattr("platform.machine", lambda: machine)
        progress.say_if_emulated(precision, device)
        return capsys.readouterr().err

    assert "emulates it" in said("bf16", "cpu", False)
    assert said("bf16", "cpu", True) == said("fp32", "cpu", False) == said("bf16", "cpu", False, "arm64") == ""

"""A run is continued by its folder alone, and a folder of a stranger runs nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from small import call, edit, fails, make_teacher, run, write_images
from small import coloured as images_of
from zskt.cli.again import FILE
from zskt.files import sealed
from zskt.networks import models
from zskt.networks.folder import save_teacher

SIZE = (1, 8, 8)
TINY = ["--batch-size", 4, "--generator.width", 4, "--generator.latent", 4, "--student.updates", 2]
TINY += ["--recipe", "zskt-prior", "--steps", 4]


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    save_teacher(tmp_path / "teacher", make_teacher(models.convnet(2, num_classes=3, channels=1), size=SIZE))
    return tmp_path / "teacher"


def weights(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()


def test_the_folder_is_enough(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "data", test=images_of(6, size=SIZE))
    command: list[Any] = ["distill", "teacher", "--student", "convnet-1", "--eval", "data", *TINY]
    monkeypatch.chdir(tmp_path)
    whole = run(*command, "--out", "whole")
    run(*command, "--out", "a", "--stop-after", 2)
    monkeypatch.chdir("/")
    found = run("distill", "--resume", "--out", tmp_path / "a")
    assert found["finished"]
    assert found["accuracy"] == whole["accuracy"]  # with its test images
    assert weights(tmp_path / "a") == weights(tmp_path / "whole")
    assert (tmp_path / "a" / "config.toml").read_text() == (tmp_path / "whole" / "config.toml").read_text()


def test_a_new_beginning_forgets_the_command_of_one_that_kept_nothing(teacher: Path, tmp_path: Path) -> None:
    other = make_teacher(models.convnet(2, num_classes=3, channels=1), size=SIZE, seed=1)
    save_teacher(tmp_path / "other", other)
    words = ["--student", "convnet-1", *TINY, "--out", tmp_path / "a"]
    run("distill", teacher, *words, "--stop-after", 1)
    shutil.rmtree(tmp_path / "a" / "checkpoint")  # as if killed before its first
    run("distill", tmp_path / "other", *words, "--stop-after", 2)
    assert json.loads((tmp_path / "a" / FILE).read_text())["teacher"] == str(tmp_path / "other")
    assert run("distill", "--resume", "--out", tmp_path / "a")["finished"]


def test_options_of_a_foreign_teacher_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "import torch, zskt\n\ndef make(width):\n    torch.manual_seed(0)\n"
        "    return zskt.models.convnet(width, num_classes=3, channels=1)\n"
    )
    command: list[Any] = ["distill", "mine.py:make", "--teacher-args", "width=2", "--input-size", *SIZE, "--mean", 0.5]
    command += ["--std", 0.25, "--student", "convnet-1", *TINY]
    module = models.convnet(2, num_classes=3, channels=1)
    torch.save({"model": module.state_dict(), "ema": module.state_dict()}, "both.pth")
    command += ["--teacher-weights", "both.pth", "--teacher-key", "ema"]
    Path("ema").mkdir()  # a part of the file, and no path
    run(*command, "--out", "whole")
    run(*command, "--out", "a", "--stop-after", 2)
    line = fails(2, "distill", "--resume", "--out", "a")
    assert "names" in line
    assert "mine.py:make, whose code would run; give --trust" in line
    assert run("distill", "--resume", "--out", "a", "--trust")["finished"]
    assert weights(Path("a")) == weights(Path("whole"))


def test_without_a_command_it_must_be_given(teacher: Path, tmp_path: Path) -> None:
    assert "give the whole command" in fails(2, "distill", "--resume", "--out", tmp_path / "nothing")
    assert "found no teacher; give a teacher" in fails(2, "distill", "--student", "convnet-1", "--out", tmp_path / "b")
    assert "found no --student; give --student" in fails(2, "distill", teacher, "--out", tmp_path / "b")


@pytest.mark.parametrize(
    "change",
    [{"trust": True}, {"teacher": None}, {"teacher": ["a"]}, {"student_args": "x"}, {"mean": [None]}, {"out": "/tmp"}],
)
def test_a_changed_command_is_refused(change: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    run("distill", teacher, "--student", "convnet-1", *TINY, "--out", out, "--stop-after", 2)
    words = json.loads((out / FILE).read_text())
    (out / FILE).write_text(json.dumps(words | change))
    assert "is not as it was written" in fails(1, "distill", "--resume", "--out", out)
    edit(out / FILE, **change)
    assert f"{FILE} is damaged" in fails(1, "distill", "--resume", "--out", out)
    (out / FILE).write_text(json.dumps([] if change.get("out") else sealed({})))
    status, _, err = call("distill", "--resume", "--out", out)
    assert status == 1
    assert "damaged" in err

"""The command line: one JSON line on stdout, one line per error, exit statuses, help that helps."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import zskt
from small import call, coloured, edit, fails, make_teacher, run, write_images
from zskt.cli import demo
from zskt.cli.main import COMMANDS, at_home, main
from zskt.data.images import read
from zskt.method.config import Config, read_config
from zskt.run.checkpoint import Interrupted
from zskt.settings import flat

TINY = ["--steps", "4", "--batch-size", "8", "--set", "generator.width=8", "generator.latent=12", "student.updates=1"]


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """A teacher folder: wrn-10-2 for 3 x 16 x 16 images of 10 classes."""
    zskt.save_teacher(tmp_path / "teacher", make_teacher(), how="random weights")
    return str(tmp_path / "teacher")


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder of images, four of each of ten classes in train and two in test."""
    monkeypatch.setenv("ZSKT_CACHE", str(tmp_path / "cache"))
    train, test = (coloured(count, classes=10, size=(3, 16, 16), seed=count) for count in (40, 20))
    return str(write_images(tmp_path / "images", train=train, test=test))


def test_distil_evaluate_sample_report(teacher: str, data: str, tmp_path: Path) -> None:
    for seed in (0, 1):
        result = run(
            "distill", teacher, "--student", "wrn-10-1", "--out", tmp_path / f"run{seed}", "--recipe", "zskt",
            "--seed", seed, "--eval", data, *TINY,
        )  # fmt: skip
        assert result["finished"]
        assert result["step"] == 4
        assert 0 <= result["accuracy"] <= 1
    assert (tmp_path / "run0" / "report.html").exists()
    measured = run("evaluate", tmp_path / "run1", "--data", data, "--teacher", teacher)
    for key in ("accuracy", "agreement", "kl_teacher_student", "calibration_error"):
        assert measured[key] == pytest.approx(result[key], rel=1e-4)  # other memory format, other rounding
    assert run("evaluate", teacher, "--data", data).keys() == {"accuracy", "calibration_error"}
    run("sample", tmp_path / "run0", "--out", tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.size == (8 * 81 - 1, 8 * (81 + 12) - 1)  # a line below each image
    run("sample", tmp_path / "run0", "--teacher", teacher, "--out", tmp_path / "samples.png")
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.size == (8 * 81 - 1, 8 * (81 + 24) - 1)
    report = run("report", tmp_path / "run0", tmp_path / "run1", "--out", tmp_path / "report.html")
    assert report["accuracy"]["mean"] == pytest.approx(np.mean(report["accuracy"]["values"]))
    found = run("inspect", tmp_path / "run0", "--student", "wrn-10-1")
    assert 0 < found["steps"] <= zskt.load_recipe("bank").steps  # what half an hour of this machine holds
    assert re.fullmatch(r"[\d.]+ (s|min|h)", found["takes"])
    assert 1e-5 < found["pflop"] < 1
    assert (found["input_size"], found["num_classes"], found["model"]) == ([3, 16, 16], 10, "wrn-10-1")
    assert sum(found["noise_classes"]) == 1000
    assert found["recipe"] == "bank"


def test_stop_and_resume(teacher: str, tmp_path: Path) -> None:
    command = ["distill", teacher, "--student", "wrn-10-1", "--recipe", "zskt", *TINY]
    run(*command, "--out", tmp_path / "whole")
    part = run(*command, "--out", tmp_path / "parts", "--stop-after", "2")
    assert (part["finished"], part["step"]) == (False, 2)
    assert "resume" in fails(1, *command, "--out", tmp_path / "parts")
    assert run(*command, "--out", tmp_path / "parts", "--resume")["finished"]
    whole, parts = (tmp_path / name / "student.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


def distilling(teacher: str, out: Path, until: str, *more: str) -> tuple[list[str], subprocess.Popen[str]]:
    """A `zskt distill` in a process of its own, once it has written something at `until` (a pattern below `out`)."""
    command = [sys.executable, "-m", "zskt", "distill", teacher, "--student", "wrn-10-1", "--out", str(out)]
    command += ["--recipe", "zskt", "--batch-size", "8", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in out.glob(until)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return command, process


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_a_checkpoint_and_their_status(signum: int, status: int, teacher: str, tmp_path: Path) -> None:
    _, process = distilling(teacher, tmp_path / "run", "metrics.jsonl")
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    result = json.loads(out)
    assert not result["finished"]
    assert "continue with --resume" in result["reason"]
    assert "continue with --resume" in err
    assert "Traceback" not in err
    assert len(list((tmp_path / "run" / "checkpoint").glob("*.safetensors"))) == 1


LOADING = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
sys.argv[1:] = ["recipes"]
class Loading:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            print("loading", flush=True)
sys.meta_path.insert(0, Loading)
runpy.run_module("zskt", run_name="__main__")
"""


def test_an_interrupt_while_torch_is_loaded_is_one_line() -> None:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", LOADING], **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == "zskt: interrupted\n"
    assert process.returncode == 130


def test_killed_run_resumes(teacher: str, tmp_path: Path) -> None:
    """SIGKILL at any moment leaves whole files only, and the run goes on from them."""
    settings = ("--set", "checkpoint_every=1", "log_every=1")
    command, process = distilling(teacher, tmp_path / "run", "checkpoint/*.safetensors", *settings)
    process.kill()
    process.communicate()
    done = subprocess.run([*command, "--resume", "--stop-after", "1"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["step"] >= 2
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))


def test_teach_and_resume(data: str, tmp_path: Path) -> None:
    command = ["teach", "--model", "convnet-4", "--data", data, "--epochs", "3", "--batch-size", "16"]
    command += ["--schedule", "step"]
    whole = run(*command, "--out", tmp_path / "whole")
    assert whole["finished"]
    facts = json.loads((tmp_path / "whole" / "teacher.json").read_text())
    assert facts["class_names"] == [f"class {label}" for label in range(10)]
    assert facts["measured"]["accuracy"] == whole["accuracy"]
    assert (facts["updates"], facts["schedule"]) == (9, "step")
    written = {"teacher.json", "teacher.safetensors", "metrics.jsonl", "timing.jsonl"}
    assert {path.name for path in (tmp_path / "whole").iterdir()} == written
    part = run(*command, "--out", tmp_path / "parts", "--stop-after", "4")
    assert (part["finished"], part["update"]) == (False, 4)
    assert "--resume" in fails(1, *command, "--out", tmp_path / "parts")
    run(*command, "--out", tmp_path / "parts", "--resume")
    paths = [tmp_path / name / "teacher.safetensors" for name in ("whole", "parts")]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert "already holds a teacher" in fails(1, *command, "--out", tmp_path / "whole")


def test_import(data: str, tmp_path: Path) -> None:
    module = zskt.models.wide_resnet(10, 1)
    foreign = {name.replace("shortcut", "convShortcut"): tensor for name, tensor in module.state_dict().items()}
    torch.save({"state_dict": foreign, "epoch": 3}, tmp_path / "wrn.pth")
    command = ["import", tmp_path / "wrn.pth", "--model", "wrn-10-1", "--input-size", 3, 16, 16]
    command += ["--mean", 125.3, 123.0, 113.9, "--std", 51.6, 50.8, 51.3, "--num-classes", 10]
    result = run(*command, "--out", tmp_path / "a")
    assert result["renamed"] == {"convShortcut": "shortcut"}
    assert not result["measured"]
    teacher = zskt.load_teacher(tmp_path / "a")
    assert teacher.mean.flatten().tolist() == pytest.approx([125.3 / 255, 123.0 / 255, 113.9 / 255])
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(teacher(x), module.eval()(x))
    status, out, err = call(*command, "--out", tmp_path / "b", "--data", data)
    assert (status, json.loads(out)["measured"]) == (0, True)
    assert json.loads(out)["accuracy"] < 0.5  # random weights
    assert zskt.load_teacher(tmp_path / "b").class_names == tuple(read([data], "test", size=(3, 16, 16)).class_names)
    assert "is implausible for a trained network, although names and shapes fit: check --mean" in err
    assert "fc.weight" in fails(1, *command[:-2], "--out", tmp_path / "c", "--num-classes", 100)
    assert not (tmp_path / "c").exists()


def test_an_import_takes_the_network_that_the_images_confirm(tmp_path: Path) -> None:
    """Of two networks with the same tensors, one calls half of the images otherwise."""
    torch.manual_seed(0)
    module: Any = zskt.models.build("wrn-10-2-raw", 2, (3, 16, 16)).eval()
    test = coloured(60, classes=2, size=(3, 16, 16))
    with torch.no_grad():
        logits = module((test.images / 255 - 0.5) / 0.25)  # (60, 2)
        module.fc.bias -= logits.mean(dim=0)
    labels = (logits - logits.mean(dim=0)).argmax(dim=1)
    assert 10 < labels.sum() < 50
    data = write_images(tmp_path / "images", test=replace(test, labels=labels))
    torch.save(module.state_dict(), tmp_path / "wrn.pth")
    command = ["import", tmp_path / "wrn.pth", "--num-classes", 2, "--input-size", 3, 16, 16, "--data", data]
    command += ["--mean", 0.5, 0.5, 0.5, "--std", 0.25, 0.25, 0.25]
    for model, line in (
        ("wrn-10-2", r"as wrn-10-2-raw, of the same tensors: accuracy 1.0000, taken"),
        ("wrn-10-2-raw", r"as wrn-10-2, of the same tensors: accuracy 0.\d+\n"),
    ):
        status, out, err = call(*command, "--model", model, "--out", tmp_path / model)
        assert (status, json.loads(out)["accuracy"]) == (0, 1.0)
        assert re.search(line, err), err
        loaded = zskt.load_teacher(tmp_path / model).module
        assert getattr(loaded, "spec", None) == "wrn-10-2-raw"


def test_a_file_is_no_recipe(teacher: str, tmp_path: Path) -> None:
    command = ["distill", teacher, "--student", "wrn-10-1", "--out", tmp_path / "run", "--recipe", "mine.toml"]
    assert "mine.toml is a file of settings: give it with --config" in fails(2, *command)


def test_an_export_repeats_the_warnings_of_the_run(teacher: str, tmp_path: Path) -> None:
    run("distill", teacher, "--student", "wrn-10-1", "--out", tmp_path / "run", "--recipe", "zskt", *TINY)
    edit(tmp_path / "run" / "student.json", warnings=["collapse: one class"])
    status, _, err = call("export", tmp_path / "run", "--out", tmp_path / "hub", "--format", "hub")
    assert status == 0
    assert "warning: of the run: collapse: one class" in err
    assert "never measured on real images" in err
    assert "which says nothing about the teacher" in err


def test_recipes() -> None:
    listed = run("recipes")
    assert {"auto", "bank", "fast", "zskt", "zskt-fresh", "zskt-mmrazor", "zskt-prior"} <= set(listed)
    assert run("recipes", "zskt-mmrazor")["student.learning_rate"] == 0.1


def test_bad_input_is_one_line(teacher: str, data: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    distil = ["distill", teacher, "--out", out, "--student"]
    assert "did you mean zskt-prior" in fails(2, *distil, "wrn-10-1", "--recipe", "zskt-prio")
    assert "did you mean student.clip" in fails(2, *distil, "wrn-10-1", "--set", "student.clap=1")
    assert "expected key=value" in fails(2, *distil, "wrn-10-1", "--set", "steps")
    assert "did you mean wrn-16-1" in fails(2, *distil, "wnr-16-1")
    assert "6 n + 4" in fails(2, *distil, "wrn-17-1")
    assert "usable CUDA devices" in fails(2, *distil, "wrn-10-1", "--device", "cuda:99")
    assert "seed = 1000" in fails(2, *distil, "wrn-10-1", "--seed", 10**30)
    assert "seed = 'abc': expected a whole number" in fails(2, *distil, "wrn-10-1", "--set", "seed=abc")
    assert "needs at least" in fails(2, *distil, "wrn-10-1", "--set", "generator.width=100000000")
    assert "expected auto, cpu" in fails(2, *distil, "wrn-10-1", "--device", "gpu")
    assert "found nothing" in fails(1, "distill", tmp_path / "nowhere", "--student", "wrn-10-1", "--out", out)
    assert "did you mean digits" in fails(2, "evaluate", teacher, "--data", "digit")
    assert "nothing is downloaded" in fails(2, "evaluate", teacher, "--data", "cifar10")
    two = write_images(tmp_path / "two", test=coloured(2, classes=2, size=(3, 16, 16)))
    assert "10 classes, found 2" in fails(1, "evaluate", teacher, "--data", two)
    (tmp_path / "empty").mkdir()
    assert "expected" in fails(1, "evaluate", teacher, "--data", tmp_path / "empty")
    broken = Path(data) / "test" / "class 0" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    assert "0.png" in fails(1, "evaluate", teacher, "--data", data)
    (tmp_path / "teacher" / "teacher.safetensors").write_bytes(b"\x00" * 20)
    assert "not a complete safetensors file" in fails(1, "inspect", teacher)
    assert not out.exists()


def test_an_option_given_twice_is_refused(teacher: str, tmp_path: Path) -> None:
    command = ["distill", teacher, "--student", "wrn-10-1", "--out", tmp_path / "run", *TINY]
    assert "--set is given twice" in fails(2, *command, "--set", "student.updates=3")
    assert "seed is given twice" in fails(2, *command, "seed=3", "--seed", "4")  # a value of the --set before
    assert not (tmp_path / "run").exists()


def test_an_interrupted_demo_removes_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        assert (tmp_path / "teacher" / "teacher.json").exists()
        (tmp_path / "run").mkdir()
        raise Interrupted(signal.SIGINT, "interrupted")

    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(demo, "distill", interrupted)
    (tmp_path / "notes").touch()
    status, out, err = call("demo", "--out", tmp_path)
    assert (status, json.loads(out)["finished"]) == (130, False)
    assert err.endswith("zskt: the demo was interrupted; start it again\n")
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_a_demo_leaves_what_others_made_alone(tmp_path: Path) -> None:
    kept = tmp_path / "run" / "checkpoint" / "00000001.safetensors"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert "holds an unfinished run" in fails(1, "demo", "--out", tmp_path)
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "notes").touch()
    assert "found other things (notes)" in fails(1, "demo", "--out", tmp_path)
    assert kept.exists()


def test_a_demo_with_an_unknown_recipe_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "did you mean zskt" in fails(2, "demo", "--recipe", "zskd")
    assert not (tmp_path / "runs").exists()


def test_no_write_permission(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)  # not by a folder's mode: root may write anywhere
    line = fails(1, "distill", teacher, "--student", "wrn-10-1", "--out", tmp_path / "run", *TINY)
    assert "Permission denied; check the permissions or choose another place with --out" in line


def test_out_below_a_file(teacher: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        line = fails(1, "distill", teacher, "--student", "wrn-10-1", "--out", out, *TINY)
        assert str(out) in line


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["distill"], ["distil"], ["teach", "--epochs", "many"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"zskt {command}" in capsys.readouterr().out.split("Example:")[1]


@pytest.mark.parametrize("recipe", [demo.RECIPE, "zskt"])
def test_demo(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        result = run("demo", "--recipe", recipe)
        assert result["report"] == f"runs/demo-{number}/report.html"
        assert Path(result["report"]).exists()
    for key in ("teacher_accuracy", "student_accuracy", "agreement", "seconds"):
        assert result[key] >= 0
    assert result["student_parameters"] <= result["teacher_parameters"] / 4
    assert result["recipe"] == recipe
    assert (demo.size("auto"), demo.size("bank")) == ({"budget": demo.BUDGET},) * 2


@pytest.mark.slow
def test_demo_reaches_its_target(tmp_path: Path) -> None:
    result = run("demo", "--out", tmp_path / "demo")
    assert result["teacher_accuracy"] >= 0.985
    assert result["student_accuracy"] >= 0.95


LEAVING = """
import sys, torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(48, 3)
    def forward(self, x):
        return self.fc(x.flatten(1))

class Early(Net):
    def forward(self, x):
        sys.exit(0)

class Late(Net):
    def forward(self, x):
        return super().forward(x) if len(x) > 1 else sys.exit(0)

def leaves():
    sys.exit()

def __getattr__(name):
    raise ImportError("needs \\x1b[31mfoo\\nzskt: done")
"""
GREY = ["--input-size", "3", "4", "4", "--mean", ".5", ".5", ".5", "--std", ".2", ".2", ".2"]


@pytest.mark.parametrize("factory", ["leaves", "Early", "Late", "absent"])
def test_a_network_that_leaves_is_an_error(factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaving.py").write_text(LEAVING)
    monkeypatch.setattr("zskt.cli.inspect.latency", lambda network: network(torch.zeros(1, 3, 4, 4)))
    line = fails(1, "inspect", f"{tmp_path}/leaving.py:{factory}", *GREY)
    assert line.isprintable()
    (tmp_path / "at_import.py").write_text("raise SystemExit")
    assert "cannot import" in fails(1, "inspect", f"{tmp_path}/at_import.py:make", *GREY)


def test_what_nobody_foresaw_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str | None = None) -> None:
        raise LookupError("a\x1b[2J\nb")

    monkeypatch.setitem(COMMANDS, "recipes", broken)
    line = fails(1, "recipes")
    assert line.startswith("zskt: unexpected LookupError: a [2J; please report it")
    assert "ZSKT_TRACEBACK=1" in line
    monkeypatch.setenv("ZSKT_TRACEBACK", "1")
    with pytest.raises(LookupError):
        main(["recipes"])


def test_names_cannot_command_the_terminal(teacher: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(data) / "test"
    for label in range(10):
        (folder / f"class {label}").rename(folder / f"\x1b[2Jclass{label}\nzskt: done")
    main(["evaluate", teacher, "--data", str(folder.parent)])
    (folder / "\x1b[31mlink").symlink_to("/")
    (Path(data) / "train").rename(Path(data) / "unused")
    main(["evaluate", teacher, "--data", str(folder.parent)])
    main(["inspect", "\x1b]0;title\x07" + 200 * "x"])
    out, err = capsys.readouterr()
    assert "\x07" not in out + err
    assert "\x1b[2J" not in out + err
    assert "\x1b[31m" not in out + err
    assert "zskt: done" not in err.splitlines()


@pytest.mark.parametrize("path", ["~nosuchuser/x", "~nosuchuser/x.py:make"])
def test_the_home_of_nobody_is_a_path_that_is_not_there(path: str, teacher: str) -> None:
    fails(1, "inspect", path, *GREY)
    fails(1, "evaluate", teacher, "--data", path)


def test_a_home_folder_that_no_shell_has_expanded_is_found(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bash leaves that of --out=~/run, and a program that starts another expands none."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("distill", "~/teacher", "--student=wrn-10-1", "--out=~/run", "--recipe", "zskt", *TINY)["finished"]
    assert (tmp_path / "run" / "report.html").exists()
    run("sample", "~/run", "--out=~/samples.png")
    assert (tmp_path / "samples.png").exists()
    assert list(Path.cwd().iterdir()) == []
    assert at_home("--set=a=~/b") == "--set=a=~/b"  # no path, or not one of its own


def test_every_setting_is_an_option_and_only_what_was_typed_counts(teacher: str, tmp_path: Path) -> None:
    """Precedence: the recipe, then --config, then options and --set."""
    file = tmp_path / "mine.toml"
    file.write_text("steps = 3\nbatch_size = 12\n[generator]\nlatent = 7\n[student]\nupdates = 1\n")
    options = ["--config", file, "--steps", "2", "--generator.loss.one_hot", "0.25", "--generator.width", "8"]
    options += ["--schedule.kind", "constant", "--set", "threads=1", "student.learning_rate=0.5"]
    head = ["distill", teacher, "--student", "wrn-10-1", "--recipe", "zskt-prior"]
    run(*head, *options, "--out", tmp_path / "run")
    config = read_config(tmp_path / "run" / "config.toml")
    expected = {
        "recipe": "zskt-prior",  # as the recipe says
        "generator.loss.batchnorm": 1.0,
        "batch_size": 12,  # as the file says
        "generator.latent": 7,
        "student.updates": 1,
        "steps": 2,  # as was typed
        "generator.loss.one_hot": 0.25,
        "schedule.kind": "constant",
        "machine.threads": 1,
        "student.learning_rate": 0.5,
    }
    assert {name: flat(config)[name] for name in expected} == expected
    again = ["--config", tmp_path / "run" / "config.toml", "--out", tmp_path / "again"]  # the run's own, complete
    run("distill", teacher, "--student", "wrn-10-1", *again)
    assert read_config(tmp_path / "again" / "config.toml") == config


def test_every_setting_of_a_run_has_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    text = capsys.readouterr().out
    for name in flat(Config()).keys() - {"format", "recipe", "method"}:
        assert f"--{name.removeprefix('machine.').replace('_', '-')} " in text or f"--{name.replace('_', '-')} " in text
    assert text.index("--out ") < text.index("--generator.width")  # the common ones first
    assert "from the recipe" in " ".join(text.split())


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["teach", "--shift", "2"], "--shift is now --random-crop"),
        (["teach", "--mirrored", "True"], "--mirrored is now --horizontal-flip"),
        (["distill", "t", "--student", "wrn-10-1", "--out", "o", "--set", "memory.kind=bank"], "is now replay.kind"),
        (["distill", "t", "--student", "wrn-10-1", "--out", "o", "--set", "fused=true"], "now machine.fused"),
        (["distill", "--memory.kind", "buffer"], "--memory.kind is now --replay.kind"),
        (["distill", "--student.mode-in-search=eval"], "now --student.mode-for-generator"),
        (["distill", "--student.mode_in_search", "eval"], "now --student.mode-for-generator"),
        (["distill", "--memory-format", "contiguous"], "now --machine.memory-format"),
        (["distill", "--machine.device", "cpu"], "--machine.device is now --device"),
    ],
)
def test_names_of_before_are_refused_with_their_new_ones(command: list[str], words: str, teacher: str) -> None:
    assert words in fails(2, *[teacher if word == "t" else word for word in command])


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ('method = "belief_matchin"', [], "uses a custom method, belief_matchin: give it, as in --method FILE"),
        ('recipe = "own"\nmethod = "own.py:make"', [], "uses a custom method, own.py:make: give it"),
        ('method = "own.py:other"', ["--method", "own.py:make", "--trust"], "expected the method of mine.toml, own.py"),
        ('recipe = "zskt"', ["--recipe", "zskt-fresh"], "recipe zskt of mine.toml and --recipe zskt-fresh: give one"),
        ('method = "bank"', [], "method bank of mine.toml is not that of recipe auto"),
        ("format = 7", [], "format = 7: expected 2"),
        (
            'recipe = "zskt"\nsteps = 2',
            ["--method", "own.py:make", "--trust"],
            "recipe own (a custom method), 2 steps",  # the values count, the recipe does not
        ),
    ],
)
def test_a_file_of_settings_for_another_run_is_refused(
    text: str,
    options: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    teacher: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(text)
    Path("own.py").write_text("def make(teacher, student, config): ...\n")
    head = ["distill", teacher, "--student", "wrn-10-1", "--out", "run", "--config", "mine.toml", "--stop-after", "1"]
    assert main([*head, *options]) in (1, 2)
    assert words in capsys.readouterr().err
    assert not Path("run").exists()

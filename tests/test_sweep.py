"""zskt sweep: the grid is complete, each run is made once and alone, tables and report pool nothing but seeds."""

import csv
import io
import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import zskt
from small import GREY, call, coloured, edit, fails, run, write_images
from zskt.cli import sweep
from zskt.cli.jobs import Board
from zskt.cli.sweep import Grid, rows_of, values_of, words_of
from zskt.cli.teachers import FOREIGN
from zskt.data.images import read
from zskt.errors import UsageError, ZsktError
from zskt.evaluate.measures import measure
from zskt.files import write_json
from zskt.networks import models
from zskt.paper.grid import MEASURES
from zskt.paper.jobs import Job

SMALL = ("batch_size=16", "generator.width=8", "generator.latent=12", "student.updates=2")
RATES = "student.learning_rate=1e-3,2e-2"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with images of three classes and two teachers, t0 and t1."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZSKT_CACHE", str(folder / "cache"))
        patch.delenv("RAY_ADDRESS", raising=False)
        write_images(folder / "images", train=coloured(30), test=coloured(30, seed=1))
        for i in (0, 1):
            with torch.random.fork_rng():
                torch.manual_seed(i)
                module = models.convnet(4, num_classes=3, channels=1)
            network = zskt.Classifier(module, input_size=(1, 12, 12), mean=[0.4], std=[0.3])
            zskt.save_teacher(folder / f"t{i}", network, how="random weights")
        yield folder


def command(place: Path, out: Path, *more: object, teachers: str = "t0", steps: int = 3) -> list[str]:
    """A sweep of one student and the recipe zskt."""
    words = ["sweep", *(place / name for name in teachers.split()), "--student", "convnet-2", "--recipe", "zskt"]
    words += ["--steps", steps, "--eval", place / "images", "--out", out, "--set", *SMALL, *more]
    return list(map(str, words))


@pytest.fixture(scope="module")
def made(place: Path) -> tuple[Path, dict[str, Any]]:
    """A finished sweep of two teachers, two rates, two seeds, and what the command printed."""
    words = command(place, place / "made", RATES, "--seed", 0, 1, teachers="t0 t1")
    return place / "made", run(*words)


def runs(out: Path) -> dict[str, Path]:
    """The finished runs of a sweep."""
    return {path.parent.name: path.parent for path in (out / "parts").glob("*/student.json")}


def weights(out: Path) -> dict[str, bytes]:
    return {name: (folder / "student.safetensors").read_bytes() for name, folder in runs(out).items()}


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "student.json").read_text())


@pytest.fixture
def distilled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that were begun, by name."""
    names: list[str] = []
    actual = zskt.distill

    def distill(*arguments: Any, out: Path, **more: Any) -> Any:
        names.append(out.name)
        return actual(*arguments, out=out, **more)

    monkeypatch.setattr(sweep, "distill", distill)
    return names


def test_the_grid_is_complete(place: Path) -> None:
    """Every combination is a run of its own, its settings those of its name."""
    teachers, students, recipes = ("t0", "t1"), ("convnet-2", "auto:0.5"), ("zskt", "zskt-fresh")
    settings = ("student.learning_rate=1e-3,2e-3", "threads=1", "generator.updates=1,2,3")
    grid = Grid(
        tuple(str(place / name) for name in teachers), students, recipes, (0, 3), settings, 5, (), place / "x", FOREIGN
    )
    rows = rows_of(grid)
    wanted = itertools.product(teachers, students, recipes, (0.001, 0.002), (1, 2, 3))
    assert [(*row.labels.values(), *row.settings.values()) for row in rows] == [
        (teacher, student.replace(":", "-"), recipe, rate, 1, updates, 5)
        for teacher, student, recipe, rate, updates in wanted
    ]
    names = [job.name for row in rows for job in row.jobs]
    assert len(set(names)) == len(names) == 2 * 2 * 2 * 2 * 3 * 2
    for row in rows:
        for job, seed in zip(row.jobs, (0, 3), strict=True):
            assert job.settings["seed"] == seed
            assert {name: job.settings[name] for name in row.settings} == row.settings
            assert job.units == 5
            parts = [f"{row.labels['teacher']}-to-{row.labels['student']}-{row.labels['recipe']}"]
            parts += [f"{name}={row.settings[name]}" for name in row.settings if name != "steps"]
            assert job.name == "-".join([*parts, f"seed-{seed}"])


def test_runs_are_those_of_zskt_distill(place: Path, made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, found = made
    assert found["finished"]
    assert [row["runs"] for row in found["rows"]] == [2] * 4
    for row in found["rows"]:
        for seed, name in enumerate(row["jobs"]):
            folder = out / "parts" / name
            config = tomllib.loads((folder / "config.toml").read_text())
            assert config["seed"] == seed
            assert config["student"]["learning_rate"] == row["settings"]["student.learning_rate"]
            assert (config["steps"], config["recipe"]) == (3, "zskt")
            teacher = zskt.load_teacher(place / row["teacher"])
            assert facts(folder)["teacher_fingerprint"] == teacher.fingerprint()
    name = "t1-to-convnet-2-zskt-batch_size=16-generator.width=8-generator.latent=12-student.updates=2-"
    name += "student.learning_rate=0.02-seed-1"
    words = ["distill", place / "t1", "--student", "convnet-2", "--recipe", "zskt", "--steps", 3, "--seed", 1]
    run(*words, "--set", *SMALL, "student.learning_rate=2e-2", "--out", tmp_path / "alone")
    assert (tmp_path / "alone" / "student.safetensors").read_bytes() == weights(out)[name]


def test_tables_agree_with_the_runs_and_each_other(place: Path, made: tuple[Path, dict[str, Any]]) -> None:
    """Each number again from the networks in the folders; then every format from that."""
    out, printed = made
    result = json.loads((out / "sweep.json").read_text())
    assert printed == result | {"out": str(out)}
    assert all(result[key] for key in ("date", "command", "versions", "hardware", "threads", "seconds", "seeds"))
    lines = (out / "sweep.md").read_text().splitlines()
    page = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    tex = [
        line.removesuffix(r" \\").split(" & ") for line in (out / "sweep.tex").read_text().splitlines() if "&" in line
    ]
    with (out / "sweep.csv").open() as file:
        table = list(csv.DictReader(file))
    head = ["teacher", "student", "recipe", "student.learning_rate", "runs"]
    head += ["teacher, %", "student, %", "agreement, %", "KL, nats", "seconds"]
    assert page[0] == head
    assert [cell.replace("\\", "") for cell in tex[0]] == head
    assert page[2:] == tex[1:]
    images = read([str(place / "images")], "test")
    for row, line, texts in zip(result["rows"], table, page[2:], strict=True):
        teacher = zskt.load_teacher(place / row["teacher"])
        folders = [out / "parts" / name for name in row["jobs"]]
        again = [measure(zskt.load_student(folder), images.images, images.labels, teacher) for folder in folders]
        for number, folder in zip(again, folders, strict=True):
            number["seconds"] = facts(folder)["seconds"]
        assert line["runs"] == texts[4] == "2"
        assert [line[name] for name in head[:4]] == texts[:4]
        assert float(texts[3]) == row["settings"]["student.learning_rate"]
        for column, key in enumerate(("teacher_accuracy", "accuracy", "agreement", "kl_teacher_student", "seconds"), 5):
            values = [number[key] for number in again]
            mean, std = statistics.fmean(values), statistics.stdev(values)
            assert row["measures"][key]["values"] == pytest.approx(values, abs=1e-6)
            assert row["measures"][key]["mean"] == pytest.approx(mean, abs=1e-6)
            assert row["measures"][key]["std"] == pytest.approx(std, abs=1e-6)
            assert float(line[key]) == row["measures"][key]["mean"]
            assert float(line[f"{key}_std"]) == row["measures"][key]["std"]
            _, factor, digits = MEASURES[key]
            exact = row["measures"][key]
            assert texts[column] == f"{factor * exact['mean']:.{digits}f} ± {factor * exact['std']:.{digits}f}"
    assert len(table) == 4
    assert "All runs: batch_size = 16, generator.width = 8," in (out / "sweep.md").read_text()


def test_settings_are_never_pooled(made: tuple[Path, dict[str, Any]]) -> None:
    """A row is one setting; the report, which shows all runs, gives no mean over different ones."""
    out, found = made
    settings = [(row["teacher"], row["settings"]["student.learning_rate"]) for row in found["rows"]]
    assert len(set(settings)) == 4
    values = [value for row in found["rows"] for value in row["measures"]["kl_teacher_student"]["values"]]
    assert len(set(values)) == 8
    page = (out / "report.html").read_text()
    assert "No mean, as the runs differ in student.learning_rate" in page
    assert "mean ± std" not in page
    assert all(name in page for name in runs(out))


def test_given_again_it_does_only_what_is_missing(place: Path, tmp_path: Path, distilled: list[str]) -> None:
    out = tmp_path / "out"
    words = command(place, out, "--seed", 0, 1)
    first = run(*words)
    assert len(distilled) == 2
    before = {path: path.stat().st_mtime_ns for path in (out / "parts").rglob("*") if path.is_file()}
    status, stdout, stderr = call(*words)
    assert "1 teacher, 1 student, 1 recipe, 1 setting, 2 seeds: 2 runs; 0 are missing, 0 of them begun" in stderr
    assert (status, json.loads(stdout)["rows"]) == (0, first["rows"])
    assert len(distilled) == 2
    assert {path: path.stat().st_mtime_ns for path in (out / "parts").rglob("*") if path.is_file()} == before
    more = run(*command(place, out, "--seed", 0, 1, 2))
    assert len(distilled) == 3
    assert distilled[2].endswith("seed-2")
    assert more["rows"][0]["measures"]["accuracy"]["values"][:2] == first["rows"][0]["measures"]["accuracy"]["values"]
    assert more["rows"][0]["runs"] == 3
    line = fails(1, *command(place, out, "--seed", 0, 1, steps=4))
    assert "steps = 3, now 4; units = 3, now 4); give the same ones or choose another --out" in line
    assert len(distilled) == 3


def test_killed_it_goes_on_where_it_was(
    place: Path, tmp_path: Path, made: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: the third run is stopped after two of its three steps, as by the system."""
    out, actual, begun = tmp_path / "out", zskt.distill, list[tuple[str, bool]]()
    words = command(place, out, RATES, "--seed", 0, 1, teachers="t0 t1")

    def distill(*arguments: Any, **more: Any) -> Any:
        begun.append((more["out"].name, more["resume"]))
        if len(begun) == 3:
            actual(*arguments, **more | {"stop_after": 2})
            raise KeyboardInterrupt
        return actual(*arguments, **more)

    monkeypatch.setattr(sweep, "distill", distill)
    status, stdout, stderr = call(*words)
    assert (status, stdout) == (130, "")
    assert stderr.splitlines()[-1] == "zskt: interrupted"
    assert len(runs(out)) == 2
    status, _, stderr = call(*words)
    assert status == 0
    assert "8 runs; 6 are missing, 1 of them begun" in stderr
    assert [name for name, _ in begun].count(begun[2][0]) == 2
    assert [resume for _, resume in begun] == [False, False, False, True, *[False] * 5]
    assert weights(out) == weights(made[0])


def test_a_failing_run_fails_alone(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, stdout, stderr = call(*command(place, out, "student.learning_rate=1e29,1e-3", "--seed", 0, 1))
    assert (status, stdout) == (1, "")
    result = json.loads((out / "sweep.json").read_text())
    assert not result["finished"]
    assert [(row["runs"], row["failed"]) for row in result["rows"]] == [(0, 2), (2, 0)]
    assert result["rows"][0]["measures"] == {}
    page = (out / "sweep.md").read_text()
    assert "| 1e+29 | 0 of 2, 2 failed | failed | failed |" in page
    (line,) = (line for line in stderr.splitlines() if line.startswith("zskt: "))
    for name, why in result["failed"].items():
        assert f"Failed: {name}: {why}" in page
        assert f"{name}: failed, {why}" in stderr
        assert "diverged" in why
    first, why = next(iter(result["failed"].items()))
    assert line == f"zskt: 2 of 4 runs failed, {first} first: {why}"
    assert ",1e+29,0,2,2," in (out / "sweep.csv").read_text()
    assert r"0 of 2, 2 failed & failed & failed" in (out / "sweep.tex").read_text()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyError("a bug"), "unexpected (KeyError: 'a bug'); please report it with the command"),
        (UsageError("student.loss.stages: expected others"), "student.loss.stages: expected others"),
    ],
)
def test_neither_bugs_nor_contradictions_of_one_run_stop_the_others(
    error: Exception, words: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actual = zskt.distill

    def distill(*arguments: Any, **more: Any) -> Any:
        if more["out"].name.endswith("seed-0"):
            raise error
        return actual(*arguments, **more)

    monkeypatch.setattr(sweep, "distill", distill)
    line = fails(1, *command(place, tmp_path / "out", "--seed", 0, 1))
    assert line.startswith("zskt: 1 of 2 runs failed, t0-to-convnet-2-zskt-")
    assert line.endswith(f"seed-0 first: {words}")
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["rows"][0]["runs"] == 1


def test_a_student_that_does_not_fit_fails_alone(place: Path, tmp_path: Path) -> None:
    words = ["sweep", place / "t0", "--student", "convnet-2", place / "alien", "--recipe", "zskt", "--steps", 1]
    teacher = zskt.Classifier(models.convnet(4, num_classes=3, channels=3), input_size=(3, 8, 8), **GREY)
    student, settings = models.convnet(2, num_classes=3, channels=3), {"batch_size": 4, "generator.width": 8}
    zskt.distill(teacher, student, "zskt", steps=1, settings=settings, out=place / "alien")
    line = fails(1, *words, "--set", *SMALL, "--out", tmp_path / "out")
    assert "1 of 2 runs failed, t0-to-alien-zskt-" in line
    assert "expected a student for images of size (1, 12, 12)" in line


def test_without_test_images_no_number_is_called_an_accuracy(place: Path, tmp_path: Path) -> None:
    words = command(place, tmp_path / "out", "--seed", 0, 1)
    cut = words.index("--eval")
    found = run(*words[:cut], *words[cut + 2 :])
    assert set(found["rows"][0]["measures"]) == {"pseudo", "noise", "seconds"}
    page = (tmp_path / "out" / "sweep.md").read_text()
    assert (
        "| teacher | student | recipe | runs | disagreements on 100 fresh pseudo images | on 100 of noise | seconds |"
        in page
    )
    assert "measured without data: no number here is an accuracy" in page


@pytest.fixture
def path_with_stand_ins(tmp_path: Path) -> dict[str, str]:
    """An environment in which `zskt` is this package and `srun` runs what it is given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, line in {"zskt": f'exec {shlex.quote(sys.executable)} -m zskt "$@"', "srun": 'exec "$@"'}.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    source = str(Path(zskt.__file__).parent.parent)
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": source}


def test_printed_jobs_lead_to_the_same_tables(
    place: Path, tmp_path: Path, path_with_stand_ins: dict[str, str], distilled: list[str]
) -> None:
    """Each line on its own, the second from another folder by a stand-in for srun; then the sweep itself."""
    words = command(place, tmp_path / "out" / "a b", "--seed", 0, 1)  # a path to be quoted
    status, stdout, stderr = call(*words, "--print-jobs")
    assert status == 0
    assert "2 runs, 2 of them missing" in stderr
    lines = stdout.splitlines()
    assert len(lines) == 2
    assert not (tmp_path / "out").exists()
    assert all(line.startswith("zskt sweep ") for line in lines)
    assert run(*shlex.split(lines[0])[1:])["finished"]
    line, distilled[:] = f"srun {lines[1]}", []
    done = subprocess.run(line, shell=True, cwd=tmp_path, env=path_with_stand_ins, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["finished"]
    assert not (tmp_path / "out" / "a b" / "sweep.json").exists()
    assert call(*words, "--print-jobs")[:2] == (0, "")
    found = run(*words)
    assert distilled == []
    whole = run(*command(place, tmp_path / "whole", "--seed", 0, 1))
    for row in found["rows"] + whole["rows"]:
        for name in ("seconds", "pseudo", "noise"):  # the other process asked about 1,000 images
            del row["measures"][name]
    assert found["rows"] == whole["rows"]
    assert weights(tmp_path / "out" / "a b") == weights(tmp_path / "whole")


def test_one_run_alone(place: Path, tmp_path: Path, distilled: list[str]) -> None:
    out = tmp_path / "out"
    words = command(place, out, "--seed", 0, 1)
    _, stdout, _ = call(*words, "--print-jobs")
    name = shlex.split(stdout.splitlines()[1])[-1]
    assert run(*words, "--only", name) == {"finished": True, "runs": 1, "out": str(out)}
    assert run(*words, "--only", name)["finished"]
    assert distilled == [name]
    assert sorted(path.name for path in out.iterdir()) == ["parts"]
    line = fails(2, *words, "--only", name[:-1] + "7")
    assert line.startswith("zskt: unknown run 't0-to-convnet-2-zskt-")
    assert f"did you mean {name}" in line
    for other in ("--ray", "--print-jobs"):
        assert "--only is for a run here" in fails(2, *words, "--only", name, other)


def test_the_words_of_a_grid_are_read_as_the_same_grid(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all options, so that none is lost between --print-jobs and a job."""
    grids: list[Grid] = []

    def rows(grid: Grid, only: str | None = None) -> list[Any]:
        grids.append(grid)
        raise UsageError("enough")

    monkeypatch.setattr(sweep, "rows_of", rows)
    (place / "a b.py").write_text("")
    words = ["sweep", "a.py:make", "b", "--student", "x:y", "wrn-16-1", "--recipe", "zskt", "bank", "--seed", 0, 1]
    words += ["--set", 'a="b c",d', "e=1", "--steps", 7, "--eval", place / "images", "digits", "--out", place / "it's"]
    words += ["--teacher-weights", place / "a b.py", "--teacher-args", "depth=2", "--input-size", 1, 2, 3]
    words += ["--mean", 0.5, "--std", 0.25, "--trust"]
    fails(2, *words)
    fails(2, "sweep", *words_of(grids[0]))
    assert grids[1] == grids[0]
    assert grids[0].foreign.trust
    assert grids[0].foreign.teacher_args == ("depth=2",)
    minimal = ["sweep", "t", "--student", "s", "--out", place / "o"]
    fails(2, *minimal)
    fails(2, "sweep", *words_of(grids[2]))
    assert grids[3] == grids[2]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("x=1e-3,2e-3", [0.001, 0.002]),
        ("x=1,.5", [1, 0.5]),
        ("x=a,b", ["a", "b"]),
        ("x=true, false", [True, False]),
        ("x=[1,2],[3]", [[1, 2], [3]]),
        ('x=["a=b","c=d"]', [["a=b", "c=d"]]),
        ("x=7", [7]),
    ],
)
def test_lists_of_values(text: str, values: list[Any]) -> None:
    assert values_of(text) == ("x", values)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("'student.learning_rate': expected key=value", ["--set", "student.learning_rate"]),
        ("'x=': expected key=value or key=value,value", ["--set", "x="]),
        ("'x=1,,2': expected key=value or key=value,value", ["--set", "x=1,,2"]),
        ("'=1': expected key=value", ["--set", "=1"]),
        ("unknown setting 'student.learning_rat': did you mean", ["--set", "student.learning_rat=1,2"]),
        ("student.learning_rate = 'fast': expected a number", ["--set", "student.learning_rate=1e-3,fast"]),
        ("--set student.learning_rate: found 0.001 twice", ["--set", "student.learning_rate=1e-3,0.001"]),
        ("batch_size is given twice", ["--set", "batch_size=1", "batch_size=2"]),
        ("steps is given twice", ["--steps", 3, "--set", "steps=4"]),
        ("--set seed: use --seed", ["--set", "seed=1,2"]),
        ("--set recipe: use --recipe", ["--set", "recipe=zskt"]),
        ("unknown recipe 'zskd': did you mean zskt", ["--recipe", "zskt", "zskd"]),
        ("--recipe: found zskt twice", ["--recipe", "zskt", "zskt"]),
        ("--seed: found 1 twice", ["--seed", 1, 1]),
        ("--seed: expected at least one, found none", ["--seed"]),
        ("seed = -1: expected", ["--seed", -1]),
        ("--student: found convnet-2 twice", ["--student", "convnet-2", "convnet-2"]),
        ("did you mean wrn-16-1", ["--student", "wnr-16-1"]),
        ("too long for a folder's name", ["--set", "student.learning_rate=1,2", f"student.loss.stages={200 * 'a'}"]),
        ("--set budget chooses steps: give one of them", ["--steps", 3, "--set", "budget=5s"]),
        ("--set budget chooses bank.rounds", ["--recipe", "bank", "--set", "budget=5s", "bank.rounds=5"]),
        ("--cpus-per-run is for Ray: give --ray, too", ["--cpus-per-run", 2]),
        ("--gpus-per-run is for Ray: give --ray, too", ["--gpus-per-run", 0.5]),
        ("--cpus-per-run 0: expected at least 1", ["--ray", "--cpus-per-run", 0]),
        ("--gpus-per-run -1.0: expected a number from 0 on", ["--ray", "--gpus-per-run", -1]),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_before_anything_runs(
    message: str, words: list[object], place: Path, tmp_path: Path, distilled: list[str]
) -> None:
    base = [] if "--student" in words else ["--student", "convnet-2"]
    line = fails(2, "sweep", place / "t0", *base, *words, "--out", tmp_path / "out")
    assert message in line
    assert distilled == []
    assert not (tmp_path / "out").exists()


def test_wrong_networks_and_data_are_one_line(place: Path, tmp_path: Path) -> None:
    out = ["--student", "convnet-2", "--out", tmp_path / "out"]
    assert "teachers: expected at least one, found none" in fails(2, "sweep", *out)
    (tmp_path / "t0").symlink_to(place / "t0")
    line = fails(2, "sweep", place / "t0", tmp_path / "t0", *out)
    assert "teachers: found t0 twice; runs are named after them: give each once, or rename one" in line
    assert "nowhere" in fails(1, "sweep", tmp_path / "nowhere", *out)
    assert "no such" in fails(1, "sweep", place / "t0", *out, "--eval", tmp_path / "nowhere").lower()
    assert not (tmp_path / "out").exists()


def test_another_student_under_the_same_name_is_refused(
    place: Path, made: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = list(runs(made[0]).values())[:2]
    for name, source in (("a", first), ("b", second)):
        shutil.copytree(source, tmp_path / name / "net")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "convnet-2").mkdir()  # a folder that is called as a model is
    words = command(place, tmp_path / "out", steps=1)
    run(*words)
    words[words.index("convnet-2")] = "a/net"
    run(*words)
    words[words.index("a/net")] = "b/net"
    assert "student_weights" in fails(1, *words)


def test_runs_of_a_row_that_time_made_unequal_are_told(
    place: Path, made: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    copied = tmp_path / "made"
    shutil.copytree(made[0], copied)
    for name, folder in runs(copied).items():
        if name.endswith("seed-1"):
            edit(folder / "student.json", steps=5)
    with torch.random.fork_rng():
        run(*command(place, copied, RATES, "--seed", 0, 1, teachers="t0 t1"))
    text = (copied / "sweep.md").read_text()
    assert "Steps, as many as fitted the time of each run, from row to row: 3 to 5; 3 to 5; 3 to 5; 3 to 5." in text
    assert "Steps, as many" not in (made[0] / "sweep.md").read_text()
    assert [row["steps"] for row in json.loads((copied / "sweep.json").read_text())["rows"]] == [[3, 5]] * 4


# The table of states


def waiting(names: str) -> list[Job]:
    return [Job(name, {}, 10, "steps", "", lambda: lambda: None, lambda *_: True) for name in names]


def test_the_table_shows_every_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = waiting("abcde")
    write_json(jobs[0].folder(tmp_path) / "student.json", {"measured": {"accuracy": 0.5}, "parameters": 1})
    board = Board(jobs, tmp_path, "running")
    with board.bar("b", "steps") as show:
        show(3, 10, "test 25.00 %")
        with pytest.raises(ZsktError), board.bar("c", "steps"):
            raise ZsktError("it [diverged]")
        with board.bar("d", "steps"):
            pass  # out of time
        assert board.counts() == "1 done, 2 waiting, 1 failed, 1 running"
        screen = Console(width=100, record=True, file=io.StringIO())
        screen.print(board.table())
        text = screen.export_text()
        write_json(jobs[1].folder(tmp_path) / "belief.json", {"accuracy": 0.25})
    lines = [line.strip("│┃ ").split() for line in text.splitlines()]
    states = [line[:3:2] for line in lines if len(line) > 2 and line[0] in "abcde"]
    assert states == [["b", "running"], ["c", "failed"], ["d", "waiting"], ["e", "waiting"], ["a", "done"]]
    assert "3 of 10 steps  test 25.00 %" in text
    assert "it [diverged]" in text
    said = capsys.readouterr().err.splitlines()
    assert [line.split(" s (")[0].rpartition(",")[0] for line in said] == [
        "c: failed, it [diverged]", "d: waiting, stopped", "b: done, test 25.00 %",
    ]  # fmt: skip

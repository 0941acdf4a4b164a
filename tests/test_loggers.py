"""A run's numbers as TensorBoard's own reader finds them, and in the loggers that the documentation shows."""

import contextlib
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import zskt
from small import make_teacher, run, student_for
from zskt.networks.classifier import Classifier
from zskt.networks.folder import save_teacher
from zskt.run.checkpoint import read_lines
from zskt.run.lifecycle import Event
from zskt.run.loggers import FOLDER, to_tensorboard

SIZE = (3, 8, 8)
TINY: dict[str, Any] = {"steps": 6, "log_every": 2, "checkpoint_every": 3, "batch_size": 4}
TINY |= {"generator.width": 4, "generator.latent": 4, "student.updates": 2}
PAGE = Path(__file__).parents[1] / "docs" / "own-method.md"


@pytest.fixture(scope="module")
def teacher() -> Classifier:
    return make_teacher(size=SIZE)


def written(out: Path) -> dict[str, dict[int, float]]:
    """The curves in TensorBoard's files, by step."""
    reader = EventAccumulator(str(out / FOLDER), purge_orphaned_data=True)
    reader.Reload()
    return {name: {each.step: each.value for each in reader.Scalars(name)} for name in reader.Tags()["scalars"]}


def expected(out: Path) -> dict[str, dict[int, Any]]:
    found: dict[str, dict[int, Any]] = {}
    for line in read_lines(out / "metrics.jsonl"):
        for name, value in line.items():
            if name.endswith("_loss"):
                found.setdefault(name, {})[line["step"]] = pytest.approx(value[-1])
            elif name.endswith("_terms"):
                for term, each in value.items():
                    found.setdefault(f"{name}/{term}", {})[line["step"]] = pytest.approx(each)
            elif isinstance(value, int | float) and name != "step":
                found.setdefault(name, {})[line["step"]] = pytest.approx(value)
    return found


def test_tensorboard_has_the_numbers_of_the_log(teacher: Classifier, tmp_path: Path) -> None:
    save_teacher(tmp_path / "teacher", teacher)
    words: list[Any] = [f"--{name}={value}".replace("_", "-") for name, value in TINY.items()]
    words += ["--student", "convnet-1", "--out", tmp_path / "a", "--recipe", "zskt-prior", "--log", "tensorboard"]
    run("distill", tmp_path / "teacher", *words)
    assert written(tmp_path / "a") == expected(tmp_path / "a")
    assert {"student_loss", "generator_terms/kl", "teacher_confidence"} <= set(written(tmp_path / "a"))


class Killed(Exception):
    pass


def test_after_a_kill_no_step_is_there_twice(teacher: Classifier, tmp_path: Path) -> None:
    def kill(event: Event) -> None:
        if event.step == 5:  # after the line of step 4, which the checkpoint of step 3 does not know
            raise Killed

    out = tmp_path / "a"
    options: dict[str, Any] = {"settings": TINY, "out": out}
    with pytest.raises(Killed):
        zskt.distill(teacher, student_for(teacher), "zskt-prior", callbacks=[to_tensorboard(out), kill], **options)
    first = written(out)["student_loss"]
    assert list(first) == [1, 2, 4]
    zskt.distill(teacher, student_for(teacher), "zskt-prior", callbacks=[to_tensorboard(out)], resume=True, **options)
    assert list(written(out)["student_loss"]) == [1, 2, 4, 6]
    assert written(out) == expected(out)


def test_a_killed_beginning_with_tensorboard_is_begun_again(teacher: Classifier, tmp_path: Path) -> None:
    out = tmp_path / "a"
    (out / FOLDER).mkdir(parents=True)  # as after a kill before the first checkpoint
    zskt.distill(teacher, student_for(teacher), "zskt-prior", settings=TINY, out=out)


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(zskt.ZsktError, match=r'needs tensorboard.*pip install "zskt\[tensorboard\]"'):
        to_tensorboard(tmp_path)


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_the_loggers_of_the_page_work(
    package: str, teacher: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: dict[int, dict[str, float]] = {}

    def log(numbers: dict[str, float], step: int) -> None:
        logged[step] = dict(numbers)

    @contextlib.contextmanager
    def start_run(run_name: str) -> Iterator[None]:
        yield

    stand_in: Any = types.ModuleType(package)
    stand_in.init = lambda project, id, resume: types.SimpleNamespace(log=log)
    stand_in.log_metrics, stand_in.start_run = log, start_run
    monkeypatch.setitem(sys.modules, package, stand_in)
    monkeypatch.chdir(tmp_path)
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if package in code)
    code = code.replace('out="', f'"zskt-prior", settings={TINY}, out="')
    exec(code, {"teacher": teacher, "student": student_for(teacher)})
    lines = [json.loads(text) for text in Path("runs/seed-0/metrics.jsonl").read_text().splitlines()]
    assert list(logged) == [line["step"] for line in lines]
    assert logged[6]["student_loss"] == lines[-1]["student_loss"][-1]
    assert all(isinstance(value, float) for value in logged[6].values())

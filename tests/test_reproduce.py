"""The paper's tables and figures: their cells and jobs, the published numbers, budgets, and all of them made small."""

import math
import os
import shutil
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import zskt
from small import coloured, make_teacher, quiet
from zskt import runtime
from zskt.data.images import Dataset
from zskt.errors import UsageError
from zskt.evaluate.measures import measure
from zskt.files import read_json
from zskt.networks import models
from zskt.networks.folder import load_network
from zskt.paper.experiments import Budget
from zskt.paper.jobs import Show, in_order, run_jobs
from zskt.paper.reproduce import NAMES, Request, published_budget, reproduction
from zskt.paper.tables import Reproduction, write_result
from zskt.run.checkpoint import read_lines
from zskt.runtime import circumstances

pytestmark = pytest.mark.usefixtures("tiny_recipes")

MADE = tuple(name for name in NAMES if name != "toy")
IMAGES = {"cifar10": 50_000, "svhn": 73_257, "mnist": 60_000, "fashion-mnist": 60_000, "images": 50_000}


def blank(name: str = "cifar10") -> Dataset:
    """As many black images as a known set has, without their memory."""
    size = (1, 28, 28) if "mnist" in name else (3, 32, 32)
    images = torch.zeros(1, *size, dtype=torch.uint8).expand(IMAGES[name], *size)
    return Dataset(images, torch.arange(IMAGES[name]) % 10, tuple("0123456789"), name)


def request(name: str, data: str = "cifar10", root: Path = Path("nowhere"), **changes: Any) -> Request:
    return Request(name, blank(data), blank(data), root, **changes)


def published(made: Reproduction) -> dict[tuple[str, str], str]:
    """(row, column) -> what the paper says."""
    return {(cell.row, cell.column): cell.paper for cell in made.cells if cell.paper is not None}


# What each is made of, counted by hand: cells and, over three seeds, jobs.

WHOLE = {
    "table-1": (6 * 4, 4 * 3 + 6 * 3 + 6 * 3),  # four networks on all images; KD+AT and zero-shot of six pairs
    "table-2": (3 * 3, 3 + 3 + 2 * 3 + 3 * 3),  # teachers, zero-shot, KD+AT on all and on some, a comparison of each
    "figure-2": (6 * 3 + 6 + 1, 6 * 3 + 2 * 6 * 3 + 3 + 5 * 3 + 3),
    "figure-3": (4, 3 + 3),
    "figure-4": (3 * 3, 3 + 3 + 2 * 3 + 3 * 3),
    "figure-5": (2 * 5, 5 * 3),
    "mmrazor": (3, 3 * 3),
}
OWN = WHOLE | {"table-1": (4, 4 * 3), "figure-5": (2 * 2, 2 * 3)}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("data", ["images", "cifar10", "mnist"])
def test_cells_and_jobs_match_a_count_by_hand(name: str, data: str, tmp_path: Path) -> None:
    channels, height, width = blank(data).images.shape[1:]
    given = make_teacher(models.convnet(4, channels=channels), size=(channels, height, width))
    changes: dict[str, Any]
    for changes, expected in (
        ({}, WHOLE),
        ({"model": "convnet-4", "student": "convnet-2"}, OWN),
        ({"teacher": given, "student": "convnet-2"}, {key: (cells, n - 2) for key, (cells, n) in OWN.items()}),
    ):
        made = reproduction(request(name, data, tmp_path, **changes))
        assert made.name == name
        assert (len(made.cells), len(in_order(made.jobs))) == expected[name]
        assert len({(cell.row, cell.column) for cell in made.cells}) == len(made.cells)
        assert all(value is None for cell in made.cells for value in [cell.to_json(tmp_path)["mean"]])
        assert made.draw(tmp_path, "") is None
        for cell in made.cells:  # a network that is given is not measured once per seed
            assert len({job.name for job in cell.jobs}) == len(cell.jobs)
            assert len(cell.jobs) == 3 or [job.name for job in cell.jobs] == ["given-teacher"]
    assert not list(tmp_path.iterdir())


def test_requests_change_the_jobs() -> None:
    asked: dict[str, Any] = {"images_per_class": (5, 200), "seeds": (7,), "student": "wrn-16-2"}
    asked |= {"recipe": ("zskt", "zskt-prior")}
    names = {name: {job.name for job in in_order(reproduction(request(name, **asked)).jobs)} for name in MADE}
    assert names["table-1"] == {
        "wrn-40-2-on-all-seed-7",
        "wrn-16-2-on-all-seed-7",
        "kd-at-wrn-40-2-to-wrn-16-2-on-5-per-class-seed-7",
        "kd-at-wrn-40-2-to-wrn-16-2-on-200-per-class-seed-7",
        "zskt-wrn-40-2-to-wrn-16-2-seed-7",
        "zskt-prior-wrn-40-2-to-wrn-16-2-seed-7",
    }
    assert len(names["table-2"]) == len(names["figure-4"]) == 1 + 2 + 3 + 5
    assert len(names["figure-2"]) == 3 + 2 * 3 + 2 * (1 + 2) + 1
    assert names["figure-3"] == {name for name in names["table-1"] if not name.startswith(("kd", "wrn-16"))}
    assert len(names["mmrazor"]) == 2 + 2


@pytest.mark.parametrize("seeds", [(), (1, 1), (0, 1, 0)])
def test_empty_and_repeated_seeds_are_refused(seeds: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="expected at least one, without repetition"):
        reproduction(request("table-1", seeds=seeds))


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean figure-2"):
        reproduction(request("figure-22"))


# Published numbers, copied from their sources a second time.

TABLE_1 = """
    wrn-16-2 wrn-16-1 93.97±0.11 91.04±0.04 84.54±0.21 82.44±0.21
    wrn-40-1 wrn-16-1 93.18±0.08 91.04±0.04 81.71±0.25 79.93±1.11
    wrn-40-2 wrn-16-1 94.73±0.02 91.04±0.04 81.25±0.67 83.69±0.58
    wrn-40-1 wrn-16-2 93.18±0.08 93.97±0.11 85.74±0.47 86.60±0.56
    wrn-40-2 wrn-16-2 94.73±0.02 93.97±0.11 86.39±0.33 89.71±0.10
    wrn-40-2 wrn-40-1 94.73±0.02 93.18±0.08 87.35±0.12 86.60±1.79
"""
FIGURE_2 = {
    "svhn": """
        no teacher | - | 10.88 | 19.71 | 54.83 | 64.26 | 73.18 | 95.71
        KD+AT | - | 24.57 | 40.25 | 54.03 | 69.69 | 77.72 | 95.88
        zskt | 94.06 ± 0.27 | 94.36 | 94.37 | 94.35 | 94.38 | 94.41 | -
        teacher | - | - | - | - | - | - | 96.50
    """,
    "cifar10": """
        no teacher | - | 25.79 | 33.5 | 44.88 | 55.62 | 58.80 | 91.55
        KD+AT | - | 40.32 | 57 | 68 | 72 | 76 | 91.92
        zskt | 83.69 ± 0.58 | 84.68 | 84.71 | 85.28 | 85.75 | 85.91 | -
        teacher | - | - | - | - | - | - | 95.13
    """,
}
MTE = {"svhn": ("0.09", "0.64"), "cifar10": ("0.22", "0.68 (paper), 0.72 (notebook)")}


def expected_numbers(name: str, data: str) -> dict[tuple[str, str], str]:
    """(row, column) -> the published number, for the published networks."""
    columns: tuple[str, ...]
    if name == "table-1" and data == "cifar10":
        columns = ("teacher", "student from scratch", "KD+AT, 200 per class", "zero-shot, zskt")
        rows = [line.split() for line in TABLE_1.strip().splitlines()]
        return {
            (f"{teacher} → {student}", column): number.replace("±", " ± ")
            for teacher, student, *numbers in rows
            for column, number in zip(columns, numbers, strict=True)
        }
    if name in ("table-2", "figure-4") and data in MTE:
        rows_of = ("zero-shot, zskt", "KD+AT, all images")
        return {(row, "mean transition error"): number for row, number in zip(rows_of, MTE[data], strict=True)}
    if name == "figure-2" and data in FIGURE_2:
        columns = ("M = 0", "M = 10", "M = 25", "M = 50", "M = 75", "M = 100", "all")
        lines = [[word.strip() for word in line.split("|")] for line in FIGURE_2[data].strip().splitlines()]
        return {
            (row, column): number
            for row, *numbers in lines
            for column, number in zip(columns, numbers, strict=True)
            if number != "-"
        }
    if name == "figure-3" and data == "cifar10":
        return {("zskt", "teacher confidence"): "about 0.8", ("zskt", "student confidence"): "about 0.3"}
    if name == "mmrazor" and data == "cifar10":
        row = "resnet-34 → resnet-18"
        zero_shot = {(row, "zero-shot, zskt-mmrazor"): "93.05 (metafile), 93.50 (page)"}
        return {(row, "teacher"): "95.34", (row, "student from scratch"): "94.82", **zero_shot}
    return {}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("data", ["cifar10", "svhn", "images"])
def test_published_numbers_are_those_of_the_sources(name: str, data: str) -> None:
    assert published(reproduction(request(name, data))) == expected_numbers(name, data)


@pytest.mark.parametrize("name", MADE)
def test_published_numbers_are_only_for_the_published_networks(name: str) -> None:
    own: tuple[dict[str, Any], ...] = ({"model": "convnet-4"}, {"student": "convnet-2"}, {"model": "vgg-11"})
    for changes in own:
        found = published(reproduction(request(name, **changes)))
        if name == "table-1":  # a network of the table trained from scratch is the same beside whatever other
            assert {column for _, column in found} <= {"teacher", "student from scratch"}
        else:
            assert found == {}
    recipe = published(reproduction(request(name, recipe=("zskt-prior",), images_per_class=(7,))))
    numbers = expected_numbers(name, "cifar10")
    of_ours = {key for key in numbers if "zskt" in " ".join(key) or "200 per" in key[1] or key[1].startswith("M = ")}
    assert recipe == {key: number for key, number in numbers.items() if key not in of_ours}


def test_one_published_pair_of_table_1_has_its_numbers() -> None:
    whole = expected_numbers("table-1", "cifar10")
    for model, student in (("wrn-16-2", "wrn-16-1"), ("wrn-40-1", "wrn-16-2")):
        found = published(reproduction(request("table-1", model=model, student=student)))
        assert found == {key: number for key, number in whole.items() if key[0] == f"{model} → {student}"}


# Budgets


@pytest.mark.parametrize(
    ("data", "updates", "steps"),
    [
        ("cifar10", 200 * 391, 80_000),  # 390 batches of 128 and one of 80
        ("svhn", 100 * 573, 50_000),  # 572 and one of 41
        ("mnist", 10 * 469, 25_000),  # 468 and one of 96
        ("fashion-mnist", 200 * 469, 80_000),
        ("images", 200 * 391, 80_000),
    ],
)
def test_budgets_are_the_published_ones(data: str, updates: int, steps: int) -> None:
    assert published_budget(blank(data)) == Budget(updates, steps, 1_000)


def test_the_commit_is_ours_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed into an environment inside somebody's repository, zskt is no part of it."""
    for place in ("GLOBAL", "SYSTEM"):  # no hooks and signatures of whoever runs this
        monkeypatch.setenv(f"GIT_CONFIG_{place}", os.devnull)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    inside = tmp_path / "venv" / "zskt"
    inside.mkdir(parents=True)
    (inside / "runtime.py").touch()
    (tmp_path / ".gitignore").write_text("venv\n")
    for words in (["init", "-q"], ["add", ".gitignore"], ["commit", "-q", "-m", "theirs"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(runtime, "__file__", str(inside / "runtime.py"))
    assert "commit" not in circumstances()
    (tmp_path / "runtime.py").touch()
    subprocess.run([*git, "add", "runtime.py"], check=True)
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "runtime.py"))
    assert "with uncommitted changes" in circumstances()["commit"]


def test_the_published_schedule_reaches_the_jobs() -> None:
    """Cosine and divisions by five are the recipes' and the training's: here it is how long, how fast, on what."""
    made = reproduction(request("table-2"))
    by_name = {job.name: job for job in in_order(made.jobs)}
    teacher = by_name["wrn-40-2-on-all-seed-0"]
    for job in (teacher, by_name["kd-at-wrn-40-2-to-wrn-16-1-on-200-per-class-seed-2"]):
        assert (job.units, job.settings["updates"]) == (78_200, 78_200)
        assert (job.settings["learning_rate"], job.settings["schedule"]) == (0.1, "step")
        assert (job.settings["batch_size"], job.settings["weight_decay"]) == (128, 5e-4)
        assert job.settings["horizontal_flip"]
    assert by_name["zskt-wrn-40-2-to-wrn-16-1-seed-1"].settings["steps"] == 80_000
    belief = by_name["belief-of-zskt-wrn-40-2-to-wrn-16-1-seed-0"]
    assert (belief.settings["images"], belief.settings["steps"]) == (1_000, 100)
    mmrazor = in_order(reproduction(request("mmrazor")).jobs)
    assert {job.settings["steps"] for job in mmrazor if "steps" in job.settings} == {25_000}


@pytest.mark.parametrize("scale", [0.5, 0.01, 1e-9])
def test_the_scale_changes_amounts_of_work_and_nothing_else(scale: float) -> None:
    changes = {"images": 500}
    for name in MADE:
        asked = [request(name, seeds=(0,), scale=s, changes=changes) for s in (1, scale)]
        whole, cut = (in_order(reproduction(each).jobs) for each in asked)
        assert [job.name for job in whole] == [job.name for job in cut]
        for job, less in zip(whole, cut, strict=True):
            belief = job.name.startswith("belief")
            for key in job.settings:
                if key in ("updates", "images") or (key == "steps" and not belief):
                    # fine-tuning takes a tenth of what is left of the updates
                    slack = 1 if "fine-tuned" in job.name else 0.5
                    assert abs(less.settings[key] - scale * job.settings[key]) <= slack or less.settings[key] == 1
                else:
                    assert less.settings[key] == job.settings[key]
            if belief:
                images = less.settings["images"]
                assert (less.settings["steps"], less.units) == (100, math.ceil(images * 9 / 128) * 99)
            else:
                assert less.units == less.settings.get("updates", less.settings.get("steps"))


def test_changes_are_applied_before_the_scale() -> None:
    changes = {"updates": 40, "steps": 60, "images": 80, "learning_rate": 0.7}
    found = request("figure-2", scale=0.1, changes=changes).study("wrn-40-2", "wrn-16-1", steps=25_000).budget
    assert found == Budget(4, 6, 8, 0.7)


# All of them at a tiny size


class Results:
    """Every name, made of ConvNet-4 -> ConvNet-2 in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.worked: list[str] = []
        self.made: dict[str, Reproduction] = {}
        self.result: dict[str, dict[str, Any]] = {}
        for name in MADE:
            self.make(name, (0, 1) if name == "table-1" else (0,))

    def make(self, name: str, seeds: tuple[int, ...]) -> None:
        changes = {"updates": 8, "steps": 2, "images": 2}
        data = coloured(60), coloured(30, seed=1)
        pair = ("convnet-4", "convnet-2")
        asked = Request(name, *data, self.root, None, changes, *pair, images_per_class=(3,), seeds=seeds)
        self.made[name] = reproduction(asked)
        assert run_jobs(in_order(self.made[name].jobs), self.root, math.inf, self.bar) == {}
        facts = {**circumstances(), "seeds": list(seeds), "precision": "fp32"}
        self.result[name] = write_result(self.made[name], self.root, circumstances=facts)

    def bar(self, name: str, unit: str) -> AbstractContextManager[Show]:
        self.worked.append(name)
        return quiet()

    def network(self, job: str) -> zskt.Classifier:
        return load_network(self.root / "parts" / job)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, tiny_recipes: None) -> Results:
    return Results(tmp_path_factory.mktemp("results"))


@pytest.mark.parametrize("name", MADE)
def test_every_cell_is_filled(name: str, results: Results) -> None:
    result = results.result[name]
    assert result["finished"]
    seeds = 2 if name == "table-1" else 1
    for cell in result["cells"]:
        assert len(cell["values"]) == seeds
        assert all(0 <= value <= 1 for value in cell["values"])
        assert cell["mean"] == pytest.approx(np.mean(cell["values"]))
        assert cell["std"] == (None if seeds == 1 else pytest.approx(np.std(cell["values"], ddof=1)))
        assert cell["paper"] is None
    page = (results.root / f"{name}.md").read_text()
    assert "not run" not in page
    assert page.count("\n| ") == 1 + len({cell["row"] for cell in result["cells"]})
    picture = results.root / f"{name}.png"
    assert picture.exists() == name.startswith("figure")
    if picture.exists():
        assert f"]({name}.png)" in page
        with Image.open(picture) as image:
            image.load()


def test_tables_share_their_jobs(results: Results) -> None:
    # seeds 0 and 1 of table 1, four each; KD+AT on all images, three comparisons; figure 2: four more; mmrazor's run
    assert len(results.worked) == len(set(results.worked)) == 2 * 4 + 4 + 4 + 1
    names = {path.name for path in (results.root / "parts").iterdir() if path.is_dir()}
    assert names == set(results.worked)


def test_accuracies_are_those_of_the_networks_named(results: Results) -> None:
    test = coloured(30, seed=1)
    cells = {(cell["row"], cell["column"]): cell["values"] for cell in results.result["figure-2"]["cells"]}
    pair = "convnet-4-to-convnet-2"
    for where, job in {
        ("no teacher", "M = 3"): "convnet-2-on-3-per-class-seed-0",
        ("no teacher", "all"): "convnet-2-on-all-seed-0",
        ("KD+AT", "M = 3"): f"kd-at-{pair}-on-3-per-class-seed-0",
        ("KD+AT", "all"): f"kd-at-{pair}-on-all-seed-0",
        ("KD+AT without CE", "M = 3"): f"kd-at-without-ce-{pair}-on-3-per-class-seed-0",
        ("KD+AT without CE", "all"): f"kd-at-without-ce-{pair}-on-all-seed-0",
        ("zskt", "M = 0"): f"zskt-{pair}-seed-0",
        ("zskt", "M = 3"): f"zskt-{pair}-fine-tuned-on-3-per-class-seed-0",
        ("teacher", "all"): "convnet-4-on-all-seed-0",
    }.items():
        expected = measure(results.network(job), test.images, test.labels)["accuracy"]
        assert cells.pop(where) == [expected]
    assert cells == {}


def test_transition_errors_are_those_of_the_students_named(results: Results) -> None:
    test = coloured(30, seed=1)
    cells = {(cell["row"], cell["column"]): cell["values"] for cell in results.result["table-2"]["cells"]}
    assert results.result["figure-4"]["cells"] == results.result["table-2"]["cells"]
    teacher = results.network("convnet-4-on-all-seed-0")
    pair = "convnet-4-to-convnet-2"
    for row, job in {
        "zero-shot, zskt": f"zskt-{pair}-seed-0",
        "KD+AT, all images": f"kd-at-{pair}-on-all-seed-0",
        "KD+AT, 3 per class": f"kd-at-{pair}-on-3-per-class-seed-0",
    }.items():
        found = zskt.compare(results.network(job), teacher, test.images, test.labels, zskt.Paths(images=2)).measured
        assert cells.pop((row, "mean transition error")) == [found["mean_transition_error"]]
        assert cells.pop((row, "accuracy, %")) == [found["accuracy"]]
        assert cells.pop((row, "agreement with the teacher, %")) == [found["agreement"]]
    assert cells == {}


def test_beliefs_about_pseudo_images_are_the_last_ones(results: Results) -> None:
    last = read_lines(results.root / "parts" / "zskt-convnet-4-to-convnet-2-seed-0" / "metrics.jsonl")[-1]
    found = {cell["column"]: cell["values"] for cell in results.result["figure-3"]["cells"]}
    assert found == {
        "teacher confidence": [last["teacher_confidence"]],
        "student confidence": [last["student_confidence"]],
        "normalised class entropy, teacher": [last["class_entropy"]],
        "normalised class entropy, student": [last["student_class_entropy"]],
    }


def test_noise_in_two_classes_is_counted(results: Results) -> None:
    noise = torch.rand(1000, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    cells = {(cell["row"], cell["column"]): cell["values"] for cell in results.result["figure-5"]["cells"]}
    for spec in ("convnet-4", "convnet-2"):
        network = results.network(f"{spec}-on-all-seed-0")
        with torch.no_grad():
            classes = network(network.normalise(noise)).argmax(dim=1)
        counts = sorted(int((classes == k).sum()) for k in range(3))
        assert cells[spec, "noise in the two most common classes, %"] == [pytest.approx((counts[1] + counts[2]) / 1000)]
        facts = read_json(results.root / "parts" / f"{spec}-on-all-seed-0" / "teacher.json")
        assert cells[spec, "accuracy, %"] == [facts["measured"]["accuracy"]]


def test_figures_are_drawn_from_finished_jobs(results: Results, tmp_path: Path) -> None:
    """Only one of the students is there, or only the teacher."""
    pair = "convnet-4-to-convnet-2"
    there = [f"belief-of-zskt-{pair}-seed-0", f"zskt-{pair}-seed-0", "convnet-4-on-all-seed-0"]
    drawn = {name: 0 for name in MADE}
    for number in range(len(there) + 1):
        if number:
            shutil.copytree(results.root / "parts" / there[-number], tmp_path / "parts" / there[-number])
        for name, made in results.made.items():
            png = made.draw(tmp_path, " (scale 0.5)")
            drawn[name] += png is not None
            assert png is None or png.startswith(b"\x89PNG")
    assert drawn == {name: 0 for name in MADE} | {"figure-2": 2, "figure-3": 2, "figure-4": 1, "figure-5": 3}

"""Tables: means and deviations, missing results, published numbers, the scale of shortened work."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zskt.errors import ZsktError
from zskt.files import write_json
from zskt.paper.jobs import Job
from zskt.paper.tables import Cell, Reproduction, markdown_table, measured, write_result

CIRCUMSTANCES: dict[str, Any] = {
    "date": "2030-01-02",
    "command": "zskt reproduce table-9",
    "commit": "0123abc",
    "versions": {"zskt": "9.9", "torch": "8.8"},
    "hardware": "an abacus, 2 cores",
    "threads": 1,
    "seeds": [3, 1, 4],
    "precision": "fp32",
}


def job(name: str, *needs: Job, units: int = 1_234) -> Job:
    return Job(name, {}, units, "updates", "cross-entropy", lambda: lambda: None, lambda *call: True, needs)


def cell(row: str, column: str, seeds: int = 3, **more: Any) -> Cell:
    """A cell of so many jobs that read their accuracy."""
    jobs = tuple(job(f"{row}-{column}-{seed}".replace(" ", "-")) for seed in range(seeds))
    return Cell(row, column, jobs, measured("accuracy"), **more)


def finish(root: Path, cell: Cell, *values: float) -> list[float]:
    """Measure as many of a cell's jobs as there are values."""
    for each, value in zip(cell.jobs, values, strict=False):
        write_json(each.folder(root) / "belief.json", {"accuracy": value})
    return list(values)


def write(root: Path, *cells: Cell, draw: Callable[[Path, str], bytes | None] | None = None, **more: Any) -> str:
    """The Markdown page of a table."""
    made = Reproduction("table-9", "Table 9: accuracy (%) on images", cells, draw or (lambda root, note: None))
    write_result(made, root, **{"circumstances": CIRCUMSTANCES} | more)
    return (root / "table-9.md").read_text()


def test_a_cell_is_the_mean_and_sample_deviation_over_seeds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for seeds in (2, 3, 10):
        for percent, digits in ((True, 2), (False, 3)):
            found = cell(f"row {seeds} {percent}", "column", seeds, percent=percent, paper="0.5")
            values = finish(tmp_path, found, *rng.random(seeds))
            mean, std = np.mean(values), np.std(values, ddof=1)
            scale = 100 if percent else 1
            assert found.text(tmp_path) == f"{scale * mean:.{digits}f} ± {scale * std:.{digits}f}"
            entry = found.to_json(tmp_path)
            assert entry["values"] == values  # fractions, as everywhere in JSON
            assert entry["mean"] == pytest.approx(mean)
            assert entry["std"] == pytest.approx(std)
            assert entry["paper"] == "0.5"


def test_missing_results_are_marked_and_not_estimated(tmp_path: Path) -> None:
    found = cell("row", "column")
    assert found.text(tmp_path) == "not run"
    assert found.text(tmp_path, {found.jobs[1].name: "it diverged"}) == "failed"
    assert found.text(tmp_path, {"another job": "it diverged"}) == "not run"
    entry = found.to_json(tmp_path)
    assert (entry["values"], entry["mean"], entry["std"]) == ([], None, None)
    finish(tmp_path, found, 0.5)
    assert found.text(tmp_path) == "50.00 (1 of 3 seeds)"
    assert found.text(tmp_path, {found.jobs[2].name: "it diverged"}) == "50.00 (1 of 3 seeds)"
    assert found.to_json(tmp_path)["std"] is None
    finish(tmp_path, found, 0.5, 0.7)
    assert found.text(tmp_path) == "60.00 ± 14.14 (2 of 3 seeds)"
    finish(tmp_path, found, 0.5, 0.7, 0.6)
    assert found.text(tmp_path) == "60.00 ± 10.00"
    alone = cell("one", "seed", 1)
    finish(tmp_path, alone, 0.25)
    assert alone.text(tmp_path) == "25.00"


def test_a_paper_column_appears_only_with_published_numbers(tmp_path: Path) -> None:
    cells = [
        cell("A", "ours alone", 1),
        cell("A", "in the paper", 1, paper="81.71 ± 0.25"),
        cell("B", "in the paper", 1),
        cell("C", "ours alone", 1, percent=False),
    ]
    finish(tmp_path, cells[0], 0.125)
    finish(tmp_path, cells[3], 0.5)
    assert markdown_table(cells, tmp_path) == [
        "|  | ours alone | in the paper | paper |",
        "|---|---|---|---|",
        "| A | 12.50 | not run | 81.71 ± 0.25 |",
        "| B |  | not run |  |",
        "| C | 0.500 |  |  |",
    ]
    assert "paper" not in "".join(markdown_table([cells[0], cells[3]], tmp_path))


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0001])
def test_the_scale_is_in_every_output(scale: float, tmp_path: Path) -> None:
    stamps: list[str] = []

    def draw(root: Path, note: str) -> bytes:
        stamps.append(note)
        return b"a picture"

    page = write(tmp_path, cell("A", "B"), draw=draw, scale=scale)
    result = json.loads((tmp_path / "table-9.json").read_text())
    stamp = f" (scale {scale:g})"
    if scale == 1:
        assert "scale" not in page + json.dumps(result) + "".join(stamps)
    else:
        assert page.splitlines()[0] == f"# Table 9: accuracy (%) on images{stamp}"
        assert result["title"].endswith(stamp)
        assert result["scale"] == scale
        assert stamps == [stamp]


def test_a_result_lists_its_jobs_and_circumstances(tmp_path: Path) -> None:
    teacher = job("teacher", units=5)
    student = Job("student", {}, 70, "pseudo batches", "zskt", lambda: lambda: None, lambda *call: True, (teacher,))
    given = job("given", units=0)
    cells = [Cell("A", "B", (student,), measured("accuracy")), Cell("A", "C", (given,), measured("accuracy"))]
    finish(tmp_path, cells[0], 0.5)
    page = write(tmp_path, *cells)
    result = json.loads((tmp_path / "table-9.json").read_text())
    assert result["parts"] == {
        "teacher": {"units": 5, "unit": "updates"},
        "student": {"units": 70, "unit": "pseudo batches"},
        "given": {"units": 0, "unit": "updates"},
    }
    assert not result["finished"]
    assert [(entry["row"], entry["column"], entry["values"]) for entry in result["cells"]] == [
        ("A", "B", [0.5]),
        ("A", "C", []),
    ]
    assert "5 updates (cross-entropy); 70 pseudo batches (zskt)." in page
    for words in ("seeds 3, 1, 4", "2030-01-02", "`zskt reproduce table-9`", "commit 0123abc", "fp32", "an abacus"):
        assert words in page
    assert "1 threads" not in page
    for key, value in CIRCUMSTANCES.items():
        assert result[key] == value
    finish(tmp_path, cells[1], 0.5)
    write(tmp_path, *cells)
    assert json.loads((tmp_path / "table-9.json").read_text())["finished"]


def test_a_png_is_written_only_if_something_is_drawn(tmp_path: Path) -> None:
    page = write(tmp_path, cell("A", "B"), draw=lambda root, note: None)
    assert not list(tmp_path.glob("*.png"))
    assert "![" not in page
    page = write(tmp_path, cell("A", "B"), draw=lambda root, note: b"a picture")
    assert (tmp_path / "table-9.png").read_bytes() == b"a picture"
    assert "![Table 9: accuracy (%) on images](table-9.png)" in page


def test_failures_are_in_every_output(tmp_path: Path) -> None:
    found = cell("A", "B", 1)
    page = write(tmp_path, found, failed={found.jobs[0].name: "the loss is nan"})
    assert "Failed: A-B-0: the loss is nan" in page
    assert "| A | failed |" in page
    assert json.loads((tmp_path / "table-9.json").read_text())["failed"] == {"A-B-0": "the loss is nan"}
    assert "failed" not in write(tmp_path, found)
    assert "failed" not in (tmp_path / "table-9.json").read_text()


def test_nan_is_refused_and_the_old_result_kept(tmp_path: Path) -> None:
    found = cell("A", "B", 1)
    finish(tmp_path, found, 0.5)
    write(tmp_path, found)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    (found.jobs[0].folder(tmp_path) / "belief.json").write_text(json.dumps({"accuracy": math.nan}))
    with pytest.raises(ZsktError, match="not a finite number"):
        write(tmp_path, found)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_the_table_for_latex_and_one_line_for_each_seed(tmp_path: Path) -> None:
    first, second = cell("a & b -> c_1", "M = 0, %", 2, paper="0.5 ± 0.1"), cell("d", "M = 0, %", 1)
    values = finish(tmp_path, first, 0.25, 0.75)
    write(tmp_path, first, second)
    assert (tmp_path / "table-9.tex").read_text().splitlines() == [
        "% Table 9: accuracy (%) on images",
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r" & M = 0, \% & paper \\",
        r"\midrule",
        r"a \& b -> c\_1 & 50.00 ± 35.36 & 0.5 ± 0.1 \\",
        r"d & not run &  \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    with (tmp_path / "table-9.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["value"]) for line in lines] == values
    assert [line["job"] for line in lines] == [job.name for job in first.jobs]
    assert {(line["row"], line["column"]) for line in lines} == {("a & b -> c_1", "M = 0, %")}

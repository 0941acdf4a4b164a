"""A report: one page that needs nothing else, true numbers, safe whatever runs are called; grids of images."""

import io
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from small import call
from zskt.errors import ZsktError
from zskt.files import write_json, write_text
from zskt.method.config import Config
from zskt.run import report
from zskt.run.plots import image_grid, readable_curves, run_curves, save_image, series
from zskt.run.report import write_report
from zskt.settings import replace, to_toml

pytestmark = pytest.mark.drawn


def line(step: int, **more: Any) -> dict[str, Any]:
    losses = {"generator_loss": [-0.1 * step], "student_loss": [0.5, 0.3 / step]}
    beliefs = {"teacher_confidence": 0.7, "student_confidence": 0.6, "pseudo_agreement": 0.8, "class_entropy": 0.9}
    return {"step": step, **losses, **beliefs, **more}


def make_run(
    folder: Path, accuracy: float | None = 0.5, *, steps: int = 4, finished: bool = True, **facts: Any
) -> Path:
    """A run folder as `distill` leaves it."""
    config = replace(Config(), {"steps": steps, "seed": 3})
    write_text(folder / "config.toml", to_toml(config))
    lines = [line(step) for step in range(1, steps)] + [line(steps, accuracy=accuracy, agreement=0.75)]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(entry) + "\n" for entry in lines))
    for step in range(1, steps + 1):
        save_image(folder / "samples" / f"{step:08d}.png", image_grid(torch.rand(8, 3, 8, 8)))
    if finished:
        measured = {"accuracy": accuracy, "agreement": 0.75}
        facts = {"parameters": 1234567, "measured": measured, "warnings": [], "versions": {"zskt": "9.9"}} | facts
        write_json(folder / "student.json", facts)
    return folder


def page_of(folders: list[Path], path: Path) -> str:
    write_report(folders, path)
    return path.read_text(encoding="utf-8")


def test_a_page_is_self_contained(tmp_path: Path) -> None:
    page = page_of([make_run(tmp_path / "a", steps=20, warnings=["collapse: <one> class"])], tmp_path / "report.html")
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 7  # the curves, and six of twenty samples
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    text = re.sub(r'"data:[^"]*"', '""', page)
    assert not re.search(r"https?:|//|url\(|@import|<script [^>]*src|<link|<iframe", text)
    assert page.startswith("<!doctype html>")
    assert "charset" in text[:80]
    assert [int(step) for step in re.findall(r"step (\d+)<", text)] == [1, 5, 9, 12, 16, 20]  # first and last included
    for words in ("0.5000", "1,234,567", "student.loss.attention", "zskt 9.9", "&lt;one&gt; class"):
        assert words in text
    assert "has not finished" not in text
    assert [p.name for p in tmp_path.iterdir() if not p.is_dir()] == ["report.html"]


def test_the_first_words_say_what_the_student_is(tmp_path: Path) -> None:
    measured = {"accuracy": 0.91, "teacher_accuracy": 0.95, "agreement": 0.925}
    facts: dict[str, Any] = {"model": "wrn-16-1", "teacher_parameters": 4_938_268, "measured": measured}
    page = page_of([make_run(tmp_path / "a", **facts)], tmp_path / "report.html")
    told = (
        "<strong>a</strong>: wrn-16-1 of 1,234,567 parameters, 25% of the teacher&#x27;s; right on 91.00% of the test "
    )
    told += "images (teacher 95.00%); agrees with the teacher on 92.50%; no warnings."
    assert told in page
    assert page.index(told) < page.index("<h2>Result</h2>")
    page = page_of([make_run(tmp_path / "b", None, warnings=["one", "two"])], tmp_path / "report.html")
    assert (
        "<strong>b</strong>: a student of 1,234,567 parameters; agrees with the teacher on 75.00%; 2 warnings, below."
        in page
    )


def test_settings_that_differ_from_the_recipe_come_first(tmp_path: Path) -> None:
    page = page_of([make_run(tmp_path / "a", steps=7, model="wrn-16-1")], tmp_path / "report.html")
    changed, everything = page.split("Settings that differ from the recipe")[1].split("<details>")
    assert re.findall(r"<tr><td>([\w.]+)</td>", changed) == ["steps", "seed"]
    assert "<td>student.loss.attention</td>" in everything
    assert "zskt distill TEACHER --student wrn-16-1 --config a/config.toml --out a-again" in page


def test_names_are_escaped(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / '<b onload="x">&amp;', finished=False), make_run(tmp_path / "plain")]
    text = re.sub(r'"data:[^"]*"', '""', page_of(runs, tmp_path / "report.html"))
    assert "<b" not in text
    assert text.count("&lt;b onload=&quot;x&quot;&gt;&amp;amp;") == 10  # title, headings, four tables, warning, command


@pytest.mark.parametrize("names", [("a$\\frac$", "b"), ("_a", "_b")])
def test_the_legend_takes_any_name(names: tuple[str, str]) -> None:
    assert run_curves({name: [line(1)] for name in names}).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "named"),
    [({"steps": 5}, "steps"), ({"parameters": 9}, "student parameters"), ({"teacher_fingerprint": "x"}, "teacher")],
)
def test_runs_that_are_no_repetitions_have_no_mean(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    same: dict[str, Any] = {"teacher_fingerprint": "y"}
    runs = [make_run(tmp_path / "a", 0.2, **same), make_run(tmp_path / "b", 0.9, **same | change)]
    summary = write_report(runs, tmp_path / "report.html")
    assert summary["accuracy"] == {"values": [0.2, 0.9], "mean": None, "std": None}
    page = (tmp_path / "report.html").read_text()
    assert f"No mean, as the runs differ in {named}." in page
    assert "±" not in page


def test_steps_that_a_budget_chose_do_not_keep_runs_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"{steps}", 0.5, steps=steps) for steps in (4, 5)]
    assert write_report(runs, tmp_path / "report.html")["accuracy"]["mean"] is None
    for folder in runs:
        text = (folder / "config.toml").read_text()
        write_text(folder / "config.toml", text.replace('budget = ""', 'budget = "10m"'))
    assert write_report(runs, tmp_path / "report.html")["accuracy"]["mean"] == 0.5


def test_a_run_without_test_images_says_once_that_nothing_is_known(tmp_path: Path) -> None:
    page = page_of([make_run(tmp_path / "a", None)], tmp_path / "report.html")
    assert page.count("not measured") == 1
    assert "This run: not measured on real images, so nobody knows how good the student is" in page
    assert "nobody knows" not in page_of([make_run(tmp_path / "b")], tmp_path / "report.html")
    page = page_of([make_run(tmp_path / "c"), tmp_path / "a"], tmp_path / "report.html")
    assert '<p class="warning">a: not measured on real images' in page


def test_of_several_runs_a_warning_names_its_own(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", warnings=["collapse: one class"])]
    assert "b: collapse: one class</p>" in page_of(runs, tmp_path / "report.html")


def test_several_runs_give_mean_and_deviation(tmp_path: Path) -> None:
    values = [0.61, 0.65, 0.72]
    runs = [make_run(tmp_path / f"run{i}", value) for i, value in enumerate(values)]
    summary = write_report(runs, tmp_path / "report.html")
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    assert summary["accuracy"]["values"] == values
    assert summary["accuracy"]["mean"] == pytest.approx(mean)
    assert summary["accuracy"]["std"] == pytest.approx(deviation)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"<td>{mean:.4f} ± {deviation:.4f}</td>" in page
    assert all(f"<td>{value:.4f}</td>" in page for value in values)
    alone = write_report(runs[:1], tmp_path / "report.html")
    assert (alone["accuracy"]["mean"], alone["accuracy"]["std"]) == (0.61, None)


def test_an_unfinished_run_says_so_and_has_no_numbers(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "done", 0.6), make_run(tmp_path / "begun", 0.9, finished=False)]
    summary = write_report(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "begun has not finished" in page
    assert "done has not finished" not in page
    assert summary == {}  # a mean over the finished ones alone would not be what the heading says
    assert "±" not in page.replace("mean ± std", "")


def test_curves_of_every_run_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []

    def watched(runs: Any) -> Any:
        drawn.append(runs)
        return readable_curves(runs)

    monkeypatch.setattr(report, "readable_curves", watched)
    write_report([make_run(tmp_path / "seed0" / "run"), make_run(tmp_path / "seed1" / "run")], tmp_path / "report.html")
    assert len(drawn[0]) == 2  # also where two folders have one name


def test_values_can_be_read_off_where_the_picture_has_them(tmp_path: Path) -> None:
    """The place of a value is where the curve's colour is in the picture."""
    ramp: list[dict[str, Any]] = [{"step": step, "accuracy": step / 100} for step in (1, 40, 100)]
    png, panels = readable_curves({"a": ramp})
    (panel,) = [panel for panel in panels if panel["title"] == "test accuracy"]
    assert panel["curves"][0] == {"label": "student", "steps": [1, 40, 100], "values": [0.01, 0.4, 1.0]}
    left, top, width, height = panel["box"]
    with Image.open(io.BytesIO(png)) as image:
        picture = np.asarray(image.convert("RGB")).astype(int)
    rows, columns = picture.shape[:2]
    blue = np.abs(picture - np.array([31, 119, 180])).sum(axis=2) < 60  # C0
    first, last = panel["steps"]
    for step in (20, 40, 70):  # on the straight lines between the points
        x = round(columns * (left + width * (step - first) / (last - first)))
        found = np.flatnonzero(blue[round(rows * top) : round(rows * (top + height)), x])
        assert len(found) > 0
        low, high = (0.01 - 0.05 * 0.99, 1 + 0.05 * 0.99)  # margins of matplotlib
        assert high - (high - low) * found.mean() / (rows * height) == pytest.approx(step / 100, abs=0.02)
    page = page_of([make_run(tmp_path / "<script><b>"), make_run(tmp_path / "b")], tmp_path / "report.html")
    text = page.split('<script type="application/json">')[1].split("</script>")[0]
    assert json.loads(text)[0]["curves"][0]["label"] == "<script><b> last update of a step"


def test_a_report_follows_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path / "a", finished=False)
    page = folder / "report.html"
    seen: list[bool] = []

    def sleep(seconds: float) -> None:
        seen.append('http-equiv="refresh" content="10"' in page.read_text())
        if len(seen) == 2:
            make_run(tmp_path / "b")
            (tmp_path / "b" / "student.json").rename(folder / "student.json")
        if len(seen) == 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    status, out, err = call("report", folder, "--follow")
    assert (status, json.loads(out)["report"]) == (0, str(page)), err
    assert seen == [True, True]
    assert "Ctrl-C ends it" in err
    assert "refresh" not in page.read_text()
    (folder / "student.json").unlink()
    seen[:] = [True] * 3
    assert call("report", folder, "--follow")[0] == 0
    assert len(seen) == 9
    assert "refresh" not in page.read_text()


def test_a_run_is_named_also_from_inside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_run(tmp_path / "inside"))
    assert "inside" in page_of([Path()], tmp_path / "report.html")


def test_pictures_of_other_origin_do_not_matter(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    save_image(folder / "samples" / "mine.png", image_grid(torch.rand(4, 3, 8, 8)))
    assert "Pseudo images" in page_of([folder], tmp_path / "report.html")


def test_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (make_run(tmp_path / "no config") / "config.toml").unlink()
    (make_run(tmp_path / "no metrics") / "metrics.jsonl").unlink()
    for folder in (tmp_path / name for name in ("absent", "empty", "no config", "no metrics")):
        with pytest.raises(ZsktError, match=f"expected a run folder at {folder}"):
            write_report([folder], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_run_of_before_is_refused_as_elsewhere(tmp_path: Path) -> None:
    (make_run(tmp_path / "a") / "config.toml").write_text('device = "cpu"')
    with pytest.raises(ZsktError, match=r"expected format 2 in .*config\.toml, found an earlier one"):
        write_report([tmp_path / "a"], tmp_path / "report.html")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_images_are_placed_pixel_by_pixel(channels: int) -> None:
    images = torch.rand(5, channels, 8, 10, generator=torch.Generator().manual_seed(0))
    grid = np.asarray(image_grid(images, columns=3, smallest=20))  # enlarged three times: 24 x 30 each
    assert grid.shape[:2] == (2 * 25 - 1, 3 * 31 - 1)
    expected = np.full((49, 92, 3 if channels == 3 else 1), 255)
    pixels = images if channels == 3 else images.mean(dim=1, keepdim=True)
    for n in range(5):
        for i, j in np.ndindex(24, 30):
            expected[n // 3 * 25 + i, n % 3 * 31 + j] = np.round(pixels[n, :, i // 3, j // 3].numpy() * 255)
    assert np.array_equal(grid, expected if channels == 3 else expected[:, :, 0])


def test_large_images_are_not_enlarged_and_values_are_clipped(tmp_path: Path) -> None:
    images = torch.tensor([-1.0, 0.0, 0.5, 7.0]).view(4, 1, 1, 1).expand(4, 3, 40, 40)
    save_image(tmp_path / "grid.png", image_grid(images, columns=4))
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (4 * 41 - 1, 40)
        assert [image.getpixel((41 * i + 5, 5)) for i in range(4)] == [(v, v, v) for v in (0, 0, 128, 255)]
        assert image.getpixel((40, 5)) == (255, 255, 255)  # the gap


def test_series_skips_lines_without_the_key() -> None:
    lines: list[dict[str, Any]] = [{"step": 1, "a": 2.0}, {"step": 2}, {"step": 3, "a": 4.0, "b": [5.0, 6.0]}]
    assert series(lines, "a") == ([1, 3], [2.0, 4.0])
    assert series(lines, "b", -1) == ([3], [6.0])
    assert run_curves({"a": []}).startswith(b"\x89PNG")  # nothing measured yet

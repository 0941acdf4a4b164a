"""Plots: readable PNGs of the given numbers, for any number of classes, images and seeds."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from numpy.typing import NDArray
from PIL import Image

from zskt.evaluate.transitions import Transitions, average_curves
from zskt.run import plots
from zskt.run.plots import (
    average_transitions,
    class_histograms,
    few_shot_curves,
    image_grid,
    nature_of_pseudo_data,
    save_image,
    single_transitions,
)

STEPS = 5


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures behind the PNGs."""
    found: list[Figure] = []
    real = plots._png

    def recording(figure: Figure) -> bytes:
        found.append(figure)
        return real(figure)

    monkeypatch.setattr(plots, "_png", recording)
    return found


def test_losses_of_any_name_have_their_panel(drawn: list[Figure]) -> None:
    plots.run_curves({"run": [{"step": 1, "critic_loss": [3.0], "student_loss": [2.0]}]})
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert (len(titles), titles[0], titles[-1]) == (7, "student loss", "critic loss")
    assert drawn[0].axes[-1].lines[0].get_ydata() == [3.0]


def pixels(png: bytes) -> NDArray[np.uint8]:
    """The pixels (H, W, 3) of a PNG that is large enough and not blank."""
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        found = np.asarray(image.convert("RGB"))
    assert min(found.shape[:2]) >= 150
    assert found.std() > 5
    return found


def transitions(classes: int, images: int, size: tuple[int, int, int] = (3, 16, 16)) -> Transitions:
    """Random curves of so many images."""
    rng = torch.Generator().manual_seed(0)
    curves = torch.rand(2, images, classes - 1, STEPS, generator=rng)
    first, second = curves.mean(dim=2).double()
    gaps = (curves[0] - curves[1]).abs().mean(dim=1).double()
    starts = torch.randint(classes, (images,), generator=rng)
    pictures = torch.randint(0, 256, (min(8, images), *size), generator=rng, dtype=torch.uint8)
    return Transitions(first, second, gaps, starts, curves[:, :8], pictures)


def legend_of(legend: Legend | None) -> list[str]:
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def lines_of(axes: Any) -> list[NDArray[Any]]:
    """The values of every line that has some."""
    return [np.asarray(line.get_ydata()) for line in axes.lines if len(line.get_ydata())]


@pytest.mark.parametrize(("panels", "images"), [(1, 1), (4, 6)])
def test_average_transitions_show_means_and_two_standard_errors(panels: int, images: int, drawn: list[Figure]) -> None:
    found = transitions(4, images)
    shown = {f"panel {i}\nMTE 0.123": average_curves(found) for i in range(panels)}
    pixels(average_transitions(shown, ("student", "teacher")))
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == list(shown)
    for axes in figure.axes:
        for line, band, curves in zip(lines_of(axes), axes.collections, (found.first, found.second), strict=True):
            assert line == pytest.approx(curves.mean(dim=0).tolist())
            error = np.std(curves.numpy(), axis=0, ddof=1) / images**0.5 if images > 1 else np.zeros(STEPS)
            edges = np.asarray(band.get_paths()[0].vertices)[:, 1]
            assert edges.max() == pytest.approx((line + 2 * error).max())
            assert edges.min() == pytest.approx((line - 2 * error).min())
    assert legend_of(figure.axes[0].get_legend()) == ["student", "teacher"]


@pytest.mark.parametrize(
    ("classes", "images", "size"),
    [(2, 1, (1, 12, 12)), (2, 12, (3, 16, 16)), (4, 5, (3, 16, 16)), (30, 1, (3, 16, 16)), (30, 12, (1, 12, 12))],
)
def test_single_transitions_show_the_class_they_name(
    classes: int, images: int, size: tuple[int, int, int], drawn: list[Figure]
) -> None:
    found = transitions(classes, images, size)
    names = [f"class {k}" for k in range(classes)] if images > 1 else None
    pixels(single_transitions(found, ("one", "other"), names))
    (figure,) = drawn
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert len(panels) == min(8, images)
    targets = set()
    for i, axes in enumerate(panels):
        start, target = (int(word.split()[-1]) for word in axes.get_title().split(" → "))
        assert start == found.starts[i]
        assert start != target
        turn = (target - start - 1) % classes
        targets.add(turn)
        for line, curve in zip(lines_of(axes), found.examples[:, i, turn], strict=True):
            assert line == pytest.approx(curve.tolist())
    assert len(targets) == min(len(panels), classes - 1)  # as many other classes as there are panels for
    (legend,) = figure.legends
    assert legend_of(legend) == ["one", "other"]


@pytest.mark.parametrize("as_fractions", [True, False])
def test_single_transitions_show_the_image(as_fractions: bool, drawn: list[Figure]) -> None:
    found = transitions(3, 1)
    images = found.images / 255 if as_fractions else found.images
    single_transitions(dataclasses.replace(found, images=images), ("one", "other"))
    (inset,) = drawn[0].axes[0].child_axes
    shown = np.asarray(inset.images[0].get_array())[::2, ::2][:16, :16]  # enlarged twice
    assert np.array_equal(shown, found.images[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("name", ["_hidden", "a$\\frac$", "a$b", "<b>"])
def test_any_name_is_shown_as_it_is(name: str, drawn: list[Figure]) -> None:
    """Names of folders stand for networks and classes."""
    found = transitions(3, 2)
    pixels(average_transitions({"a title": average_curves(found)}, (name, "b")))
    pixels(single_transitions(found, (name, "b"), (name, "b", "c")))
    pixels(class_histograms({"network": (1, 2, 3)}, (name, "b", "c"), "a title"))
    pixels(few_shot_curves({"student": {0: [0.5]}}, {}, name))
    average, single = drawn[:2]
    for legend in (average.axes[0].get_legend(), single.legends[0]):
        assert [text.strip() for text in legend_of(legend)] == [name, "b"]


@pytest.mark.parametrize("seeds", [1, 3])
def test_few_shot_curves_are_means_and_deviations(seeds: int, drawn: list[Figure]) -> None:
    rng = np.random.default_rng(0)
    points = {float(m): rng.random(seeds).tolist() for m in (100, 0, 10, 25)}
    names = ("no teacher", "KD+AT", "KD+AT without CE", "teacher", "x", "y")
    levels = {name: rng.random(seeds).tolist() for name in names}
    pixels(few_shot_curves({"zskt": points, "one point": {10.0: [0.5] * seeds}}, levels, "a title"))
    (axes,) = drawn[0].axes
    (curve, _, (bars,)), *_ = axes.containers
    assert curve.get_xdata().tolist() == [0, 10, 25, 100]
    values = [np.array(points[m]) * 100 for m in (0, 10, 25, 100)]
    assert curve.get_ydata() == pytest.approx([value.mean() for value in values])
    lengths = [segment[1, 1] - segment[0, 1] for segment in bars.get_segments()]
    assert lengths == pytest.approx([2 * value.std(ddof=1) if seeds > 1 else 0 for value in values])
    flat = [values[0] for values in lines_of(axes) if len(values) == 2]
    assert flat == pytest.approx([100 * np.mean(value) for value in levels.values()])
    shown = ["zskt", "one point", *(f"{name}, all images" for name in levels)]
    assert sorted(legend_of(axes.get_legend())) == sorted(shown)


@pytest.mark.parametrize(("classes", "networks"), [(2, 1), (10, 5), (30, 2)])
def test_class_histograms_show_shares(classes: int, networks: int, drawn: list[Figure]) -> None:
    rng = np.random.default_rng(0)
    counts = {f"network {i}": rng.multinomial(1000, [1 / classes] * classes).tolist() for i in range(networks)}
    names = tuple(f"a class with a long name {k}" for k in range(classes))
    for class_names in (names, None):
        pixels(class_histograms(counts, class_names, "a title"))
    for figure in drawn:
        for axes, (name, numbers) in zip(figure.axes, counts.items(), strict=True):
            assert [bar.get_height() for bar in axes.patches] == pytest.approx([n / 1000 for n in numbers])  # type: ignore[attr-defined]
            assert lines_of(axes)[0] == pytest.approx([1 / classes] * 2)  # even
            assert axes.get_ylabel() == name


def run_lines(classes: int, count: int, *, sparse: bool = False) -> list[dict[str, Any]]:
    """Lines of a run's log: step s has s teacher's images in every class but the first; every other one is short."""
    lines: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        beliefs = {f"{who}_confidence": step / (count + 1) for who in ("teacher", "student")}
        counts = {"class_counts": [0] + [step] * (classes - 1), "student_class_counts": [step] * classes}
        lines.append({"step": step} if sparse and step % 2 == 0 else {"step": step, **beliefs, **counts})
    return lines


@pytest.mark.parametrize(("classes", "lines", "samples"), [(2, 1, 0), (2, 20, 20), (30, 1, 1), (30, 20, 3)])
def test_the_nature_of_pseudo_data(classes: int, lines: int, samples: int, tmp_path: Path, drawn: list[Figure]) -> None:
    paths = [tmp_path / f"{step:08d}.png" for step in range(1, samples + 1)]
    for path in paths:
        save_image(path, image_grid(torch.rand(8, 1, 12, 12)))
    log = run_lines(classes, lines, sparse=True)
    pixels(nature_of_pseudo_data(log, paths, None, "a title"))
    (figure,) = drawn
    beliefs, teacher, student, *pictures = figure.axes
    for line in lines_of(beliefs):
        assert line == pytest.approx([entry["teacher_confidence"] for entry in log if len(entry) > 1])
    even = [1 / (classes - 1)] * (classes - 1)
    assert [bar.get_height() for bar in teacher.patches] == pytest.approx([0, *even])  # type: ignore[attr-defined]
    assert [bar.get_height() for bar in student.patches] == pytest.approx([1 / classes] * classes)  # type: ignore[attr-defined]
    titles = [axes.get_title() for axes in pictures if axes.images]
    assert len(titles) == min(4, samples)
    if samples > 1:
        assert (titles[0], titles[-1]) == ("step 1", f"step {samples}")


def test_only_the_last_fifth_of_a_run_counts(drawn: list[Figure]) -> None:
    early: list[dict[str, Any]] = [
        {"step": s, "class_counts": [9, 0], "student_class_counts": [9, 0]} for s in range(8)
    ]
    late: list[dict[str, Any]] = [{"step": s, "class_counts": [1, 3], "student_class_counts": [0, 4]} for s in (8, 9)]
    nature_of_pseudo_data(early + late, [], ("cat", "dog"), "a title")
    heights = [[bar.get_height() for bar in axes.patches] for axes in drawn[0].axes[1:3]]  # type: ignore[attr-defined]
    assert heights == [[0.25, 0.75], [0, 1]]
    assert [label.get_text() for label in drawn[0].axes[1].get_xticklabels()] == ["cat", "dog"]


def test_curves_survive_json() -> None:
    """The curves in a job's file are what is drawn."""
    curves = average_curves(transitions(3, 4))
    again = json.loads(json.dumps(curves))
    assert average_transitions({"a": again}, "ab") == average_transitions({"a": curves}, "ab")


def test_global_settings_are_unchanged() -> None:
    before = dict(matplotlib.rcParams)
    average_transitions({"a": average_curves(transitions(3, 4))}, "ab")
    class_histograms({"a": [1, 2]}, None, "a title")
    assert dict(matplotlib.rcParams) == before

"""PNG figures: curves over a run's steps, grids of pseudo images, transition curves."""

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from zskt.files import replacing
from zskt.transitions import Transitions

Lines = Sequence[Mapping[str, Any]]


def styled() -> AbstractContextManager[None]:
    """Small print and faint grids, without changing the settings of the process."""
    return matplotlib.rc_context(
        {"font.size": 8, "axes.titlesize": 8, "axes.grid": True, "grid.alpha": 0.3, "legend.fontsize": 7}
    )


def image_grid(images: Tensor, *, columns: int = 8, smallest: int = 32) -> Image.Image:
    """Images (N, C, H, W) in [0, 1] side by side, enlarged to at least `smallest` pixels each, one pixel apart.

    One channel is shown grey, three in colour; of any other number the mean.
    """
    n, channels, height, width = images.shape
    if channels not in (1, 3):
        images = images.mean(dim=1, keepdim=True)
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte()  # (N, C, H, W)
    factor = max(1, -(-smallest // min(height, width)))
    tiles = pixels.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3).permute(0, 2, 3, 1).numpy()
    rows = -(-n // columns)
    h, w = height * factor + 1, width * factor + 1
    canvas = np.full((rows * h - 1, columns * w - 1, tiles.shape[3]), 255, dtype=np.uint8)
    for i, tile in enumerate(tiles):
        top, left = (i // columns) * h, (i % columns) * w
        canvas[top : top + h - 1, left : left + w - 1] = tile
    return Image.fromarray(canvas.squeeze(2) if canvas.shape[2] == 1 else canvas)


def save_image(path: Path, image: Image.Image) -> None:
    """Write a PNG, or nothing."""
    with replacing(path) as file:
        image.save(file, format="PNG")


def series(lines: Lines, key: str, pick: int | None = None) -> tuple[list[float], list[float]]:
    """Steps and values of `key` where the lines have it; `pick` takes one entry of a list."""
    found = [(line["step"], line[key] if pick is None else line[key][pick]) for line in lines if key in line]
    return [step for step, _ in found], [value for _, value in found]


PANELS: dict[str, dict[str, tuple[str, int | None]]] = {
    "student loss": {"last update of a step": ("student_loss", -1), "first": ("student_loss", 0)},
    "generator loss": {"": ("generator_loss", -1)},
    "confidence on pseudo images": {"teacher": ("teacher_confidence", None), "student": ("student_confidence", None)},
    "spread over pseudo classes (1 = uniform)": {"": ("class_spread", None)},
    "test accuracy": {"student": ("accuracy", None), "teacher": ("teacher_accuracy", None)},
    "agreement with the teacher": {
        "on test images": ("agreement", None),
        "on pseudo images": ("pseudo_agreement", None),
    },
}
"""title -> label -> key in metrics.jsonl, and which entry where it is a list"""


def run_curves(runs: Mapping[str, Lines]) -> bytes:
    """A PNG of losses, confidences, class spread and accuracy over the steps of one or several runs."""
    with styled():
        figure = Figure(figsize=(10, 5), layout="constrained")
        figure.subplots(2, 3)
        for axes, (title, curves) in zip(figure.axes, PANELS.items(), strict=True):
            measured = False
            for (label, (key, pick)), style in zip(curves.items(), ("-", ":"), strict=False):
                for i, lines in enumerate(runs.values()):
                    steps, values = series(lines, key, pick)
                    axes.plot(steps, values, style, color=f"C{i % 10}", linewidth=1)
                    measured |= bool(steps)
                axes.plot([], [], style, color="black", linewidth=1, label=label)
            axes.set_title(title)
            axes.set_xlabel("step")
            if "loss" not in title and "test" not in title:
                axes.set_ylim(-0.03, 1.03)
            if len(curves) > 1:
                axes.legend()
            if not measured:
                axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="0.5")
        if len(runs) > 1:
            generator = figure.axes[1]  # the panel with room for the names of the runs
            generator.legend(generator.lines[: len(runs)], [name.replace("$", r"\$") for name in runs])
        return _png(figure)


def average_transitions(transitions: Transitions, names: Sequence[str], note: str = "") -> bytes:
    """A PNG of both networks' mean probability of the target class over the steps, with 2 standard errors over images.

    ZSKT, figure 4. `names` are the two networks'; `note` stands in the title.
    """
    with styled():
        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axes = figure.subplots()
        for curves, name, style in zip((transitions.first, transitions.second), names, ("-", "--"), strict=True):
            mean = curves.mean(dim=0)  # (S,)
            error = 2 * curves.std(dim=0, correction=min(1, len(curves) - 1)) / len(curves) ** 0.5  # (S,)
            steps = range(len(mean))
            axes.plot(steps, mean, style, label=name)
            axes.fill_between(steps, mean - error, mean + error, alpha=0.25)
        axes.set_xlabel("step k")
        axes.set_ylabel("probability of the target class")
        axes.set_ylim(-0.03, 1.03)
        axes.legend()
        axes.set_title(f"mean transition error {transitions.error:.3f}, {len(transitions.gaps):,} images{note}")
        return _png(figure)


def single_transitions(
    transitions: Transitions, names: Sequence[str], class_names: Sequence[str] | None = None, note: str = ""
) -> bytes:
    """A PNG of single transition curves: eight images at most, each towards one other class."""
    _, count, targets, steps = transitions.examples.shape
    columns = min(4, count)
    rows = -(-count // columns)
    with styled():
        figure = Figure(figsize=(2.6 * columns, 2.2 * rows + 0.5), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
        for axes in panels[count:]:
            axes.set_axis_off()
        for i, axes in enumerate(panels[:count]):
            start = int(transitions.starts[i])
            turn = i % targets
            target = (start + 1 + turn) % (targets + 1)
            for curves, style in zip(transitions.examples[:, i, turn], ("-", "--"), strict=True):
                axes.plot(range(steps), curves, style)
            axes.set_ylim(-0.03, 1.03)
            words = [class_names[k] if class_names else str(k) for k in (start, target)]
            axes.set_title(" → ".join(words))
            inset = axes.inset_axes((0.02, 0.66, 0.32, 0.32))
            inset.imshow(np.asarray(image_grid(_fractions(transitions.images[i : i + 1]), columns=1)), cmap="gray")
            inset.set_axis_off()
        figure.legend(panels[0].lines, names, loc="outside lower center", ncols=2)
        figure.supylabel("probability of the target class", fontsize=8)
        figure.suptitle(f"Single transitions over {steps} steps{note}", fontsize=9)
        return _png(figure)


def _fractions(images: Tensor) -> Tensor:
    return images / 255 if images.dtype == torch.uint8 else images


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()

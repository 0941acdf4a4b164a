"""PNG figures of a run: curves over its steps, and grids of pseudo images."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from zskt.files import replacing

Lines = Sequence[Mapping[str, Any]]


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
    with matplotlib.rc_context({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3}):
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
            axes.set_title(title, fontsize=8)
            axes.set_xlabel("step")
            if "loss" not in title and "test" not in title:
                axes.set_ylim(-0.03, 1.03)
            if len(curves) > 1:
                axes.legend(fontsize=7)
            if not measured:
                axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="0.5")
        if len(runs) > 1:
            generator = figure.axes[1]  # the panel with room for the names of the runs
            generator.legend(generator.lines[: len(runs)], [name.replace("$", r"\$") for name in runs], fontsize=7)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()

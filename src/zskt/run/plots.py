"""Plots as PNGs: curves over a run's steps, grids of pseudo images, transition curves."""

import io
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from zskt.errors import printable, short
from zskt.evaluate.transitions import Transitions
from zskt.files import replacing

Lines = Sequence[Mapping[str, Any]]

CAPTION_LINE = 12  # pixels from one line of a caption to the next


def styled() -> AbstractContextManager[None]:
    """Small fonts, faint grids, no math in names; matplotlib's global settings stay as they are."""
    return matplotlib.rc_context(
        {
            "text.parse_math": False,
            "font.size": 8,
            "axes.titlesize": 8,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "legend.fontsize": 7,
        }
    )


def visible(name: object) -> str:
    """A name to be drawn: short, without control characters or the underscore by which matplotlib hides it."""
    line = short(name, 60)
    return f" {line}" if line.startswith("_") else line


def image_grid(images: Tensor, *, columns: int = 8, smallest: int = 32, captions: Sequence[str] = ()) -> Image.Image:
    """Images (N, C, H, W) in [0, 1] side by side, one pixel apart, enlarged to at least `smallest` pixels each.

    One channel is greyscale, three are colour, and of any other number the mean is shown. `captions` may have several
    lines and go below the images.
    """
    n, channels, height, width = images.shape
    if channels not in (1, 3):
        images = images.mean(dim=1, keepdim=True)
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte()  # (N, C, H, W)
    factor = max(1, -(-smallest // min(height, width)))
    tiles = pixels.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3).permute(0, 2, 3, 1).numpy()
    rows = -(-n // columns)
    below = CAPTION_LINE * max((caption.count("\n") + 1 for caption in captions), default=0)
    h, w = height * factor + below + 1, width * factor + 1
    canvas = np.full((rows * h - 1, columns * w - 1, tiles.shape[3]), 255, dtype=np.uint8)
    corners = [((i // columns) * h, (i % columns) * w) for i in range(n)]
    for (top, left), tile in zip(corners, tiles, strict=True):
        canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    grid = Image.fromarray(canvas.squeeze(2) if canvas.shape[2] == 1 else canvas)
    if captions:
        draw, font = ImageDraw.Draw(grid), ImageFont.load_default(CAPTION_LINE - 1)
        for (top, left), caption in zip(corners, captions, strict=True):
            draw.multiline_text((left + 1, top + height * factor), caption, fill="black", font=font, spacing=1)
    return grid


def believed_grid(
    images: Tensor, beliefs: Mapping[str, Tensor], class_names: Sequence[str] | None = None, *, columns: int = 8
) -> Image.Image:
    """Images (N, C, H, W) in [0, 1] with predictions below; `beliefs` maps a letter per network to logits (N, K)."""
    captions = [""] * len(images)
    for letter, logits in beliefs.items():
        confidence, classes = logits.float().softmax(dim=1).cpu().max(dim=1)  # (N,), (N,)
        for i, (probability, k) in enumerate(zip(confidence.tolist(), classes.tolist(), strict=True)):
            name = printable(class_names[k])[:6] if class_names else str(k)
            captions[i] += f"{letter} {name}: {100 * probability:.0f}%\n"
    return image_grid(images, columns=columns, smallest=72, captions=[caption.rstrip() for caption in captions])


def save_image(path: Path, image: Image.Image) -> None:
    """Write a PNG, completely or not at all."""
    with replacing(path) as file:
        image.save(file, format="PNG")


def series(lines: Lines, key: str, pick: int | None = None) -> tuple[list[float], list[float]]:
    """Steps and values of `key` in the lines that have it; `pick` selects an entry if the values are lists."""
    found = [(line["step"], line[key] if pick is None else line[key][pick]) for line in lines if key in line]
    return [step for step, _ in found], [value for _, value in found]


LEVELS = ("--", ":", "-.", (0, (5, 1)), (0, (1, 3)))  # line styles of horizontal lines

PANELS: dict[str, dict[str, tuple[str, int | None]]] = {
    "student loss": {"last update of a step": ("student_loss", -1), "first": ("student_loss", 0)},
    "generator loss": {"": ("generator_loss", -1)},
    "confidence on pseudo images": {"teacher": ("teacher_confidence", None), "student": ("student_confidence", None)},
    "normalised class entropy (1 = uniform)": {
        "teacher": ("class_entropy", None),
        "student": ("student_class_entropy", None),
    },
    "test accuracy": {"student": ("accuracy", None), "teacher": ("teacher_accuracy", None)},
    "agreement with the teacher": {
        "on test images": ("agreement", None),
        "on pseudo images": ("pseudo_agreement", None),
    },
}
"""title -> label -> key in metrics.jsonl, and which entry if its values are lists"""


def run_curves(runs: Mapping[str, Lines]) -> bytes:
    """A PNG of losses, confidences, class entropy and accuracy over the steps of one or several runs."""
    return readable_curves(runs)[0]


def readable_curves(runs: Mapping[str, Lines]) -> tuple[bytes, list[dict[str, Any]]]:
    """The PNG of `run_curves`, and what a page needs to read values off it: a dictionary for each panel.

    `box` is left, top, width and height of the axes in fractions of the picture, `steps` the first and last step shown;
    each of the `curves` has a label, its steps and its values.
    """
    panels = dict(PANELS)
    readable: list[dict[str, Any]] = []
    for key in sorted({key for lines in runs.values() for line in lines for key in line if key.endswith("_loss")}):
        panels.setdefault(key.replace("_", " "), {"": (key, -1)})
    rows = -(-len(panels) // 3)
    with styled():
        figure = Figure(figsize=(10, 2.5 * rows), layout="constrained")
        for unused in figure.subplots(rows, 3).flatten()[len(panels) :]:
            unused.remove()
        for axes, (title, curves) in zip(figure.axes, panels.items(), strict=True):
            measured = False
            drawn: list[dict[str, Any]] = []
            for (label, (key, pick)), style in zip(curves.items(), ("-", ":"), strict=False):
                for i, (name, lines) in enumerate(runs.items()):
                    steps, values = series(lines, key, pick)
                    words = " ".join(word for word in (printable(name) if len(runs) > 1 else "", label) if word)
                    drawn.append(
                        {"label": words, "steps": steps, "values": [float(f"{value:.4g}") for value in values]}
                    )
                    axes.plot(steps, values, style, color=f"C{i % 10}", linewidth=1)
                    measured |= bool(steps)
                axes.plot([], [], style, color="black", linewidth=1, label=label)
            axes.set(title=title, xlabel="step")
            if "loss" not in title and "test" not in title:
                axes.set_ylim(-0.03, 1.03)
            if len(curves) > 1:
                axes.legend()
            if not measured:
                axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="0.5")
            readable.append({"title": title, "curves": drawn})
        if len(runs) > 1:
            generator = figure.axes[1]  # the panel with room for the runs' names
            generator.legend(generator.lines[: len(runs)], [visible(name) for name in runs])
        png = _png(figure)
    for axes, panel in zip(figure.axes, readable, strict=True):
        place = axes.get_position()  # final once it is drawn
        panel["box"] = [round(x, 4) for x in (place.x0, 1 - place.y1, place.width, place.height)]
        panel["steps"] = list(axes.get_xlim())
    return png, readable


def average_transitions(panels: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> bytes:
    """A PNG of two networks' mean probability of the target class over the steps, with 2 standard errors over images.

    `panels` maps a title to the result of `average_curves`; `names` are the two networks'. ZSKT, figure 4.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with styled():
        figure = Figure(figsize=(1 + 3.3 * columns, 0.4 + 2.8 * rows), layout="constrained")
        for axes, (title, curves) in zip(_panels(figure, len(panels), columns), panels.items(), strict=True):
            for key, name, style in zip(("first", "second"), names, ("-", "--"), strict=True):
                mean, error = np.array(curves[key]), 2 * np.array(curves[f"{key}_standard_error"])  # (S,) each
                steps = np.arange(len(mean))
                axes.plot(steps, mean, style, label=visible(name))
                axes.fill_between(steps, mean - error, mean + error, alpha=0.25)
            axes.set(title=title, ylim=(-0.03, 1.03))
        figure.supxlabel("step k", fontsize=8)
        figure.supylabel("probability of the target class", fontsize=8)
        figure.axes[0].legend()
        return _png(figure)


def single_transitions(
    transitions: Transitions, names: Sequence[str], class_names: Sequence[str] | None = None
) -> bytes:
    """A PNG of individual transition curves: at most eight images, each towards one other class."""
    _, count, targets, steps = transitions.examples.shape
    columns = min(4, count)
    rows = -(-count // columns)
    with styled():
        figure = Figure(figsize=(2.6 * columns, 2.2 * rows + 0.5), layout="constrained")
        panels = _panels(figure, count, columns)
        for i, axes in enumerate(panels):
            start = int(transitions.starts[i])
            turn = i % targets
            target = (start + 1 + turn) % (targets + 1)
            for curves, style in zip(transitions.examples[:, i, turn], ("-", "--"), strict=True):
                axes.plot(range(steps), curves, style)
            words = [visible(class_names[k]) if class_names else str(k) for k in (start, target)]
            axes.set(title=" → ".join(words), ylim=(-0.03, 1.03))
            inset = axes.inset_axes((0.02, 0.66, 0.32, 0.32))
            image = transitions.images[i : i + 1]  # (1, C, H, W)
            fraction = image / 255 if image.dtype == torch.uint8 else image
            inset.imshow(np.asarray(image_grid(fraction, columns=1)), cmap="gray")
            inset.set_axis_off()
        figure.legend(panels[0].lines, [visible(name) for name in names], loc="outside lower center", ncols=2)
        figure.supylabel("probability of the target class", fontsize=8)
        figure.suptitle(f"Single transitions over {steps} steps", fontsize=9)
        return _png(figure)


def _panels(figure: Figure, count: int, columns: int) -> list[Axes]:
    """So many panels in rows of `columns`, with shared axes."""
    axes = figure.subplots(-(-count // columns), columns, squeeze=False, sharex=True, sharey=True).flatten()
    for unused in axes[count:]:
        unused.remove()
    return list(axes[:count])


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # about letters that matplotlib's font does not have: they become boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def few_shot_curves(
    lines: Mapping[str, Mapping[float, Sequence[float]]], levels: Mapping[str, Sequence[float]], title: str
) -> bytes:
    """A PNG of test accuracy against real images per class, mean ± std over seeds. ZSKT, figure 2.

    `lines` maps label -> images per class -> accuracies; `levels` maps label -> accuracies with all images.
    """
    with styled():
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for label, points in lines.items():
            amounts = sorted(points)
            mean = np.array([100 * np.mean(points[m]) for m in amounts])
            std = np.array([100 * np.std(points[m], ddof=1) if len(points[m]) > 1 else 0 for m in amounts])
            axes.errorbar(amounts, mean, std, marker="o", markersize=3, capsize=2, linewidth=1, label=visible(label))
        for i, (label, values) in enumerate(levels.items()):
            axes.axhline(100 * float(np.mean(values)), color="0.4", linewidth=1, linestyle=LEVELS[i % len(LEVELS)])
            axes.plot([], [], color="0.4", linewidth=1, linestyle=LEVELS[i % len(LEVELS)], label=f"{label}, all images")
        axes.set(title=visible(title), xlabel="real images per class, M", ylabel="test accuracy, %")
        axes.legend()
        return _png(figure)


def class_histograms(counts: Mapping[str, Sequence[int]], class_names: Sequence[str] | None, title: str) -> bytes:
    """A PNG of the share of images in each class: one panel for each label -> counts (K numbers)."""
    with styled():
        figure = Figure(figsize=(6, 0.6 + 1.1 * len(counts)), layout="constrained")
        panels = figure.subplots(len(counts), 1, squeeze=False, sharex=True).flatten()
        for axes, (label, numbers) in zip(panels, counts.items(), strict=True):
            _histogram(axes, numbers, class_names)
            axes.set_ylabel(visible(label), rotation=0, ha="right", va="center")
        figure.suptitle(visible(title), fontsize=9)
        return _png(figure)


def recent_classes(lines: Lines) -> dict[str, list[int]]:
    """Both networks' predicted classes on the pseudo images, counted over the last fifth of a run's lines."""
    found = {}
    for who, key in (("teacher", "class_counts"), ("student", "student_class_counts")):
        if counts := [line[key] for line in lines if key in line]:
            found[who] = np.sum(counts[-max(1, len(counts) // 5) :], axis=0).tolist()
    return found


def run_classes(lines: Lines, class_names: Sequence[str] | None) -> bytes | None:
    """A PNG of the classes of the pseudo images at the end of a run; None if nothing was logged."""
    counts = recent_classes(lines)
    return class_histograms(counts, class_names, "share of pseudo images, last fifth of the run") if counts else None


def nature_of_pseudo_data(
    lines: Lines, samples: Sequence[Path], class_names: Sequence[str] | None, title: str
) -> bytes:
    """A PNG of a run's pseudo images: confidence over the steps, final classes, samples over time. ZSKT, figure 3."""
    shown = [samples[round(i * (len(samples) - 1) / 3)] for i in range(4)] if len(samples) > 4 else samples
    with styled():
        figure = Figure(figsize=(9, 5.4), layout="constrained")
        upper, lower = figure.subfigures(2, 1, squeeze=False).flatten()
        beliefs, *histograms = upper.subplots(1, 3)
        for who, style in (("teacher", "-"), ("student", "--")):
            beliefs.plot(*series(lines, f"{who}_confidence"), style, label=who)
        beliefs.set(title="mean maximum probability", xlabel="step", ylim=(0, 1.03))
        beliefs.legend()
        for axes, (who, counts) in zip(histograms, recent_classes(lines).items(), strict=False):
            _histogram(axes, counts, class_names)
            axes.set_title(f"classes of the pseudo images, {who}")
        for axes, path in zip(lower.subplots(1, max(1, len(shown)), squeeze=False).flatten(), shown, strict=False):
            with Image.open(path) as image:
                quarter = (0, 0, image.width // 2, image.height // 2)  # all images would be too small to see
                axes.imshow(np.asarray(image.convert("RGB").crop(quarter)))
            axes.set_title(f"step {int(path.stem):,}")
            axes.set_axis_off()
        figure.suptitle(visible(title), fontsize=9)
        return _png(figure)


def _histogram(axes: Axes, counts: Sequence[int], class_names: Sequence[str] | None) -> None:
    """Shares of the classes as bars, the uniform share as a line; names only if there is room for them."""
    classes = range(len(counts))
    axes.bar(classes, np.array(counts) / max(1, sum(counts)), width=0.8)
    axes.axhline(1 / len(counts), color="0.4", linewidth=1, linestyle=":")
    axes.set_ylim(0, None)
    if len(counts) <= 20:
        names = [visible(name)[:10] for name in class_names or classes]
        long = max(map(len, names)) > 2
        axes.set_xticks(classes, names, rotation=45 if long else 0, ha="right" if long else "center")

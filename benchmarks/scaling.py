"""How the time of a step scales with batch size, image size, teacher width, student updates and classes.

python benchmarks/scaling.py [--device cuda]     (about ten minutes on two cores)

The engine only, recipe `zskt`, fp32, WRN-16-2 -> WRN-16-1; each point is the median of several steps after a warm-up.
The exponent is the slope of log seconds per step against log size over the upper half of the sizes: 1 is linear. Image
size is the number of pixels.
"""

import argparse
import dataclasses
import math
import statistics
import time
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import track

import record
from zskt.files import replacing
from zskt.method.build import arrange, belief_matching
from zskt.method.recipe import load_recipe
from zskt.networks import models
from zskt.networks.checks import as_teacher
from zskt.networks.classifier import Classifier
from zskt.run.plots import styled
from zskt.runtime import arithmetic, pick_device, seeded, synchronise
from zskt.settings import replace


@dataclasses.dataclass(frozen=True)
class Point:
    """One configuration to time; each sweep changes one of the defaults."""

    batch: int = 64
    side: int = 32
    width: int = 2
    updates: int = 10
    classes: int = 10


SWEEPS: dict[str, list[Point]] = {
    "batch": [Point(batch=batch) for batch in (32, 64, 128, 256, 512, 1024)],
    "pixels": [Point(side=side, batch=8) for side in (8, 16, 32, 64, 128, 224)],
    "teacher width": [Point(width=width) for width in (1, 2, 4, 8)],
    "student updates": [Point(updates=updates) for updates in (1, 2, 5, 10, 20)],
    "classes": [Point(classes=classes) for classes in (10, 100, 1000)],
}
SIZES = {
    "batch": "batch",
    "pixels": "side",
    "teacher width": "width",
    "student updates": "updates",
    "classes": "classes",
}


def seconds_per_step(point: Point, device: torch.device, patience: float) -> float:
    """Median seconds of a step, over 3 to 20 steps, about `patience` seconds in total."""
    changes = {"batch_size": point.batch, "student.updates": point.updates, "steps": 1_000_000}
    config = replace(load_recipe("zskt"), changes)
    size = (3, point.side, point.side)
    with seeded(0):
        module = models.build(f"wrn-16-{point.width}", point.classes, size)
        student = models.build("wrn-16-1", point.classes, size).to(device)
        teacher = as_teacher(Classifier(module, input_size=size, mean=[0.5] * 3, std=[0.25] * 3)).to(device)
        arrange(teacher, config)
        arrange(student, config)
        matching = belief_matching(teacher, student, config)
    times: list[float] = []
    with arithmetic():
        matching.step()
        while len(times) < 3 or (len(times) < 20 and sum(times) < patience):
            synchronise(device)
            begun = time.perf_counter()
            matching.step()
            synchronise(device)
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """Least-squares slope of log seconds against log size, over the upper half of the sizes."""
    half = len(sizes) // 2
    x, y = ([math.log(value) for value in values[half - 1 :]] for values in (sizes, seconds))
    return statistics.linear_regression(x, y).slope


def draw(found: dict[str, dict[str, Any]]) -> Figure:
    """Seconds per pseudo image, one log-log panel per sweep."""
    figure = Figure(figsize=(14, 3), layout="constrained")
    panels = figure.subplots(1, len(found))
    for panel, (name, sweep) in zip(panels, found.items(), strict=True):
        panel.loglog(sweep["sizes"], sweep["seconds_per_image"], "o-", color="C0")
        panel.set_xticks(sweep["sizes"], [f"{size:,.0f}" for size in sweep["sizes"]], rotation=45)
        panel.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1], ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"])
        panel.minorticks_off()
        panel.set_ylim(0.005, 1.5)
        panel.set_title(f"time of a step ~ {name}^{sweep['exponent']:.2f}")
        panel.set_xlabel(name)
    panels[0].set_ylabel("seconds per pseudo image")
    return figure


def main() -> None:
    """Time every point, fit, write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--patience", type=float, default=6.0, help="seconds for each point, at least three steps")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    timed: dict[Point, float] = {}
    for point in track([point for sweep in SWEEPS.values() for point in sweep], "timing"):
        if point not in timed:
            timed[point] = seconds_per_step(point, device, arguments.patience)
    found: dict[str, dict[str, Any]] = {}
    rows = []
    for name, sweep in SWEEPS.items():
        sizes = [float(getattr(point, SIZES[name])) ** (2 if name == "pixels" else 1) for point in sweep]
        seconds = [timed[point] for point in sweep]
        per_image = [timed[point] / point.batch for point in sweep]
        found[name] = {
            "points": [dataclasses.asdict(point) for point in sweep],
            "sizes": sizes,
            "seconds_per_step": seconds,
            "seconds_per_image": per_image,
            "exponent": exponent(sizes, seconds),
        }
        for size, step, image in zip(sizes, seconds, per_image, strict=True):
            rows.append([name, f"{size:,.0f}", f"{step:.3f}", f"{1e3 * image:.2f}", ""])
        rows[-1][-1] = f"{found[name]['exponent']:.2f}"
    path = record.write(
        f"scaling-{device.type}",
        "Time of a step of recipe zskt, WRN-16-2 -> WRN-16-1 unless another teacher is named, fp32",
        {"device": str(device), "sweeps": found},
        ["against", "size", "s per step", "ms per pseudo image", "exponent of the step's time"],
        rows,
    )
    with styled(), replacing(path.with_suffix(".png")) as file:
        draw(found).savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    main()

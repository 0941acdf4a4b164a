"""Everything in a minute, on 8x8 digits: train a teacher, drop the data, distil a student, measure it."""

import shutil
from pathlib import Path
from typing import Any

from zskt.cli.progress import distilling, notice, teaching
from zskt.data.images import KNOWN, digits
from zskt.errors import ZsktError
from zskt.files import expanded, fresh_folder
from zskt.method.recipe import AUTO, OURS, load_recipe, plan
from zskt.networks import models
from zskt.networks.classifier import count_parameters
from zskt.networks.folder import load_network
from zskt.paper.baselines import teach
from zskt.paper.training import Training, updates_in
from zskt.run.checkpoint import Interrupted, check_unused, exists
from zskt.run.distill import distill
from zskt.run.report import write_report
from zskt.run.without_data import inspect_run, told
from zskt.runtime import seeded

TEACHER, STUDENT = "convnet-32", "convnet-8"
EPOCHS, BATCH = 60, 64
RECIPE, STEPS = "zskt-prior", 600
BUDGET = "20s"
"""What takes about as long, for recipes whose size follows from a time."""


def run(recipe: str = RECIPE, *, seed: int = 0, split_seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Train, drop the data, distil, measure; returns the result that the command prints.

    `seed` is for both networks, the generator and the latents; the split of the data does not depend on it.
    """
    if recipe != AUTO:
        load_recipe(recipe)  # reject an unknown name before training anything
    folder = fresh_folder(Path("runs"), "demo") if out is None else expanded(out)
    for place in (folder / "teacher", folder / "run"):  # an interrupted demo removes them
        check_unused(place)
        if exists(place / "checkpoint"):
            raise ZsktError(f"{place} holds an unfinished run; choose another --out or remove it")
    try:
        return _run(recipe, seed, split_seed, folder)
    except Interrupted as error:
        for part in ("teacher", "run"):
            shutil.rmtree(folder / part, ignore_errors=True)
        raise Interrupted(error.status - 128, "the demo was interrupted; start it again") from error


def size(recipe: str) -> dict[str, Any]:
    """The setting that makes any recipe as short as the demo's own."""
    return {"budget": BUDGET} if recipe in (AUTO, *OURS) else {"steps": STEPS}


def _run(recipe: str, seed: int, split_seed: int, folder: Path) -> dict[str, Any]:
    known = KNOWN["digits"]
    train, test = digits(split_seed)
    with seeded(seed):
        teacher_module = models.build(TEACHER, len(known.class_names), known.size)
        student = models.build(STUDENT, len(known.class_names), known.size)
    notice(f"training a teacher, {TEACHER}, on {len(train.images):,} images of handwritten digits")
    updates = updates_in(EPOCHS, len(train.images), BATCH)
    with teaching() as callback:
        teach(
            teacher_module,
            (train.images, train.labels),
            (test.images, test.labels),
            Training(updates, batch_size=BATCH, random_crop=0, seed=seed),
            mean=known.mean,
            std=known.std,
            class_names=known.class_names,
            out=folder / "teacher",
            callbacks=[callback],
        )
    del train, teacher_module  # from here on there is no training data; test images are for evaluation only
    notice("training data dropped; distilling into a student that never sees a digit")
    teacher = load_network(folder / "teacher")
    planned = plan(teacher, student, recipe, {**size(recipe), "seed": seed})
    config = planned.config
    notice(f"recipe {config.recipe} ({planned.reason}), generator width {config.generator.width}")
    with distilling() as progress:
        result = distill(
            teacher,
            student,
            planned,
            out=folder / "run",
            evaluate=(test.images, test.labels),
            callbacks=[progress],
        )
    for line in told(inspect_run(folder / "run", result.network, teacher)):
        notice(line)
    report = folder / "report.html"
    write_report([folder / "run"], report)
    notice(f"report: {report}")
    return {
        "teacher_accuracy": result.measured["teacher_accuracy"],
        "student_accuracy": result.measured["accuracy"],
        "agreement": result.measured["agreement"],
        "teacher_parameters": count_parameters(teacher.module),
        "student_parameters": count_parameters(student),
        "recipe": result.config.recipe,
        "report": str(report),
    }

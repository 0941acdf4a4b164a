"""Does bf16 cost accuracy? Digits, three seeds, the same teachers and initial students in fp32 and in bf16.

python benchmarks/precision.py     (about ten minutes on two cores)

Precision `auto` may use bf16 for the recipes that lose at most one standard deviation of fp32 here.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import record
from zskt.cli.demo import BATCH, EPOCHS, STEPS, STUDENT, TEACHER
from zskt.cli.progress import distilling, teaching
from zskt.data.images import KNOWN, digits
from zskt.networks import models
from zskt.networks.classifier import Classifier
from zskt.networks.folder import load_network
from zskt.paper.baselines import teach
from zskt.paper.training import Training, updates_in
from zskt.run.distill import distill
from zskt.runtime import seeded

SEEDS = (0, 1, 2)
PRECISIONS = ("fp32", "bf16")


def make_teacher(seed: int) -> Classifier:
    """The demo's teacher."""
    known, (train, test) = KNOWN["digits"], digits(0)
    with seeded(seed):
        module = models.build(TEACHER, len(known.class_names), known.size)
    training = Training(updates_in(EPOCHS, len(train.images), BATCH), batch_size=BATCH, random_crop=0, seed=seed)
    with tempfile.TemporaryDirectory() as folder, teaching() as callback:
        out = Path(folder) / "teacher"
        data = (train.images, train.labels), (test.images, test.labels)
        teach(module, *data, training, mean=known.mean, std=known.std, out=out, callbacks=[callback])
        return load_network(out)


def main() -> None:
    """Distil with each recipe, seed and precision; write the accuracies and the loss of bf16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", default=["zskt-prior", "zskt"])
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    known, (_, test) = KNOWN["digits"], digits(0)
    teachers = {seed: make_teacher(seed) for seed in SEEDS}
    result: dict[str, Any] = {}
    rows = []
    for recipe in arguments.recipes:
        accuracies: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
        for seed in SEEDS:
            for precision in PRECISIONS:
                with seeded(seed):
                    student = models.build(STUDENT, len(known.class_names), known.size)
                settings = {"machine.precision": precision, "machine.device": "cpu"}
                with distilling() as callback:
                    found = distill(
                        teachers[seed],
                        student,
                        recipe,
                        steps=arguments.steps,
                        seed=seed,
                        settings=settings,
                        evaluate=(test.images, test.labels),
                        callbacks=[callback],
                    )
                accuracies[precision].append(found.measured["accuracy"])
        mean = {precision: statistics.fmean(values) for precision, values in accuracies.items()}
        std = {precision: statistics.stdev(values) for precision, values in accuracies.items()}
        cost = mean["fp32"] - mean["bf16"]
        result[recipe] = {"accuracy": accuracies, "cost": cost, "within_one_std": cost <= std["fp32"]}
        for precision, values in accuracies.items():
            seeds = [f"{value:.4f}" for value in values]
            rows.append([recipe, precision, *seeds, f"{mean[precision]:.4f} ± {std[precision]:.4f}"])
    title = f"Digits, {TEACHER} -> {STUDENT}, {arguments.steps} steps: fp32 beside bf16"
    record.write("precision", title, result, ["recipe", "precision", *(f"seed {s}" for s in SEEDS), "mean ± std"], rows)


if __name__ == "__main__":
    main()

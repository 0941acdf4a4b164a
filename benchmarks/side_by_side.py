"""The engine beside the released behaviour, fp32, from the same seeds: losses, confidences and accuracy.

python benchmarks/side_by_side.py TEACHER --data cifar10-test.zip [--steps 100]

TEACHER is a folder that `zskt import` made of the authors' WRN-16-1. Both loops start from the same student and
generator and draw the same latents, one step each in turn. In float32 an adversarial game drifts apart by rounding
alone, so curves are compared, not weights: tests/test_parity.py does that in float64.
"""

import argparse
import copy
import statistics

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import nn

import record
from zskt import models
from zskt.belief import measure, network_like, pseudo_beliefs
from zskt.config import replace
from zskt.data import read
from zskt.files import replacing
from zskt.recipe import arrange, assemble, load_recipe
from zskt.reference import released_loop
from zskt.teacher import load_teacher

EVALUATE_EVERY = 5
TEST_IMAGES = 2_000


def main() -> None:
    """Run both loops in turn; write numbers and one figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    teacher = load_teacher(arguments.teacher)
    test = read(arguments.data, "test", size=teacher.input_size)
    chosen = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))[:TEST_IMAGES]
    images, labels = test.images[chosen], test.labels[chosen]
    config = replace(load_recipe("zskt"), {"steps": arguments.steps, "seed": arguments.seed})
    torch.manual_seed(arguments.seed)
    student = models.wide_resnet(10, 1, num_classes=teacher.num_classes)
    plain_teacher = copy.deepcopy(teacher.module).requires_grad_(True)
    plain_student = copy.deepcopy(student)
    arrange(teacher, config)
    arrange(student, config)
    rng = torch.Generator().manual_seed(arguments.seed)
    matching = assemble(config, teacher, student, rng, torch.Generator())
    plain_generator = copy.deepcopy(matching.generator).to(memory_format=torch.contiguous_format)
    plain_rng = torch.Generator().manual_seed(arguments.seed)
    oracle = released_loop(
        plain_teacher,
        plain_student,
        plain_generator,
        lambda: torch.randn(config.batch_size, config.generator.latent, generator=plain_rng),
        student.stages,
        total=config.steps,
    )

    def accuracy(module: nn.Module) -> float:
        return measure(network_like(teacher, module), images, labels)["accuracy"]

    curves: dict[str, list[dict[str, float]]] = {"engine": [], "reference": []}
    for step in range(1, config.steps + 1):
        ours, theirs = matching.step(), next(oracle)
        beliefs = pseudo_beliefs(ours.teacher_logits, ours.student_logits)
        curves["engine"].append(
            {
                "step": step,
                "generator_loss": float(ours.generator[-1].total),
                "student_loss": statistics.fmean(float(update.total) for update in ours.student),
                "teacher_confidence": beliefs["teacher_confidence"],
                "student_confidence": beliefs["student_confidence"],
            }
        )
        curves["reference"].append(
            {
                "step": step,
                "generator_loss": float(theirs.generator_losses[-1]),
                "student_loss": statistics.fmean(map(float, theirs.student_losses)),
                "teacher_confidence": float(theirs.teacher_confidence),
                "student_confidence": float(theirs.student_confidence),
            }
        )
        if step == 1 or step % EVALUATE_EVERY == 0:
            curves["engine"][-1]["accuracy"] = accuracy(student)
            curves["reference"][-1]["accuracy"] = accuracy(plain_student)
        print({name: lines[-1] for name, lines in curves.items()}, flush=True)
    matching.close()
    finish(curves)


def finish(curves: dict[str, list[dict[str, float]]]) -> None:
    """Figure, table and numbers."""
    keys = {
        "student_loss": "student loss, mean of 10 updates",
        "generator_loss": "generator loss",
        "teacher_confidence": "teacher's confidence on the pseudo batch",
        "student_confidence": "student's confidence on the pseudo batch",
        "accuracy": f"accuracy on {TEST_IMAGES:,} test images",
    }
    rows = [["first step's student loss", *(f"{lines[0]['student_loss']:.6f}" for lines in curves.values())]]
    last_fifth = len(curves["engine"]) // 5
    for key, label in keys.items():
        if key == "accuracy":
            continue
        means = [statistics.fmean(line[key] for line in lines[-last_fifth:]) for lines in curves.values()]
        rows.append([f"{label}, mean of the last {last_fifth} steps", *(f"{mean:.4f}" for mean in means)])
    rows.append([f"{keys['accuracy']}, last", *(f"{lines[-1]['accuracy']:.4f}" for lines in curves.values())])
    name = "side-by-side"
    path = record.write(name, "Engine and released loop side by side, fp32", {"curves": curves}, ["", *curves], rows)
    with matplotlib.rc_context({"font.size": 8, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(12, 3), layout="constrained")
        figure.subplots(1, len(keys))
        for axes, (key, label) in zip(figure.axes, keys.items(), strict=True):
            for (loop, lines), style in zip(curves.items(), ("-", "--"), strict=True):
                known = [line for line in lines if key in line]
                axes.plot(
                    [line["step"] for line in known], [line[key] for line in known], style, label=loop, linewidth=1
                )
            axes.set_title(label, fontsize=7)
            axes.set_xlabel("step")
        figure.axes[0].legend()
        with replacing(path.with_suffix(".png")) as file:
            figure.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    main()

"""The engine beside the released loop in fp32, from the same seeds: losses, confidences and accuracy.

python benchmarks/side_by_side.py TEACHER --data cifar10-test.zip [--steps 100]

TEACHER is a folder that `zskt import` made from the authors' WRN-16-1. All loops start from the same student and
generator, draw the same latents, and take their steps in turn. In float32 rounding alone makes adversarial training
diverge, so a third loop is the control: the released one with weights in channels_last order, which changes only the
order of summation. tests/test_parity.py compares the first two in float64, where rounding does not matter.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import record
from zskt.bench.reference import released_loop
from zskt.data.images import read
from zskt.evaluate.measures import measure, pseudo_beliefs
from zskt.files import replacing
from zskt.method.build import arrange, belief_matching
from zskt.method.config import Config
from zskt.method.matching import BeliefMatching
from zskt.method.recipe import load_recipe
from zskt.method.updates import Beliefs
from zskt.networks import models
from zskt.networks.classifier import Classifier
from zskt.networks.folder import load_network
from zskt.run.plots import styled
from zskt.runtime import seeded
from zskt.settings import replace

EVALUATE_EVERY = 5
TEST_IMAGES = 2_000
LOOPS = ("engine", "released loop", "released loop, other rounding")
Line = dict[str, float]


def engine(matching: BeliefMatching) -> Callable[[], Line]:
    """A step of the engine; the beliefs are those of its last student update."""
    terms, seen = dict(matching.student_updates.loss), list[Beliefs]()

    def watched(beliefs: Beliefs) -> Tensor:
        seen[:] = [beliefs]
        return terms["kl"](beliefs)

    matching.student_updates.loss = terms | {"kl": watched}

    def step() -> Line:
        losses = matching.step()
        beliefs = pseudo_beliefs(seen[0].teacher.logits, seen[0].student.logits.detach())
        return {
            "generator_loss": float(losses["generator"][-1]),
            "student_loss": float(losses["student"].mean()),
            "teacher_confidence": beliefs["teacher_confidence"],
            "student_confidence": beliefs["student_confidence"],
        }

    return step


def released(
    teacher: nn.Module, student: nn.Module, generator: nn.Module, config: Config, memory_format: torch.memory_format
) -> Callable[[], Line]:
    """A step of the released loop."""
    for module in (teacher, student, generator):
        module.to(memory_format=memory_format)  # type: ignore[call-overload]
    rng = torch.Generator().manual_seed(config.seed)
    shape = (config.batch_size, config.generator.latent)
    loop = released_loop(
        teacher.requires_grad_(True),
        student,
        generator,
        lambda: torch.randn(shape, generator=rng),
        student.stages,  # type: ignore[arg-type]
        total=config.steps,
    )

    def step() -> Line:
        losses = next(loop)
        return {
            "generator_loss": float(losses.generator_losses[-1]),
            "student_loss": statistics.fmean(map(float, losses.student_losses)),
            "teacher_confidence": float(losses.teacher_confidence),
            "student_confidence": float(losses.student_confidence),
        }

    return step


def main() -> None:
    """Run the loops in turn; write numbers and a plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    teacher: Classifier = load_network(arguments.teacher)
    test = read(arguments.data, "test", size=teacher.input_size)
    chosen = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))[:TEST_IMAGES]
    images, labels = test.images[chosen], test.labels[chosen]
    config = replace(load_recipe("zskt"), {"steps": arguments.steps, "seed": arguments.seed})
    with seeded(arguments.seed):
        student = models.wide_resnet(10, 1, num_classes=teacher.num_classes)
        students = [student, copy.deepcopy(student), copy.deepcopy(student)]
        teachers = [copy.deepcopy(teacher.module) for _ in range(2)]
        arrange(teacher, config)
        arrange(student, config)
        matching = belief_matching(teacher, student, config)
    matching.rng.manual_seed(arguments.seed)
    formats = (torch.contiguous_format, torch.channels_last)
    generators = [copy.deepcopy(matching.generator) for _ in formats]
    steps = [engine(matching)]
    for copied_teacher, copied_student, generator, layout in zip(
        teachers, students[1:], generators, formats, strict=True
    ):
        steps.append(released(copied_teacher, copied_student, generator, config, layout))

    curves: dict[str, list[Line]] = {name: [] for name in LOOPS}
    for number in range(1, config.steps + 1):
        for name, step, module in zip(LOOPS, steps, students, strict=True):
            line = {"step": number, **step()}
            if number == 1 or number % EVALUATE_EVERY == 0:
                line["accuracy"] = measure(teacher.like(module), images, labels)["accuracy"]
            curves[name].append(line)
        print(json.dumps({name: lines[-1] for name, lines in curves.items()}), flush=True)
    matching.close()
    finish(curves)


def finish(curves: dict[str, list[Line]]) -> None:
    """Write table, numbers and plot."""
    keys = {
        "student_loss": "student loss, mean of 10 updates",
        "generator_loss": "generator loss",
        "teacher_confidence": "teacher's confidence on the pseudo batch",
        "student_confidence": "student's confidence on the pseudo batch",
        "accuracy": f"accuracy on {TEST_IMAGES:,} test images",
    }
    rows = [
        ["first step's generator loss", *(f"{lines[0]['generator_loss']:.7f}" for lines in curves.values())],
        ["first step's student loss", *(f"{lines[0]['student_loss']:.6f}" for lines in curves.values())],
    ]
    count = len(curves["engine"])
    for key, label in keys.items():
        if key != "accuracy":
            for begin, end in ((0, count // 5), (count - count // 5, count)):
                means = [statistics.fmean(line[key] for line in lines[begin:end]) for lines in curves.values()]
                rows.append([f"{label}, steps {begin + 1} to {end}", *(f"{mean:.4f}" for mean in means)])
    rows.append([f"{keys['accuracy']}, last", *(f"{lines[-1]['accuracy']:.4f}" for lines in curves.values())])
    title = "Engine and released loop side by side, fp32"
    path: Path = record.write("side-by-side", title, {"curves": curves}, ["", *curves], rows)
    with styled():
        figure = Figure(figsize=(13, 3), layout="constrained")
        figure.subplots(1, len(keys))
        for axes, (key, label) in zip(figure.axes, keys.items(), strict=True):
            for (loop, lines), style in zip(curves.items(), ("-", "--", ":"), strict=True):
                known = [line for line in lines if key in line]
                x, y = [line["step"] for line in known], [line[key] for line in known]
                axes.plot(x, y, style, label=loop, linewidth=1)
            axes.set_title(label, fontsize=7)
            axes.set_xlabel("step")
        figure.axes[0].legend(fontsize=6)
        with replacing(path.with_suffix(".png")) as file:
            figure.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    main()

"""The three programs that are called ZSKT, and the batches of Ferles et al., at equal cost on one pair.

python benchmarks/three_zskts.py --mnist FOLDER [--steps 500] [--stop-after 30m]     (20 minutes of one core)

MNIST, LeNet-5 into half a LeNet-5, the league's teacher. All variants get as many operations as --steps steps of the
released code; with them go their schedules, complete. CMI's is its settings as far as ours reach (docs/three-zskts.md).
Each run is made once and goes on where it was stopped; the table has the last iterate on the test images.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import league
import record
from zskt.cli.progress import distilling, notice
from zskt.files import read_json
from zskt.method.budget import operations
from zskt.method.recipe import plan
from zskt.networks.folder import load_network
from zskt.run.distill import distill
from zskt.runtime import parse_limit

CMI = {
    "batch_size": 256,
    "generator.latent": 256,
    "generator.output": "pixels",
    "generator.beta1": 0.5,
    "generator.clip": 0.0,
    "generator.loss.kl_scale": "batchmean",
    "generator.mode_for_student": "eval",
    "student.loss.kl_scale": "batchmean",
    "student.loss.attention": 0.0,
    "student.updates": 5,
    "student.optimizer": "sgd",
    "student.learning_rate": 0.1,
    "student.momentum": 0.9,
    "student.weight_decay": 1e-4,
    "student.clip": 0.0,
    "student.mode_for_generator": "eval",
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "released code": ("zskt", {}),
    "fresh batches (Ferles et al.)": ("zskt-fresh", {}),
    "mmrazor": ("zskt-mmrazor", {}),
    "CMI": ("zskt-fresh", CMI),
}


def main() -> None:
    """Run what is missing; then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=500, help="of the released code")
    parser.add_argument("--out", type=Path, default=Path("runs/three-zskts"))
    parser.add_argument("--stop-after", default="1000h", help="stop after so long, as in 90m; the same command goes on")
    arguments = parser.parse_args()
    deadline = time.monotonic() + parse_limit(arguments.stop_after)[0]
    pair, folder = league.PAIRS["B"], arguments.out / "teacher"

    def left() -> str:
        return f"{max(1, deadline - time.monotonic()):.0f}s"

    if not league.make_teacher(pair, 0, arguments.mnist, folder, left()):
        return
    teacher, test = load_network(folder), league.images(pair, "test", 0, arguments.mnist)
    student = league.make_student(pair, 0)
    budget = operations(teacher, student, plan(teacher, student, "zskt", {"steps": arguments.steps}).config)
    result, rows = {}, []
    for label, (recipe, settings) in VARIANTS.items():
        one = plan(teacher, student, recipe, settings | {"steps": 1}).config
        steps = round(budget / operations(teacher, student, one))
        found = []
        for seed in pair.seeds:
            out = arguments.out / f"{label.split()[0].lower()}-{seed}"
            if not (out / "student.json").exists():
                notice(f"{label}, {steps:,} steps, seed {seed}")
                with distilling() as callback:
                    finished = distill(
                        teacher,
                        league.make_student(pair, seed),
                        recipe,
                        settings=settings,
                        steps=steps,
                        seed=seed,
                        out=out,
                        evaluate=test,
                        callbacks=[callback],
                        stop_after=left(),
                        resume=out.exists(),
                    ).finished
                if not finished:
                    return
            found.append(read_json(out / "student.json"))
            if found[-1]["steps"] != steps:
                raise SystemExit(f"{out} has {found[-1]['steps']} steps, now {steps}: give another --out")
        accuracy = [said["measured"]["accuracy"] for said in found]
        updates = steps * one.student.updates
        result[label] = {"recipe": recipe, "settings": settings, "steps": steps, "accuracy": accuracy}
        result[label] |= {"student_updates": updates, "seconds": [said["seconds"] for said in found]}
        spread = f"{100 * statistics.fmean(accuracy):.2f} ± {100 * statistics.stdev(accuracy):.2f}"
        seconds = f"{statistics.fmean(said['seconds'] for said in found):.0f}"
        rows.append([label, spread, f"{steps:,}", f"{updates:,}", str(one.batch_size), seconds])
    measured = read_json(folder / "teacher.json")["measured"]["accuracy"]
    title = f"Three things called ZSKT: MNIST, LeNet-5 ({100 * measured:.2f}) to half, {budget / 1e15:.2g} PFLOP a run"
    head = ["settings of", "test accuracy, %, 3 seeds", "steps", "student updates", "batch", "seconds"]
    record.write("three-zskts", title, {"pflop": budget / 1e15, "variants": result}, head, rows)


if __name__ == "__main__":
    main()

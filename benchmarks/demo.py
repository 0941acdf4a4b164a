"""The README's table and pictures: `zskt demo` for three seeds. Takes about three minutes on two cores.

python benchmarks/demo.py [--split-seed 1]     (split seed 1 is the one the settings were tuned on)
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import record
from zskt.cli import demo
from zskt.files import replacing
from zskt.run.checkpoint import read_lines
from zskt.run.plots import run_curves

SEEDS = (0, 1, 2)
DOCS = record.RESULTS.parent.parent / "docs"


def main() -> None:
    """Run the demo for each seed, write the table and, for the reported split, the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--recipe", default=demo.RECIPE)
    arguments = parser.parse_args()
    outcomes, lines = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS:
            started = time.monotonic()
            out = Path(folder) / f"seed {seed}"
            outcome = demo.run(arguments.recipe, seed=seed, split_seed=arguments.split_seed, out=out)
            outcomes.append({**outcome, "seed": seed, "seconds": round(time.monotonic() - started, 1), "report": None})
            lines[out.name] = read_lines(out / "run" / "metrics.jsonl")
        if arguments.split_seed == 0 and arguments.recipe == demo.RECIPE:
            with replacing(DOCS / "demo-curves.png") as file:
                file.write(run_curves(lines))
            shutil.copy(sorted((Path(folder) / "seed 0" / "run" / "samples").iterdir())[-1], DOCS / "demo-images.png")
    keys = ("teacher_accuracy", "student_accuracy", "agreement", "seconds")
    rows = [
        [str(o["seed"]), *(f"{o[key]:.4f}" if key != "seconds" else f"{o[key]:.0f}" for key in keys)] for o in outcomes
    ]
    columns = {key: [outcome[key] for outcome in outcomes] for key in keys}
    mean = {key: {"mean": statistics.fmean(v), "std": statistics.stdev(v)} for key, v in columns.items()}
    spread = [
        f"{m['mean']:.4f} ± {m['std']:.4f}" if key != "seconds" else f"{m['mean']:.0f}" for key, m in mean.items()
    ]
    rows.append(["mean ± std", *spread])
    name = f"demo-split-{arguments.split_seed}" + ("" if arguments.recipe == demo.RECIPE else f"-{arguments.recipe}")
    title = (
        f"Digits, {demo.TEACHER} -> {demo.STUDENT}, recipe {outcomes[0]['recipe']}, split seed {arguments.split_seed}"
    )
    head = ["seed", "teacher", "student", "agreement", "seconds"]
    record.write(name, title, {"runs": outcomes, "summary": mean}, head, rows)


if __name__ == "__main__":
    main()

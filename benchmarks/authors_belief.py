"""Mean transition error between the authors' two CIFAR-10 checkpoints, in fp32 and bf16.

python benchmarks/authors_belief.py FIRST SECOND --data cifar10-test.zip

FIRST is stepped. The released loop gave .735 over 32 images.
"""

import argparse
from pathlib import Path

from rich.progress import Progress

import record
from zskt.data.images import KNOWN, read
from zskt.evaluate.fidelity import compare
from zskt.evaluate.transitions import Paths, average_curves
from zskt.networks.weights import import_weights
from zskt.run.plots import average_transitions
from zskt.runtime import arithmetic


def main() -> None:
    """Import both by name, compare on the same images in both precisions, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", nargs=2, type=Path)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    known = KNOWN["cifar10"]
    test = read(arguments.data, "test", size=known.size)
    first, second = (
        import_weights(path, "wrn-16-1", known.size, 10, known.mean, known.std)[0] for path in arguments.weights
    )
    results, rows = {}, []
    for precision, start in (("fp32", "prediction"), ("fp32", "label"), ("bf16", "prediction")):
        with Progress() as progress, arithmetic():
            task = progress.add_task(f"{precision}, from the {start}")
            found = compare(
                first,
                second,
                test.images,
                test.labels,
                Paths(arguments.images, arguments.steps, start=start, precision=precision),  # type: ignore[arg-type]
                progress=lambda done, total: progress.update(task, completed=done, total=total),  # noqa: B023
            )
        results[f"{precision} {start}"] = found.measured
        low, high = found.measured["intervals"]["mean_transition_error"]
        rows.append([precision, start, f"{found.mean_transition_error:.4f}", f"{low:.4f} .. {high:.4f}"])
        if not (precision == "bf16" or start == "label"):
            names = [path.name.split(".")[0] for path in arguments.weights]
            title = f"mean transition error {found.mean_transition_error:.3f}, {arguments.images} images"
            figure = average_transitions({title: average_curves(found.transitions)}, names)
    title = f"Mean transition error of {arguments.weights[0].name}, stepped, and {arguments.weights[1].name}"
    head = ["precision", "start class", "mean transition error", "95 % interval"]
    path = record.write("authors-belief", title, results, head, rows)
    path.with_suffix(".png").write_bytes(figure)


if __name__ == "__main__":
    main()

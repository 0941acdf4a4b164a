"""The ZSKT authors' checkpoints, imported and measured on the CIFAR-10 test images.

python benchmarks/imported.py --data cifar10-test.zip WEIGHTS...

Expected: .912 for their WRN-16-1, .921 for their KD+AT student on all data (each within .002).
"""

import argparse
import hashlib
from pathlib import Path

import record
from zskt.data.images import KNOWN, read
from zskt.evaluate.measures import measure
from zskt.networks.weights import import_weights


def main() -> None:
    """Import each file by its names, measure, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", nargs="+", type=Path)
    parser.add_argument("--data", nargs="+", required=True)
    arguments = parser.parse_args()
    known = KNOWN["cifar10"]
    test = read(arguments.data, "test", size=known.size)
    results, rows = {}, []
    for path in arguments.weights:
        teacher, report = import_weights(path, "wrn-16-1", known.size, 10, known.mean, known.std)
        measured = measure(teacher, test.images, test.labels)
        renamed = report.metadata["renamed"]
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        results[path.name] = {"renamed": renamed, "sha256": sha256, **measured}
        rows.append([path.name, str(renamed), f"{measured['accuracy']:.4f}", f"{measured['calibration_error']:.4f}"])
    head = ["file", "renamed", "accuracy", "calibration error"]
    record.write("imported", "The authors' CIFAR-10 checkpoints, imported as wrn-16-1", results, head, rows)


if __name__ == "__main__":
    main()

"""A dated table of what the fuzzer, the soak and the torture printed: their last lines, kept in files.

python tests/fuzz.py --cases 5000 > a.json; python tests/fuzz.py --first 5000 --cases 5000 > b.json
python tests/soak.py > soak.json; python tests/torture.py --kills 200 > torture.json
python benchmarks/hostile.py --fuzz a.json b.json --soak soak.json --torture torture.json --notes notes.md

The notes, below the table, say what was run when: the parts may have been run on other days, of other commits.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record

GROUPS = {
    "folders of teachers and runs": [
        "teacher.json", "safetensors", "student.json", "metrics.jsonl", "config.toml", "generator",
        "found without data", "half-way",
    ],
    "checkpoints, banks and logs, resumed or evaluated": [
        "checkpoint", "bank", "rows of a bank", "resumed log", "command.json", "stopped run",
    ],
    "weights of torch, with a payload in a quarter": ["torch zip", "torch pickle", "payload", "exported"],
    "Hugging Face folders": ["Hugging Face"],
    "image files": ["png", "jpg", "webp", "bmp", "gif", "tiff", "pgm"],
    "archives, arrays and caches of images": [
        "zip", "tar.gz", "idx", "idx.gz", "cifar pickle", "cifar binary", "svhn", "cache",
    ],
    "settings files": ["settings file"],
    "command lines": ["command line"],
}  # fmt: skip


def rows_of(parts: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for each group of formats, and one for all: cases, read, refused, failures."""
    counts: dict[str, Counter[str]] = {}
    for part in parts:
        for name, statuses in part["statuses"].items():
            counts.setdefault(name, Counter()).update(statuses)
    failures = [text.partition(":")[0] for part in parts for text in part["failures"].values()]
    if unknown := set(counts) - {name for names in GROUPS.values() for name in names}:
        raise SystemExit(f"in no group: {', '.join(sorted(unknown))}; add them to GROUPS")
    rows = []
    for group, names in {**GROUPS, "all": list(counts)}.items():
        total = sum((counts[name] for name in names if name in counts), Counter[str]())
        failed = len(failures) if group == "all" else sum(failure in names for failure in failures)
        row = (total.total(), total["0"], total["1"] + total["2"], failed)
        rows.append([group, *(f"{number:,}" for number in row)])
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("fuzz", "soak", "torture"):
        parser.add_argument(f"--{name}", nargs="*", type=Path, default=[])
    parser.add_argument("--notes", type=Path, help="Markdown")
    given = vars(parser.parse_args())
    notes = given.pop("notes")
    found = {name: [json.loads(path.read_text()) for path in paths] for name, paths in given.items()}
    head = ["mutated", "cases", "read", "refused", "failures"]
    path = record.write(
        "hostile", "Mutated files and command lines, soak, torture", found, head, rows_of(found["fuzz"])
    )
    if notes is not None:
        path.write_text(f"{path.read_text()}\n{notes.read_text()}")
    print(path)

"""Dated result files: the numbers with command, commit and machine."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zskt.bench.step_time import PAIRS
from zskt.files import write_json, write_text
from zskt.paper.tables import markdown, provenance
from zskt.runtime import circumstances, short

RESULTS = Path(__file__).parent / "results"


def pair_arguments(description: str | None, count: str) -> argparse.Namespace:
    """The command line of a benchmark of pairs: --pairs, --device and --COUNT."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pairs", nargs="+", default=["wrn"], choices=PAIRS)
    parser.add_argument("--device", default="auto")
    parser.add_argument(f"--{count}", type=int, default=5)
    return parser.parse_args()


def command() -> str:
    """The script's command line, relative to the project's root."""
    return " ".join(["python", os.path.relpath(sys.argv[0], RESULTS.parent.parent), *map(short, sys.argv[1:])])


def write(name: str, title: str, result: Mapping[str, Any], head: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    """Write results/DATE-NAME.json and .md; returns the path of the .md."""
    how = circumstances() | {"command": command()}
    path = RESULTS / f"{how['date']}-{name}.md"
    write_json(path.with_suffix(".json"), {**how, **result})
    write_text(path, "\n".join([f"# {title}", "", *markdown(head, rows), "", *provenance(how)]) + "\n")
    print(json.dumps(result))
    return path

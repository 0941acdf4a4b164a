"""Dated result files: what was measured, by which command, at which commit, on which machine."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zskt.files import write_json, write_text
from zskt.runtime import circumstances, short

RESULTS = Path(__file__).parent / "results"


def command() -> str:
    """How the script was called, from the project's root."""
    return " ".join(["python", os.path.relpath(sys.argv[0], RESULTS.parent.parent), *map(short, sys.argv[1:])])


def write(name: str, title: str, result: Mapping[str, Any], head: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    """Write results/DATE-NAME.json and .md; returns the latter's path."""
    how = circumstances() | {"command": command()}
    path = RESULTS / f"{how['date']}-{name}.md"
    write_json(path.with_suffix(".json"), {**how, **result})
    lines = [f"# {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", f"{how['date']}, `{how['command']}`, commit {how['commit']},"]
    lines += [f"{how['hardware']}, {how['threads']} threads, "]
    lines[-1] += ", ".join(f"{package} {version}" for package, version in how["versions"].items()) + "."
    write_text(path, "\n".join(lines) + "\n")
    print(json.dumps(result))
    return path

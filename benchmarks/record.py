"""Dated result files: what was measured, by which command, at which commit, on which machine."""

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from zskt.files import write_json, write_text
from zskt.process import versions

RESULTS = Path(__file__).parent / "results"


def circumstances() -> dict[str, Any]:
    """Command, commit, versions, hardware."""
    git = ["git", "-C", str(RESULTS.parent)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "../src"], capture_output=True, text=True).stdout.strip()
    return {
        "command": " ".join(
            ["python", os.path.relpath(sys.argv[0], RESULTS.parent.parent), *map(_short, sys.argv[1:])]
        ),
        "commit": commit + (" with uncommitted changes" if changed else ""),
        "versions": versions(),
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _short(argument: str) -> str:
    """An argument without the folders of this machine."""
    return Path(argument).name if os.path.exists(argument) else argument


def cpu_name() -> str:
    """Model and number of the processors."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = found[0] if found else name
    return f"{name}, {os.cpu_count()} cores"


def write(name: str, title: str, result: Mapping[str, Any], head: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    """Write results/DATE-NAME.json and .md; returns the latter's path."""
    date = datetime.date.today().isoformat()
    how = circumstances()
    path = RESULTS / f"{date}-{name}.md"
    write_json(path.with_suffix(".json"), {"date": date, **how, **result})
    lines = [f"# {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", f"{date}, `{how['command']}`, commit {how['commit']}, {how['hardware']}, {how['threads']} threads, "]
    lines[-1] += ", ".join(f"{package} {version}" for package, version in how["versions"].items()) + "."
    write_text(path, "\n".join(lines) + "\n")
    print(json.dumps(result))
    return path

"""The student of a run that has not finished, as the newest whole checkpoint has it."""

from pathlib import Path
from typing import Any

import torch

from zskt.errors import ZsktError
from zskt.networks.classifier import Classifier
from zskt.networks.folder import build_network
from zskt.run import checkpoint


def is_unfinished(folder: Path) -> bool:
    """Whether a folder holds a distillation run that has a checkpoint and has not finished."""
    there = (folder / "config.toml").exists() and not (folder / "student.json").exists()
    return there and checkpoint.exists(folder / "checkpoint")


@torch.random.fork_rng(devices=[])  # networks are built with random weights first
def load_unfinished(folder: Path, *, trust: bool = False) -> tuple[Classifier, dict[str, Any]]:
    """The student of the newest whole checkpoint, and what its student.json would say, with `step` and a warning.

    A student that a factory made needs `trust`.
    """
    tensors, metadata, _ = checkpoint.load(folder / "checkpoint")
    about, step = metadata.get("about"), metadata.get("step")
    if not isinstance(about, dict) or type(step) is not int or type(about.get("steps")) is not int:
        raise ZsktError(
            f"expected a checkpoint that describes its student in {folder}, found one of an earlier version; finish "
            "the run with --resume"
        )
    how = about.get("rebuild")
    if isinstance(how, dict) and "python" in how:
        raise ZsktError(
            f"expected a student that can be rebuilt from {folder}, found a Python object; finish the run with "
            "--resume and pass the module, as in zskt.load_student(folder, module=...)"
        )
    path = folder / "checkpoint" / f"{step:08d}.safetensors"
    student = build_network(about, checkpoint.under("student", tensors), path, path, trust=trust)
    return student, about | {"step": step, "warnings": [f"step {step:,} of {about['steps']:,}: unfinished"]}

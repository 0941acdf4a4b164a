"""A pair of ImageNet's shape within a budget: what it costs in time and memory, not what it teaches.

python benchmarks/large_images.py [--budget 10m] [--student auto:0.25]

The teacher is transformers' ResNet-18 for 224 x 224 images and 1,000 classes, with random weights, as no trained ones
are at hand: the cost of a step does not depend on the weights, accuracy does, and is not measured. The command is the
one a user would type, in a process of its own; its peak memory is the largest resident set.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import record
from zskt.deploy.formats import need
from zskt.files import read_json
from zskt.method.config import read_config


def save_classifier(folder: Path) -> None:
    """ResNet-18 with ImageNet's classes and preprocessing, as `save_pretrained` writes it."""
    transformers = need("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        num_labels=1000,
    )
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    processor = {"do_resize": True, "size": {"height": 224, "width": 224}}
    processor |= {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def main() -> None:
    """Distil within the budget, and write what was said before and what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="10m")
    parser.add_argument("--student", default="auto:0.25")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch, "classifier"), Path(scratch, "run")
        save_classifier(folder)
        words = ["distill", folder, "--student", arguments.student, "--budget", arguments.budget, "--out", out]
        begun = time.monotonic()
        command = [sys.executable, "-m", "zskt", *map(str, words)]
        done = subprocess.run(command, check=True, text=True, capture_output=True)
        seconds = time.monotonic() - begun
        config = read_config(out / "config.toml")
        images = config.bank.rounds * config.bank.batch_size
        disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        warnings = read_json(out / "student.json")["warnings"]
    said = next(re.sub(r" in \S+$", "", line) for line in done.stderr.splitlines() if "PFLOP" in line)
    student = next(line for line in done.stderr.splitlines() if line.startswith("student "))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    result = {"said": said, "seconds": seconds, "peak_bytes": peak, "disk_bytes": disk, "steps": config.steps}
    result |= {"recipe": config.recipe, "pseudo_images": images, "student": student, "warnings": warnings}
    rows = [
        ["teacher", "ResNet-18 of transformers, 3 x 224 x 224, 1,000 classes, random weights"],
        ["student", re.sub(r"^student ", "", student)],
        ["recipe", f"{config.recipe}, {config.steps:,} steps, {images:,} pseudo images, batch {config.batch_size}"],
        ["said before it began", said],
        ["took, with start-up and probe", f"{seconds:.0f} s"],
        ["peak memory", f"{peak / 2**30:.1f} GiB"],
        ["disk, at the end", f"{disk / 2**20:,.0f} MiB"],
    ]
    title = f"224 x 224 images, 1,000 classes, --budget {arguments.budget}"
    record.write("large-images", title, result, ["what", "found"], rows)


if __name__ == "__main__":
    main()

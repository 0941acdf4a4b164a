"""`auto` on teachers without BatchNorm: GroupNorm, LayerNorm and a vision transformer, on the digits.

python benchmarks/without_batchnorm.py [--budget 60s] [--out runs/without-batchnorm]     (half an hour of one thread)

Three seeds, each with its own split of the data and its own teachers; the last iterate on the split's test images. Runs
lie in --out; each is made once and goes on where it was stopped.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

import record
import zskt
from zskt.cli.progress import distilling, notice
from zskt.data.images import KNOWN, digits
from zskt.deploy.formats import need
from zskt.evaluate.measures import measure
from zskt.files import read_json
from zskt.networks import models
from zskt.networks.factories import call_factory
from zskt.networks.folder import load_network, save_teacher
from zskt.networks.observe import logits_of
from zskt.runtime import seeded

SEEDS = (0, 1, 2)
STUDENT = "convnet-8"
EPOCHS, BATCH = 60, 64
SIZE, CLASSES = (1, 8, 8), 10


def vision_transformer() -> nn.Module:
    """transformers' ViT: 16 patches of 2 x 2 pixels, four layers of LayerNorm, attention and a small network."""
    transformers = need("transformers")
    shape = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": CLASSES}
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, **shape
    )
    made: nn.Module = transformers.ViTForImageClassification(config)
    return made


def convnext() -> nn.Module:
    """transformers' ConvNeXt: convolutions with LayerNorm."""
    transformers = need("transformers")
    config = transformers.ConvNextConfig(
        num_channels=1, patch_size=1, hidden_sizes=[32, 64], depths=[2, 2], num_stages=2, num_labels=CLASSES
    )
    made: nn.Module = transformers.ConvNextForImageClassification(config)
    return made


FACTORY = f"{Path(__file__).parent / 'group_norm.py'}:wide_resnet"
TEACHERS: Mapping[str, tuple[str, Callable[[], nn.Module]]] = {
    "group-norm": ("WRN-10-2 with GroupNorm", lambda: call_factory(FACTORY, {"size": list(SIZE)})),
    "layer-norm": ("ConvNeXt of two stages, LayerNorm", convnext),
    "vit": ("ViT of four layers, LayerNorm", vision_transformer),
}
"""What the table calls them, and a network with random weights."""


def fit(module: nn.Module, teacher: zskt.Classifier, images: Tensor, labels: Tensor) -> None:
    """Train on images (M, 1, 8, 8) uint8 by AdamW, one cycle; transformers do not learn by the SGD of `zskt teach`."""
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    order = torch.cat([torch.randperm(len(images))[: steps // EPOCHS * BATCH] for _ in range(EPOCHS)])
    module.train()
    for chosen in track(order.split(BATCH), "training a teacher"):
        logits = logits_of(module(teacher.normalise(images[chosen])))  # (N, K)
        loss = F.cross_entropy(logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    module.eval()


def make_teacher(name: str, seed: int, folder: Path) -> None:
    """Train it, unless that has been done."""
    if (folder / "teacher.json").exists():
        return
    train, test = digits(seed)
    with seeded(seed):
        module = TEACHERS[name][1]()
        known = KNOWN["digits"]
        teacher = zskt.Classifier(module, input_size=SIZE, mean=known.mean, std=known.std)
        fit(module, teacher, train.images, train.labels)
    save_teacher(folder, teacher, measured=measure(teacher, test.images, test.labels))


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="60s")
    parser.add_argument("--out", type=Path, default=Path("runs/without-batchnorm"))
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    rows = []
    for name, (title, _) in TEACHERS.items():
        found = []
        for seed in SEEDS:
            folder = arguments.out / name / f"seed-{seed}"
            make_teacher(name, seed, folder / "teacher")
            teacher, test = load_network(folder / "teacher", trust=True), digits(seed)[1]
            run = folder / "student"
            if not (run / "student.json").exists():
                notice(f"{name}, seed {seed}")
                with seeded(seed):
                    student = models.build(STUDENT, CLASSES, SIZE)
                with distilling() as callback:
                    zskt.distill(
                        teacher,
                        student,
                        budget=arguments.budget,
                        seed=seed,
                        out=run,
                        evaluate=(test.images, test.labels),
                        callbacks=[callback],
                        resume=run.exists(),
                    )
            said = read_json(run / "student.json")
            found.append(said["measured"] | {name: said[name] for name in ("seconds", "warnings", "recipe", "steps")})
        results[name] = found
        cells = []
        for key, scale, places in (("accuracy", 100, 2), ("teacher_accuracy", 100, 2), ("seconds", 1, 0)):
            values = [scale * one[key] for one in found]
            cells.append(f"{statistics.fmean(values):.{places}f} ± {statistics.stdev(values):.{places}f}")
        rows.append([title, found[0]["recipe"], *cells, str(sum(len(one["warnings"]) for one in found))])
    head = ["teacher", "auto takes", "student", "teacher, %", "seconds", "warnings"]
    title = f"Teachers without BatchNorm: digits, `auto` into {STUDENT}, {arguments.budget}"
    record.write("without-batchnorm", title, {"runs": results}, head, rows)


if __name__ == "__main__":
    main()

"""The league: every recipe distils the same teachers into the same students in the same time.

python benchmarks/league.py A
python benchmarks/league.py B C --mnist FOLDER
python benchmarks/league.py D --cifar10 train.zip test.zip --recipes bank auto --stop-after 2h
python benchmarks/league.py A --sizes     (first, on a quiet machine; then other recipes in other processes, same --out)

A  digits, the demo's pair, 60 s, five splits of the data
B  MNIST, LeNet-5 -> half, no BatchNorm, 5 min
C  MNIST, ResNet-18 at a quarter of its width -> WRN-10-1, 5 min
D  CIFAR-10, WRN-16-2 -> WRN-16-1, 30 min
E  CIFAR-10, WRN-10-2 with GroupNorm instead of BatchNorm (benchmarks/group_norm.py) -> WRN-10-1, 30 min
F  CIFAR-10, the WRN-16-1 that the authors of ZSKT released (--weights FILE) -> WRN-10-1, 30 min

How many steps fit a pair's time is measured once for each recipe, when no other work should run, and kept: all seeds do
these, on whatever machine, so that a busy one makes them late but not worse. Runs lie in --out; each is made once and
goes on where it was stopped. The table, written at the end, has the last iterate on the test images.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import record
import zskt
from zskt.cli.progress import distilling, notice, teaching
from zskt.data.images import KNOWN, digits, read
from zskt.errors import ZsktError
from zskt.evaluate.measures import measure
from zskt.files import read_json, write_json
from zskt.method.budget import fit, operations, probe
from zskt.method.config import Config, read_config
from zskt.method.recipe import AUTO, plan, recipe_texts
from zskt.networks import models
from zskt.networks.classifier import Classifier
from zskt.networks.factories import call_factory, is_factory
from zskt.networks.folder import load_network, save_teacher
from zskt.networks.weights import import_weights
from zskt.paper.baselines import teach
from zskt.paper.training import Images, Training, updates_in
from zskt.runtime import cpu_name, parse_limit, seeded
from zskt.settings import flat

SIZES = ("steps", "bank.rounds", "bank.warmup")


@dataclass(frozen=True)
class Pair:
    """A row of the league."""

    data: str
    teacher: str
    student: str
    budget: str
    epochs: int
    training: Training | None
    """of the teacher; its updates follow from the epochs; without bf16 in the CPU it is fp32; None: from --weights"""
    seeds: Sequence[int] = (0, 1, 2)


GROUP_NORM = f"{Path(__file__).parent / 'group_norm.py'}:wide_resnet"
PAIRS = {
    "A": Pair("digits", "convnet-32", "convnet-8", "60s", 60, Training(1, 64, random_crop=0), range(5)),
    "B": Pair("mnist", "lenet-5", "lenet-5-half", "5m", 20, Training(1, learning_rate=0.01, random_crop=0)),
    "C": Pair("mnist", "resnet-18-16", "wrn-10-1", "5m", 6, Training(1, random_crop=2, precision="bf16")),
    "D": Pair("cifar10", "wrn-16-2", "wrn-16-1", "30m", 40, Training(1, horizontal_flip=True, precision="bf16")),
    "E": Pair("cifar10", GROUP_NORM, "wrn-10-1", "30m", 30, Training(1, horizontal_flip=True, precision="bf16")),
    "F": Pair("cifar10", "wrn-16-1", "wrn-10-1", "30m", 0, None),
}
AUTHORS_STD = (0.2023, 0.1994, 0.2010)
"""What the authors divided pixels by."""


def images(pair: Pair, split: str, seed: int, paths: Sequence[str]) -> Images:
    """The training or test images; of digits, the split follows from the seed."""
    if pair.data == "digits":
        found = digits(seed)[split == "test"]
    else:
        found = read(list(paths), "train" if split == "train" else "test", size=KNOWN[pair.data].size)
    return found.images, found.labels


def make_teacher(
    pair: Pair, seed: int, paths: Sequence[str], folder: Path, stop_after: str | None, weights: Path | None = None
) -> bool:
    """Teach it, or go on; whether it is finished."""
    if (folder / "teacher.json").exists():
        return True
    known, test = KNOWN[pair.data], images(pair, "test", seed, paths)
    if pair.training is None:
        if weights is None:
            raise SystemExit(f"{pair.data}, {pair.teacher}: give the file of its weights with --weights")
        teacher, report = import_weights(
            weights, pair.teacher, known.size, len(known.class_names), known.mean, AUTHORS_STD
        )
        save_teacher(folder, teacher, **report.metadata, measured=measure(teacher, *test))
        return True
    train = images(pair, "train", seed, paths)
    with seeded(seed):
        factory = is_factory(pair.teacher)
        module = (
            call_factory(pair.teacher) if factory else models.build(pair.teacher, len(known.class_names), known.size)
        )
    updates = updates_in(pair.epochs, len(train[0]), pair.training.batch_size)
    fast = torch.cpu._is_avx512_bf16_supported()  # else bf16 is emulated, 10 times slower than fp32
    precision = pair.training.precision if fast else "fp32"
    with teaching() as callback:
        result = teach(
            module,
            train,
            test,
            replace(pair.training, updates=updates, seed=seed, precision=precision),
            mean=known.mean,
            std=known.std,
            class_names=known.class_names,
            out=folder,
            resume=(folder / "checkpoint").exists(),
            stop_after=stop_after,
            callbacks=[callback],
        )
    return result.finished


def make_student(pair: Pair, seed: int) -> torch.nn.Module:
    """The student as every recipe begins with it."""
    known = KNOWN[pair.data]
    with seeded(seed):
        return models.build(pair.student, len(known.class_names), known.size)


def sizes(pair: Pair, recipe: str, teacher: Classifier, path: Path) -> dict[str, Any]:
    """What fits the pair's budget, measured once and kept in a file, or why the recipe cannot run."""
    kept: dict[str, Any] = read_json(path) if path.exists() else {}
    if recipe not in kept:
        try:
            student = make_student(pair, 0)
            planned = plan(teacher, student, recipe, {"steps": 10**6})
            cost = planned.cost or probe(teacher, student, planned.config, planned.make)
            fitted = flat(fit(replace(planned.config, budget=pair.budget), cost, parse_limit(pair.budget)[0]))
            names = SIZES if planned.config.method == "bank" else SIZES[:1]
            kept[recipe] = {name: fitted[name] for name in names} | {"processor": cpu_name()}
        except ZsktError as error:
            kept[recipe] = {"refused": str(error)}
        if path.exists():  # another process may have measured another recipe meanwhile
            kept = read_json(path) | {recipe: kept[recipe]}
        write_json(path, kept)
    found: dict[str, Any] = kept[recipe]
    return found


def run(
    pair: Pair, recipe: str, seed: int, teacher: Classifier, size: dict[str, Any], test: Images, folder: Path, left: str
) -> bool:
    """Distil, or go on; whether the run is finished."""
    settings = {name: value for name, value in size.items() if name in SIZES}
    with distilling() as callback:
        result = zskt.distill(
            teacher,
            make_student(pair, seed),
            recipe,
            seed=seed,
            settings=settings,
            out=folder,
            evaluate=test,
            callbacks=[callback],
            stop_after=left,
            resume=folder.exists(),
        )
    return result.finished


def made_images(config: Config) -> int:
    """Pseudo images that the student learnt from."""
    if config.method == "bank":
        return config.bank.rounds * config.bank.batch_size
    draws = config.student.updates if config.replay.kind == "fresh" else 1
    return config.steps * config.batch_size * draws


def row(pair: Pair, recipe: str, folder: Path) -> dict[str, Any] | None:
    """The league's numbers of a recipe; None before its first seed has finished."""
    runs = [folder / recipe / f"seed-{seed}" for seed in pair.seeds]
    found = [(run, read_json(run / "student.json")) for run in runs if (run / "student.json").exists()]
    if not found:
        return None
    config = read_config(found[0][0] / "config.toml")
    teacher = load_network(folder / f"teacher-{pair.seeds[0]}", trust=True)
    return {
        "recipe": recipe,
        "ran": config.recipe,
        "accuracy": [said["measured"]["accuracy"] for _, said in found],
        "agreement": [said["measured"]["agreement"] for _, said in found],
        "teacher_accuracy": [said["measured"]["teacher_accuracy"] for _, said in found],
        "seconds": [said["seconds"] for _, said in found],
        "pflop": operations(teacher, make_student(pair, 0), config) / 1e15,
        "pseudo_images": made_images(config),
        "steps": config.steps,
        "warnings": [len(said["warnings"]) for _, said in found],
    }


def spread(values: Sequence[float], scale: float = 100, places: int = 2) -> str:
    """Mean ± standard deviation."""
    text = f"{scale * statistics.fmean(values):.{places}f}"
    return text + (f" ± {scale * statistics.stdev(values):.{places}f}" if len(values) > 1 else "")


def write_table(name: str, pair: Pair, folder: Path, recipes: Sequence[str]) -> None:
    """The pair's table, best first."""
    found = [made for recipe in recipes if (made := row(pair, recipe, folder)) is not None]
    if not found:
        return
    found.sort(key=lambda made: -statistics.fmean(made["accuracy"]))
    kept = read_json(folder / "sizes.json")
    head = ["recipe", "accuracy", "teacher", "seeds", "seconds", "PFLOP", "pseudo images", "steps", "sized on"]
    rows = [
        [
            made["recipe"] + (f" ({made['ran']})" if made["ran"] != made["recipe"] else ""),
            spread(made["accuracy"]),
            spread(made["teacher_accuracy"]),
            str(len(made["accuracy"])),
            spread(made["seconds"], 1, 0),
            f"{made['pflop']:.3g}",
            f"{made['pseudo_images']:,}",
            f"{made['steps']:,}",
            kept[made["recipe"]]["processor"],
        ]
        for made in found
    ]
    refused = {recipe: said["refused"] for recipe, said in kept.items() if "refused" in said}
    rows += [[recipe, f"refused: {why.split(';')[0]}", *[""] * (len(head) - 2)] for recipe, why in refused.items()]
    teacher = "WRN-10-2 with GroupNorm" if pair.teacher == GROUP_NORM else pair.teacher
    title = f"League, pair {name}: {pair.data}, {teacher} to {pair.student}, {pair.budget}"
    record.write(f"league-{name.lower()}", title, {"rows": found, "refused": refused}, head, rows)


def main() -> None:
    """Run what is missing, in the order pair, seed, recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", choices=PAIRS)
    parser.add_argument("--recipes", nargs="+", default=[*recipe_texts(), AUTO])
    parser.add_argument("--seeds", type=int, help="only the first so many")
    parser.add_argument("--mnist", nargs="+", default=[])
    parser.add_argument("--cifar10", nargs="+", default=[])
    parser.add_argument("--weights", type=Path, help="of the teacher of pair F, a .pth.tar file")
    parser.add_argument("--out", type=Path, default=Path("runs/league"))
    parser.add_argument("--sizes", action="store_true", help="only measure how many steps fit the time")
    parser.add_argument("--table", action="store_true", help="only write the table of what has finished")
    parser.add_argument("--stop-after", default="1000h", help="stop after so long, as in 90m; the same command goes on")
    arguments = parser.parse_args()
    deadline = time.monotonic() + parse_limit(arguments.stop_after)[0]

    def left() -> str | None:
        seconds = deadline - time.monotonic()
        return f"{seconds:.0f}s" if seconds >= 1 else None

    for name in arguments.pairs:
        pair, folder = PAIRS[name], arguments.out / name
        paths = getattr(arguments, pair.data, [])
        if arguments.table:
            write_table(name, pair, folder, arguments.recipes)
            continue
        for seed in pair.seeds[: 1 if arguments.sizes else arguments.seeds]:
            if not (limit := left()) or not make_teacher(
                pair, seed, paths, folder / f"teacher-{seed}", limit, arguments.weights
            ):
                return
            teacher, test = load_network(folder / f"teacher-{seed}", trust=True), images(pair, "test", seed, paths)
            for recipe in arguments.recipes:
                size = sizes(pair, recipe, teacher, folder / "sizes.json")
                out = folder / recipe / f"seed-{seed}"
                if arguments.sizes or "refused" in size or (out / "student.json").exists():
                    continue
                notice(f"{name}, {recipe}, seed {seed}: {json.dumps(size)}")
                if not (limit := left()) or not run(pair, recipe, seed, teacher, size, test, out, limit):
                    return
        if not arguments.sizes:
            write_table(name, pair, folder, arguments.recipes)


if __name__ == "__main__":
    main()

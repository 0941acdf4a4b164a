"""How good is a student where there are no data to say? Images on which it contradicts its teacher, or another student.

Told as disagreements per 100 images, as none of these images is like real ones and no number here is an accuracy. How
well each has ordered students by their accuracy is a matter of measurement, by `rank_correlations`.

M images, K classes, in the student's normalised space.
"""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zskt.errors import UsageError, ZsktError, failing
from zskt.evaluate.controls import untrained
from zskt.evaluate.measures import check_networks, wilson
from zskt.evaluate.transitions import renormalised
from zskt.files import expanded, read_json, read_sealed, sealed, write_json
from zskt.method.build import METHODS
from zskt.method.config import Config, read_config
from zskt.method.generator import Generator, pseudo_images
from zskt.networks.classifier import Classifier
from zskt.networks.observe import evaluating, forward_flops
from zskt.run.checkpoint import HALF_WAY, read_finished
from zskt.run.distill import saved_generator
from zskt.runtime import stream

FILE = "without-data.json"
FLOPS = 1_000_000_000_000
"""Operations that asking both networks takes at the most: some ten seconds of a processor core."""
KINDS = {
    "pseudo": "fresh pseudo images that it was not trained on",
    "earlier": "images of the generator half-way through the run",
    "mixed": "means of two fresh pseudo images",
    "noise": "images of uniform noise",
}
MOST = 50
"""Of 100 images, on which a student has to contradict its teacher, or name one class, to be doubted."""
TRACKING = Path(__file__).with_name("tracking.json")
"""Measured rank correlations, as benchmarks/tracking.py writes them."""


def inspect_run(
    folder: Path, student: Classifier, teacher: Classifier | None = None, others: Mapping[str, Classifier] | None = None
) -> dict[str, Any]:
    """Disagreements of a finished run's student with its teacher and with other runs' students, by name.

    By network, "teacher" and the names of `others` under "students", and kind of image: a number per 100 images with
    its 95 % interval, and how many images were asked about. Beside the teacher "untrained" says what a network like the
    student has with random weights, where its layers can be initialised anew. The file in the run's folder keeps what
    was found before of other networks. Raises ZsktError for networks that do not fit together or a teacher that is not
    the run's.
    """
    students = dict(others or {})
    before = read_inspected(folder) or {"students": {}}
    recorded = read_finished(folder).get("teacher_fingerprint")
    if teacher is not None and (found := teacher.fingerprint()) != recorded:
        raise ZsktError(
            f"expected the teacher of {folder}, {str(recorded)[:12]}, found {found[:12]}; give the same one"
        )
    networks = [*([] if teacher is None else [teacher]), *students.values()]
    for network in networks:
        check_networks(student, network)
    probes = draw_probes(folder, student, probe_count(student, student, *networks))
    result: dict[str, Any] = {
        "students": {name: disagreements(student, each, probes) for name, each in students.items()}
    }
    if teacher is not None:
        result["teacher"] = disagreements(student, teacher, probes)
        with contextlib.suppress(ZsktError):
            result["untrained"] = disagreements(untrained(student), teacher, probes)
    write_json(folder / FILE, sealed(before | result | {"students": before["students"] | result["students"]}))
    return result


def read_inspected(folder: Path) -> dict[str, Any] | None:
    """What `inspect_run` found of a run, if it was asked; raises ZsktError if its file is not as it was written."""
    path = folder / FILE
    if not path.exists():
        return None
    found: dict[str, Any] = read_sealed(path)
    what = f"{path} is damaged"
    with failing(
        what, "delete it and ask again with zskt inspect", kinds=(LookupError, TypeError, AttributeError, ValueError)
    ):
        for kinds in (found.get("teacher", {}), found.get("untrained", {}), *found["students"].values()):
            for kind, numbers in kinds.items():
                if not (kind in KINDS and 0 <= numbers["low"] <= numbers["per_100"] <= numbers["high"] <= 100):
                    raise ValueError(f"{kind}: {numbers}")
    return found


def probe_count(*networks: Classifier) -> int:
    """Images of each kind: 1,000, or as many as FLOPS allow, at least 100."""
    each = len(KINDS) * sum(forward_flops(network.module, network.input_size) for network in networks)
    return max(100, min(1_000, FLOPS // max(1, each)))


def draw_probes(folder: Path, student: Classifier, count: int) -> dict[str, Tensor]:
    """Images (count, C, H, W) of every kind of KINDS that the run in `folder` has a generator for.

    Pixels optimised without a generator leave noise alone, as does a method of the user's own.
    """
    config = read_config(folder / "config.toml")
    seed = stream(config.seed, "without data")
    pixels = torch.rand(count, *student.input_size, generator=torch.Generator().manual_seed(seed))
    probes = {"noise": student.normalise(pixels)}
    if config.method not in METHODS or config.bank.pixels:
        return probes
    fresh = _generated(saved_generator(folder, student, config), student, config, 2 * count, seed)  # (2 count, C, H, W)
    probes |= {"pseudo": fresh[:count], "mixed": (fresh[:count] + fresh[count:]) / 2}
    if (folder / f"{HALF_WAY}.safetensors").exists():
        earlier = saved_generator(folder, student, config, HALF_WAY)
        probes["earlier"] = _generated(earlier, student, config, count, seed)
    return {kind: probes[kind] for kind in KINDS if kind in probes}


def _generated(generator: Generator, student: Classifier, config: Config, count: int, seed: int) -> Tensor:
    """Images (count, C, H, W), in batches as in training, on whose statistics the generator runs."""
    size = max(2, config.bank.batch_size if config.method == "bank" else config.batch_size)
    batches = [pseudo_images(generator, generator.latent, size, seed + i) for i in range(-(-count // size))]
    return torch.cat(batches)[:count].to(student.normalise(torch.zeros(1, *student.input_size)))


def disagreements(student: Classifier, other: Classifier, probes: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """By kind of image: on how many of 100 the two networks predict different classes, and the 95 % interval.

    Also the class that the student names most often, on how many of 100, and on how many the other does.
    """
    found = {}
    with evaluating(student), evaluating(other):
        for kind, images in probes.items():
            batches = torch.split(images, 100)
            ours = torch.cat([student(x).argmax(dim=1).cpu() for x in batches])  # (M,)
            theirs = torch.cat([other(renormalised(x, student, other)).argmax(dim=1).cpu() for x in batches])  # (M,)
            count, share = int((ours != theirs).sum()), 100 / len(images)
            low, high = wilson(count, len(images))
            favourite = int(ours.bincount().argmax())
            found[kind] = {
                "per_100": share * count,
                "low": 100 * low,
                "high": 100 * high,
                "images": len(images),
                "favourite": favourite,
                "favourite_per_100": share * int((ours == favourite).sum()),
                "theirs_per_100": share * int((theirs == favourite).sum()),
            }
    return found


def doubts(result: Mapping[str, Any]) -> list[str]:
    """What of the result is a reason not to use the student: lines as of a run's warnings."""
    found, random = result.get("teacher", {}), result.get("untrained", {})
    lines = []
    if worst := [kind for kind in ("pseudo", "earlier") if kind in found and found[kind]["low"] >= MOST]:
        number = found[worst[0]]["per_100"]
        lines.append(
            f"contradicts its teacher: on {number:.0f} of 100 {KINDS[worst[0]]}; more steps, then a larger student"
        )
    if found and all(kind in random and found[kind]["high"] >= random[kind]["per_100"] for kind in found):
        lines.append(
            "as good as untrained: the student disagrees with its teacher no less than a network like it with random "
            "weights; check the normalisation, then more steps"
        )
    for kind, numbers in found.items():
        ours, theirs = numbers.get("favourite_per_100", 0), numbers.get("theirs_per_100", 0)
        if ours >= MOST and theirs <= ours / 2:
            lines.append(
                f"one class for most: the student names class {numbers['favourite']} on {ours:.0f} of 100 "
                f"{KINDS[kind]}, its teacher on {theirs:.0f}; --recipe auto, or more steps"
            )
            break
    return lines


def told(result: Mapping[str, Any]) -> list[str]:
    """The result in plain sentences, and what is known of their worth."""
    lines = []
    pairs = {"its teacher": result.get("teacher", {})}
    pairs |= {f"that of {name}": kinds for name, kinds in result["students"].items()}
    for whom, kinds in pairs.items():
        for kind, found in kinds.items():
            number, low, high = (f"{found[key]:.1f}" for key in ("per_100", "low", "high"))
            seen = f"the student and {whom} disagree on {number} ({low} to {high})"
            worth = ""
            if whom == "its teacher":
                if random := result.get("untrained", {}).get(kind):
                    seen += f"; a network like it with random weights would on {random['per_100']:.1f}"
                worth = _tracked(kind)
            lines.append(f"of 100 {KINDS[kind]}, {seen}{worth}")
    return [*lines, "fewer is better, but none of these images is like real ones: no number here is an accuracy"]


def _tracked(kind: str) -> str:
    """How well disagreements with the teacher have ordered students by accuracy, where that has been measured."""
    if not TRACKING.exists():
        return ""
    measured = read_json(TRACKING)
    worth = measured["rank_correlations"].get(kind)
    if worth is None:
        return ""
    where = f"{measured['runs']} runs on {measured['on']}"
    return f"; over {where} few of these went with a high accuracy, rank correlation {worth:.2f}"


def rank_correlations(folders: Sequence[str | Path]) -> dict[str, Any]:
    """How well few disagreements with the teacher meant a high accuracy on real images, over finished runs.

    By kind of image, Spearman's rank correlation of accuracy with minus the disagreements: 1 if they order the students
    alike. Reads each run's FILE and the accuracy in its student.json; all runs must have one teacher, as a student's
    accuracy depends on it more than on anything else.
    """
    if len(folders) < 3:
        raise UsageError(f"expected at least three runs to correlate, found {len(folders)}; give more")
    accuracies, found, teachers = [], [], set()
    for folder in map(expanded, folders):
        facts = read_finished(folder)
        if "accuracy" not in facts.get("measured", {}):
            raise ZsktError(
                f"expected a run that was evaluated on test images, found no accuracy in {folder}; give those with one"
            )
        accuracies.append(facts["measured"]["accuracy"])
        teachers.add(facts.get("teacher_fingerprint"))
        found.append((read_inspected(folder) or {}).get("teacher", {}))
    if len(teachers) > 1:
        raise ZsktError(f"expected runs of one teacher, found {len(teachers)}; correlate those of each teacher alone")
    kinds = [kind for kind in KINDS if all(kind in each for each in found)]
    return {
        "runs": len(folders),
        "rank_correlations": {kind: spearman([-each[kind]["per_100"] for each in found], accuracies) for kind in kinds},
    }


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation, with mean ranks for ties; None if either side is constant."""
    ranks = []
    for values in (first, second):
        x = torch.tensor(values, dtype=torch.float64)
        below, equal = (x[:, None] > x).sum(dim=1), (x[:, None] == x).sum(dim=1)  # (R,) each, of R runs
        ranks.append(below + (equal - 1) / 2)
    a, b = (rank - rank.mean() for rank in ranks)
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale else None

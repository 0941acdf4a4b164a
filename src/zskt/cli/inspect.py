"""The inspect subcommand. Its docstring is the help text."""

import statistics
import time
from pathlib import Path

import torch
import tyro
from rich.markup import escape
from rich.table import Table

from zskt.cli.options import Assignments, Text, Words
from zskt.cli.progress import console, notice, warn
from zskt.cli.teachers import FOREIGN, Network, Options, Result, open_networks, said_progress, say_if_larger
from zskt.errors import UsageError, printable
from zskt.evaluate.measures import noise_classes
from zskt.files import expanded, read_sealed
from zskt.method.budget import duration, expected_seconds, operations, probe
from zskt.method.recipe import AUTO, choose, plan
from zskt.networks.classifier import Classifier, count_parameters
from zskt.networks.factories import parse_arguments
from zskt.networks.observe import batchnorm_layers, evaluating, find_stages, forward_flops, stage_resolutions
from zskt.networks.students import describe_student, make_student
from zskt.run.without_data import doubts, inspect_run, told

NOISE_FLOPS = 200_000_000_000
"""FLOPs that `zskt inspect` spends on noise images."""


def run_inspect(
    what: tyro.conf.Positional[Network],
    /,
    *,
    student: Text = None,
    student_args: Assignments = (),
    teacher: Text = None,
    other: Words = (),
    foreign: Options = FOREIGN,
) -> Result:
    """Show what zskt finds in a network, what distilling it would do, and how good a student is without data.

    For a run's student, --teacher and --other count disagreements with its teacher and with other students: on fresh
    pseudo images, on those of the generator half-way through the run, on mixed ones and on noise.

    Example: zskt inspect runs/a --teacher teacher --other runs/b

    Args:
        what: a teacher or run folder (if stopped: the student of its newest checkpoint), a Hugging Face folder, a .pt2
            or TorchScript file, package.module:factory, file.py:factory, timm:NAME or torchvision:NAME.
        student: also show what distilling into this network, specified as in zskt distill, would do.
        student_args: arguments for the student's factory.
        teacher: of a run folder: also count the student's disagreements with this network, its teacher.
        other: of a run folder: also count its disagreements with these runs' students, of other seeds, say.
    """
    if (teacher or other) and not (expanded(what) / "student.json").exists():
        raise UsageError(f"--teacher and --other are for a finished run, found {printable(what)}; give its folder")
    loaded, *compared = (
        each for each in open_networks([what, teacher, *other], foreign, unfinished=True) if each is not None
    )
    network = loaded.teacher
    stages = find_stages(network.module, network.input_size)
    config, reason = choose(AUTO, network)
    flops = forward_flops(network.module, network.input_size)
    norms = len(batchnorm_layers(network.module))
    count = max(100, min(1_000, NOISE_FLOPS // max(1, flops)))  # noise images: a few seconds of work
    result: Result = {
        "kind": loaded.kind,
        "model": spec if isinstance(spec := getattr(network.module, "spec", None), str) else None,
        "input_size": list(network.input_size),
        "num_classes": network.num_classes,
        "output": network.output,
        "mean": network.mean.flatten().tolist(),
        "std": network.std.flatten().tolist(),
        "normalisation_from": loaded.normalisation,
        "parameters": count_parameters(network.module),
        "flops": flops,
        "latency_ms": latency(network),
        "batchnorm_layers": norms,
        "stages": list(stages),
        "stage_resolutions": [list(side) for side in stage_resolutions(network.module, stages, network.input_size)],
        "noise_classes": noise_classes(network, count),
        "recipe": config.recipe,
        "reason": reason,
        "attention": f"possible, {len(stages)} stages" if stages else "not possible: no stages to compare",
        "batchnorm_prior": f"possible, {norms} layers" if norms else "not possible: no BatchNorm statistics",
        "notes": [*network.notes, *([loaded.lost] if loaded.lost else [])],
    }
    result |= said_progress(loaded)
    stopped = loaded.unfinished
    own = recorded_images(expanded(what)) if stopped is None else stopped.get("images", 0)
    if type(own) is int and own:
        result["images"] = own
        result["notes"].append(f"distilled with {own:,} unlabelled images beside the pseudo images: not data-free")
    if student is not None:
        module = make_student(student, network, parse_arguments(student_args, "--student-args"))
        notice(f"student {describe_student(module, network)}")
        say_if_larger(module, network)
        planned = plan(network, module)
        config = planned.config
        notice("timing a few steps")
        cost = planned.cost or probe(network, module, config, planned.make)
        result |= {
            "reason": planned.reason,
            "student_parameters": count_parameters(module),
            "student_flops": forward_flops(module, network.input_size),
            "student_fraction": round(count_parameters(module) / max(1, count_parameters(network.module)), 4),
            "generator_width": config.generator.width,
            "attention_pairs": list(config.student.loss.stages),
            "steps": config.steps,
            "takes": duration(expected_seconds(config, cost)),
            "pflop": float(f"{operations(network, module, config) / 1e15:.2g}"),
        }
    table = Table("", "found", title=escape(printable(what)))
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else escape(printable(value)))
    console().print(table)
    if compared:
        first = compared.pop(0).teacher if teacher is not None else None
        others = {name: each.teacher for name, each in zip(other, compared, strict=True)}
        found = inspect_run(expanded(what), network, first, others)
        for line in told(found):
            notice(line)
        for line in doubts(found):
            warn(line)
        result["disagreements"] = found
    return result


def recorded_images(folder: Path) -> int:
    """How many images of the user's own a finished run in this folder had; 0 for anything else."""
    path = folder / "student.json"
    found = read_sealed(path).get("images", 0) if path.exists() else 0
    return found if type(found) is int else 0


def latency(network: Classifier, seconds: float = 1.0) -> float | None:
    """Median milliseconds of a forward pass of one image, over about `seconds` after three warm-up passes.

    None if the network does not accept a single image.
    """
    image = torch.zeros(1, *network.input_size, dtype=torch.uint8)
    x = network.normalise(image)  # (1, C, H, W)
    times: list[float] = []
    with evaluating(network):
        while len(times) < 4 or (sum(times) < seconds and len(times) < 100):
            begun = time.perf_counter()
            try:
                network(x)
            except Exception:  # a network from elsewhere may raise anything for a batch that it does not take
                return None
            times.append(time.perf_counter() - begun)
    return round(1e3 * statistics.median(times[3:]), 3)

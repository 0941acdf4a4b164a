"""Subcommands for distillation runs. Their docstrings are the help texts."""

import contextlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from zskt.cli.again import recall, remember
from zskt.cli.given import AS_THE_RECIPE_SAYS, SHORTCUTS, Overrides, read_settings
from zskt.cli.options import Assignments, File, Text, Time, typed
from zskt.cli.progress import bar, distilling, notice, say_if_busy, say_if_emulated, warn
from zskt.cli.teachers import (
    FOREIGN,
    Data,
    Network,
    Options,
    Result,
    open_method,
    open_network,
    open_networks,
    own_images,
    said_progress,
    say_if_larger,
    test_images,
)
from zskt.errors import UsageError, ZsktError
from zskt.evaluate.measures import check_networks, measure
from zskt.evaluate.transitions import renormalised
from zskt.files import expanded
from zskt.method.budget import Cost, disk, duration, expected_seconds, operations, probe
from zskt.method.config import Config
from zskt.method.generator import SAMPLES
from zskt.method.recipe import describe_method, plan, recipe_for
from zskt.method.stage_pairs import describe_pairs, stage_pairs
from zskt.networks import ranks
from zskt.networks.classifier import count_parameters
from zskt.networks.factories import is_factory, parse_arguments
from zskt.networks.folder import load_student
from zskt.networks.students import describe_student, make_student
from zskt.run import checkpoint
from zskt.run.distill import begun_config, distill, sampler
from zskt.run.loggers import to_tensorboard
from zskt.run.own_images import refuse_own_images
from zskt.run.plots import believed_grid, save_image
from zskt.run.report import write_report
from zskt.run.synthetic import UPDATES, synthesise, write_synthetic
from zskt.run.without_data import doubts, inspect_run, told
from zskt.runtime import pick_device
from zskt.settings import replace

LONG_WORK = 3e13
"""Operations, a minute on a few cores, from which on a run is timed before it starts."""


def run_distill(
    teacher: tyro.conf.Positional[
        Annotated[str | None, tyro.conf.arg(metavar="NETWORK", help_behavior_hint="")]
    ] = None,
    /,
    *,
    student: Text = None,
    student_args: Assignments = (),
    out: Path,
    recipe: Text = None,
    config: File = None,
    method: Text = None,
    evaluate: Annotated[Data, tyro.conf.arg(name="eval")] = (),
    images: File = None,
    log: Annotated[Literal["tensorboard"] | None, tyro.conf.arg(metavar="tensorboard", help_behavior_hint="")] = None,
    stop_after: Time = None,
    resume: bool = False,
    settings: Annotated[Assignments, tyro.conf.arg(name="set")] = (),
    overrides: Annotated[Overrides, tyro.conf.arg(name="")] = AS_THE_RECIPE_SAYS,
    foreign: Options = FOREIGN,
) -> Result:
    """Distil a teacher into a smaller student without any data.

    Example: zskt distill teacher --student wrn-16-1 --out runs/a --steps 2000 --eval cifar10-test.zip

    Args:
        teacher: a teacher or run folder, a Hugging Face folder, a .pt2 or TorchScript file, package.module:factory,
            file.py:factory, timm:NAME or torchvision:NAME.
        student: auto:0.25 for the teacher's architecture at about that fraction of its parameters; pruned:0.25 for the
            same, but begun as the teacher without its weakest channels (networks of zskt, transformers' ResNet);
            wrn-DEPTH-WIDTH, resnet-18, resnet-34 or vgg-11 (these also with -WIDTH), lenet-5, lenet-5-half or
            convnet-WIDTH; package.module:factory, file.py:factory, timm:NAME or torchvision:NAME; a run folder, to go
            on from its student.
        student_args: arguments for the student's factory, as in depth=20 classes=37.
        out: output folder: log, checkpoints, sample images, student, report.
        recipe: a name from `zskt recipes`, or auto, the default.
        config: a TOML file of settings that override the recipe's, such as another run's config.toml.
        method: file.py:function or package.module:function that builds a custom method; runs that code, needs --trust.
        evaluate: labelled test images, used for evaluation only, never for training.
        images: a folder or archive of unlabelled images that you do have, as in --images photos: they join the pseudo
            images of a bank, and the student is no longer data-free.
        log: also for TensorBoard: tensorboard --logdir OUT shows it while the run goes on.
        stop_after: stop after a time (90s, 9m, 2h) or a number of steps; continue with --resume.
        resume: continue the run in --out from its last checkpoint; with nothing else, by the command that began it.
        settings: short for the options below, with the names that `zskt recipes NAME` prints.
        overrides: settings.
    """
    resume = resume or checkpoint.restarted(expanded(out))
    if resume and teacher is None and student is None:
        words, foreign = recall(out, foreign.trust)
        teacher, student = words["teacher"], words["student"]
        student_args, method = words.get("student_args", ()), words.get("method")
        evaluate, log = evaluate or words.get("evaluate", ()), log or words.get("log")
        images = images or (Path(words["images"]) if "images" in words else None)
        config = config or expanded(out) / "config.toml"
    if teacher is None or student is None:
        missing = "a teacher" if teacher is None else "--student"
        raise UsageError(f"expected a teacher and --student, found no {missing.removeprefix('a ')}; give {missing}")
    words = {"teacher": teacher, "student": student, "student_args": student_args, "method": method}
    words |= {"evaluate": evaluate, "images": images, "log": log}
    network = open_network(teacher, foreign).teacher
    make = None if method is None else open_method(method, foreign.trust)
    base, changes = read_settings(recipe, config, settings, typed(overrides, SHORTCUTS), make)
    if is_factory(student):
        notice(f"note: --student {student} runs the code of that file or package")
    seed = replace(Config(), {"seed": changes.get("seed", 0)}).seed
    module = make_student(student, network, parse_arguments(student_args, "--student-args"), seed=seed)
    notice(f"student {describe_student(module, network)}")
    say_if_larger(module, network)
    begun = begun_config(out) if resume else None
    if images is not None:  # refused before they are read
        own_method = None if make is None else Config(method=describe_method(make))
        refuse_own_images(begun or own_method or recipe_for(network, base, changes))
    own = None if images is None else own_images(images, network)
    count = 0 if own is None else len(own)
    planned = plan(network, module, base, changes, make, begun, count)
    chosen = planned.config
    notice(f"recipe {chosen.recipe} ({planned.reason}), {chosen.steps:,} steps{said_size(chosen)}")
    say_if_busy(chosen.machine.threads, lambda: network(network.normalise(torch.zeros(16, *network.input_size))))
    say_if_emulated(chosen.machine.precision, chosen.machine.device)
    if make is None and not resume:
        cost, work = planned.cost, operations(network, module, chosen, count)
        if cost is None and work > LONG_WORK:
            notice("timing a few steps")
            cost = Cost(**ranks.from_main(lambda: asdict(probe(network, module, chosen, planned.make))))
        takes = "" if cost is None else f"about {duration(expected_seconds(chosen, cost, count))}, "
        space = disk(network, module, chosen, count) / 1e6
        notice(f"this takes {takes}{work / 1e15:.2g} PFLOP and about {max(1, space):,.0f} MB in {out}")
    if pairs := chosen.student.loss.stages:
        notice(f"attention transfer compares {describe_pairs(network, module, stage_pairs(network, module, pairs))}")
    test = test_images(evaluate, network) if evaluate else None
    if own is not None:
        notice(f"{count:,} images of yours join the bank: the student is no longer data-free")
    loggers = [remember(out, words, foreign), *([] if log is None else [to_tensorboard(out)])]
    with distilling() as callback:
        result = distill(
            network,
            module,
            planned,
            out=out,
            evaluate=test,
            images=own,
            callbacks=[callback, *loggers],
            stop_after=stop_after,
            resume=resume,
        )
    for line in result.warnings:
        warn(line)
    if not ranks.is_main():
        return {}
    found, doubted = {}, []
    if result.finished:
        found = inspect_run(out, result.network.cpu(), network.cpu())
        for line in told(found):
            notice(line)
        for line in (doubted := doubts(found)):
            warn(line)
        write_report([out], out / "report.html")
        notice(f"report: {out / 'report.html'}")
    else:
        notice(f"stopped at step {result.step:,} of {chosen.steps:,}; continue with --resume")
    return {
        "finished": result.finished,
        "step": result.step,
        "recipe": chosen.recipe,
        "student": str(out),
        "student_parameters": count_parameters(module),
        "teacher_parameters": count_parameters(network.module),
        **({"images": result.images} if result.images else {}),
        **result.measured,
        **({"disagreements": found["teacher"]} if found else {}),
        **({"notes": list(network.notes)} if network.notes else {}),
        "warnings": [*result.warnings, *doubted],
    }


def said_size(config: Config) -> str:
    """The images of a bank, in words."""
    if config.method != "bank":
        return ""
    return f", {config.bank.rounds:,} rounds of {config.bank.batch_size} images"


def run_evaluate(
    model: tyro.conf.Positional[Network],
    /,
    *,
    data: Data,
    teacher: Text = None,
    device: str = "auto",
    foreign: Options = FOREIGN,
) -> Result:
    """Evaluate a network on labelled test images and, with --teacher, its agreement with that teacher.

    Example: zskt evaluate runs/a --data cifar10-test.zip --teacher teacher

    Args:
        model: a teacher or run folder (if stopped: the student of its newest checkpoint), a Hugging Face folder, a .pt2
            or TorchScript file, package.module:factory, file.py:factory, timm:NAME or torchvision:NAME.
        data: labelled images, as in zskt teach; the test split is used.
        teacher: also measure agreement with this network and divergence from it; specified as NETWORK is.
        device: auto, cpu, cuda or cuda:N.
    """
    where = pick_device(device)
    model_found, teacher_found = open_networks([model, teacher], foreign, unfinished=True)
    assert model_found is not None
    network = model_found.teacher.to(where)
    other = None if teacher_found is None else teacher_found.teacher.to(where)
    return said_progress(model_found) | measure(network, *test_images(data, network), other)


def run_sample(
    run: tyro.conf.Positional[Path],
    /,
    *,
    out: Path,
    teacher: Text = None,
    method: Text = None,
    seed: int = 0,
    foreign: Options = FOREIGN,
) -> Result:
    """Draw 64 pseudo images of a finished run, labelled with the student's predictions.

    Example: zskt sample runs/a --teacher teacher --out samples.png

    Args:
        run: a run folder.
        out: the PNG to write.
        teacher: also show the predictions of this network, specified as in zskt distill.
        method: for a run with a custom method, as in zskt distill; needs --teacher and --trust.
        seed: which images are drawn.
    """
    check_suffix(out, ".png")
    student = load_student(run, trust=foreign.trust)
    network = None if teacher is None else open_network(teacher, foreign).teacher
    make = None if method is None else open_method(method, foreign.trust)
    x = sampler(run, student, method=make, teacher=network)(SAMPLES, seed)  # (64, C, H, W)
    with torch.no_grad():
        beliefs = {"S": student(x)}  # (64, K)
    if network is not None:
        check_networks(student, network)
        beliefs = {"T": network(renormalised(x, student, network))} | beliefs
    save_image(out, believed_grid(student.denormalise(x), beliefs, student.class_names))
    return {"images": len(x), "out": str(out)}


def check_suffix(out: Path, suffix: str) -> None:
    """Raise UsageError for a file of another kind, which is replaced if it exists: a network's weights, say."""
    if out.suffix.lower() != suffix:
        raise UsageError(f"--out {out}: expected a name that ends in {suffix}; choose another")


def run_images(
    teacher: tyro.conf.Positional[Network],
    /,
    *,
    out: Path,
    count: int = 1024,
    views: int = 1,
    updates: int = UPDATES,
    seed: int = 0,
    device: str = "auto",
    foreign: Options = FOREIGN,
) -> Result:
    """Make images that a network recognises, without data: to calibrate a quantiser or to fine-tune a pruned network.

    Writes images.npz (images in [0, 1] and the network's probabilities, one row per view) and the same images as PNGs.
    They are no real images: measure what was made with them on real ones.

    Example: zskt images teacher --out images --count 1024 --views 8

    Args:
        teacher: a teacher or run folder, a Hugging Face folder, a .pt2 or TorchScript file, package.module:factory,
            file.py:factory, timm:NAME or torchvision:NAME.
        out: the folder to write.
        count: images, about as many of each class.
        views: rows per image: itself, then random crops and flips, each with the network's own probabilities.
        updates: optimisation steps of each batch of 256 images; time is in proportion.
        seed: for everything random.
        device: auto, cpu, cuda or cuda:N.
    """
    if out.exists():
        raise ZsktError(f"{out} already exists; choose another --out or remove it")
    network = open_network(teacher, foreign).teacher
    with bar("synthesising", "updates") as show:
        found = synthesise(
            network,
            count,
            views=views,
            updates=updates,
            seed=seed,
            device=device,
            progress=lambda done, total: show(done, total, ""),
            notice=notice,
        )
    write_synthetic(out, found, network, updates=updates, seed=seed)
    sure = f"the network recognises {100 * found.recognised:.0f} of 100 as the class they were made for"
    notice(f"{count:,} images, {views} views of each: {sure}, mean confidence {found.confidence:.2f}")
    return {
        "images": count,
        "views": views,
        "recognised": found.recognised,
        "teacher_confidence": found.confidence,
        "out": str(out),
    }


FOLLOWING = 10
"""Seconds from one report to the next."""


def run_report(runs: tyro.conf.Positional[tuple[Path, ...]], /, *, out: File = None, follow: bool = False) -> Result:
    """Write an HTML report on one run, or on several with mean and standard deviation.

    Example: zskt report runs/seed-0 runs/seed-1 runs/seed-2 --out report.html

    Args:
        runs: one or more run folders.
        out: the report; by default report.html in the run folder, or in the current folder for several runs.
        follow: write it anew every ten seconds until all runs have finished; the open page follows.
    """
    if not runs:
        raise UsageError("expected at least one run folder, found none")
    if out is not None:
        check_suffix(out, ".html")
    path = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    if follow:
        write_report(runs, path, reload=FOLLOWING)
        notice(f"{path} is written every {FOLLOWING} s until the runs have finished; Ctrl-C ends it")
        with contextlib.suppress(KeyboardInterrupt):  # the last one does not load itself anew
            while not all((expanded(run) / "student.json").exists() for run in runs):
                time.sleep(FOLLOWING)
                write_report(runs, path, reload=FOLLOWING)
    measured = write_report(runs, path)
    return {"report": str(path), **measured}

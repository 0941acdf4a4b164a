"""The command line: one subcommand is one library call.

The last line on stdout is one JSON object; everything else goes to stderr. Exit status: 0 done, 1 the work failed,
2 bad usage, 130 or 143 interrupted with a checkpoint written.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.table import Table

from zskt import demo, models
from zskt.baselines import Teaching, teach
from zskt.belief import measure
from zskt.checkpoint import Interrupted
from zskt.config import flat, from_text, to_toml
from zskt.data import KNOWN, Dataset, read
from zskt.distill import distill, plan, sample
from zskt.features import batchnorm_layers, find_stages, forward_flops
from zskt.figures import image_grid, save_image
from zskt.files import UsageError, ZsktError, cannot
from zskt.importing import NOT_VERIFIED, import_weights, parse_renames, unit_normalisation
from zskt.progress import bar, console, distilling, notice, teaching
from zskt.recipe import AUTO, choose, load_recipe, recipe_texts
from zskt.report import write_report
from zskt.teacher import Teacher, count_parameters, load_network, save_teacher

Result = dict[str, Any]
Data = Annotated[tuple[str, ...], tyro.conf.arg(metavar="DATA...")]
Size = tuple[int, int, int]


def _read(sources: Sequence[str], split: Literal["train", "test"], size: Size | None) -> Dataset:
    with bar(f"reading {split} images", "images") as show:
        return read(sources, split, size=size, progress=lambda done, total: show(done, total, ""), notice=notice)


def _test_images(sources: Sequence[str], network: Teacher) -> tuple[torch.Tensor, torch.Tensor]:
    """Test images and labels for a network, after a look at whether the classes are the network's."""
    test = _read(sources, "test", network.input_size)
    if len(test.class_names) != network.num_classes:
        raise ZsktError(
            f"expected data of {network.num_classes} classes, found {len(test.class_names)}: "
            f"{', '.join(test.class_names[:5])}, ...; give the data that the network was trained for"
        )
    if network.class_names is not None and network.class_names != test.class_names:
        notice(
            f"note: the network's classes are called {network.class_names[:3]}..., the data's {test.class_names[:3]}..."
        )
    return test.images, test.labels


# The subcommands. Their docstrings are the help texts.


def run_demo(*, recipe: str = AUTO, seed: int = 0, out: Path | None = None) -> Result:
    """The whole story in a minute: train a teacher on handwritten digits, forget the data, distil, measure.

    Example: zskt demo --recipe zskt-prior --seed 1

    Args:
        recipe: a name from `zskt recipes`, or auto.
        seed: of both networks, the generator and the latents; the split of the data is always the same.
        out: folder for the result; by default runs/demo-1, runs/demo-2, ...
    """
    started = time.monotonic()
    result = demo.run(recipe, seed=seed, out=out)
    return result | {"seconds": round(time.monotonic() - started, 1)}


def run_teach(
    *,
    model: str,
    data: Data,
    out: Path,
    input_size: Size | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    epochs: int = 60,
    batch_size: int = 128,
    learning_rate: float = 0.1,
    weight_decay: float = 5e-4,
    shift: int | None = None,
    mirrored: bool | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    stop_after: str | None = None,
    resume: bool = False,
) -> Result:
    """Train a teacher on labelled images and write it, with its normalisation and accuracy, to a folder.

    Example: zskt teach --model wrn-16-2 --data cifar10-train.zip cifar10-test.zip --out teacher

    Args:
        model: wrn-DEPTH-WIDTH, resnet-18, resnet-34, vgg-11, lenet-5, lenet-5-half or convnet-WIDTH.
        data: zips or folders of split/class/file images, the files of MNIST, CIFAR or SVHN, or the word digits.
        out: folder of the teacher.
        input_size: channels, height and width; by default the images' own.
        mean: per channel, of pixels in [0, 1]; by default the known data set's, else the training images'.
        std: likewise.
        epochs: passes over the training images.
        batch_size: images per update.
        learning_rate: peak of the one-cycle schedule.
        weight_decay: L2 penalty on weights.
        shift: largest random shift in pixels, each way; by default an eighth of the image.
        mirrored: whether to mirror images at random; by default only where a known data set allows it.
        seed: of initialisation, order and augmentation.
        device: auto, cpu, cuda or cuda:N.
        precision: bf16 is faster on hardware that has it.
        stop_after: leave early, after a time (90s, 9m, 2h) or a number of epochs, to go on with --resume.
        resume: go on with an unfinished training in --out.
    """
    train = _read(data, "train", input_size)
    size = train.images.shape[1], train.images.shape[2], train.images.shape[3]
    test = _read(data, "test", size)
    if test.class_names != train.class_names:
        raise ZsktError(
            f"expected equal classes in train and test, found {len(train.class_names)} and {len(test.class_names)}, "
            "or other names; correct the folders"
        )
    known = KNOWN.get(train.name)
    if bool(mean) != bool(std):
        raise UsageError("--mean and --std go together: give both or neither")
    if mean:
        mean, std, lines = unit_normalisation(mean, std)
        for line in lines:
            notice(line)
    elif known is not None and size == known.size:
        mean, std = known.mean, known.std
    else:
        pixels = train.images[:: max(1, len(train.images) // 10_000)].float() / 255
        mean, std = (tuple(round(v, 4) for v in m(dim=(0, 2, 3)).tolist()) for m in (pixels.mean, pixels.std))
        notice(f"normalisation from the training images: mean {mean}, std {std}")
    settings = Teaching(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        shift=min(size[1:]) // 8 if shift is None else shift,
        mirrored=bool(known and known.mirrored) if mirrored is None else mirrored,
        seed=seed,
        device=device,
        precision=precision,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = models.build(model, len(train.class_names), size)
    with teaching() as callback:
        result = teach(
            module,
            (train.images, train.labels),
            (test.images, test.labels),
            settings,
            mean=mean,
            std=std,
            class_names=train.class_names,
            out=out,
            resume=resume,
            stop_after=stop_after,
            callbacks=[callback],
        )
    return {"finished": result.finished, "epoch": result.epoch, **result.measured, "teacher": str(out)}


def run_import(
    weights: tyro.conf.Positional[Path],
    /,
    *,
    model: str,
    input_size: Size,
    num_classes: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    out: Path,
    rename: tuple[str, ...] = (),
    data: Data = (),
) -> Result:
    """Turn somebody else's checkpoint into a teacher folder. Nothing in the file is executed.

    Example: zskt import wrn.pth.tar --model wrn-16-1 --input-size 3 32 32 --num-classes 10
    --mean .4914 .4822 .4465 --std .2023 .1994 .2010 --out teacher --data cifar10-test.zip

    Args:
        weights: a .pth, .pth.tar, .pt or .safetensors file with a state dict somewhere in it.
        model: the network the weights belong to, as in zskt teach.
        input_size: channels, height and width.
        num_classes: classes of the network.
        mean: per channel, of pixels in [0, 1]; numbers above 1 are read as 0..255.
        std: likewise.
        out: folder of the teacher.
        rename: FOREIGN=OURS name components, where no single renaming fits; FOREIGN= drops, FOREIGN=- leaves out.
        data: labelled test images to verify the result with.
    """
    teacher, report = import_weights(weights, model, input_size, num_classes, mean, std, rename=parse_renames(rename))
    for line in report.notices:
        notice(line)
    measured: dict[str, float] = {}
    if data:
        measured = measure(teacher, *_test_images(data, teacher))
        notice(f"accuracy {measured['accuracy']:.4f}")
    else:
        notice(NOT_VERIFIED)
    save_teacher(out, teacher, **report.facts, measured=measured)
    return {"teacher": str(out), "renamed": report.facts["renamed"], "verified": bool(data), **measured}


def run_inspect(teacher: tyro.conf.Positional[Path], /, *, student: str | None = None) -> Result:
    """Show what was found in a teacher folder or a run, and which recipe auto would choose for it.

    Example: zskt inspect teacher --student wrn-10-1

    Args:
        teacher: a teacher folder, or a run folder (its student).
        student: also say what distilling into this network would do.
    """
    network = load_network(teacher)
    stages = find_stages(network.module, network.input_size)
    config, reason = choose(AUTO, network)
    result: Result = {
        "model": getattr(network.module, "spec", None),
        "input_size": list(network.input_size),
        "num_classes": network.num_classes,
        "mean": network.mean.flatten().tolist(),
        "std": network.std.flatten().tolist(),
        "parameters": count_parameters(network.module),
        "flops": forward_flops(network.module, network.input_size),
        "batchnorm_layers": len(batchnorm_layers(network.module)),
        "stages": list(stages),
        "recipe": config.recipe,
        "reason": reason,
    }
    if student is not None:
        module = models.build(student, network.num_classes, network.input_size)
        config, _ = plan(network, module)
        result |= {
            "student_parameters": count_parameters(module),
            "student_flops": forward_flops(module, network.input_size),
            "generator_width": config.generator.width,
        }
    table = Table("", "found", title=str(teacher))
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
    console().print(table)
    return result


def run_distill(
    teacher: tyro.conf.Positional[Path],
    /,
    *,
    student: str,
    out: Path,
    recipe: str = AUTO,
    steps: int | None = None,
    settings: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE...")] = (),
    evaluate: Annotated[tuple[str, ...], tyro.conf.arg(name="eval", metavar="DATA...")] = (),
    seed: int = 0,
    batch_size: int | None = None,
    device: str = "auto",
    precision: Literal["fp32", "bf16"] | None = None,
    stop_after: str | None = None,
    resume: bool = False,
) -> Result:
    """Distil a teacher into a smaller student without any data: the main job.

    Example: zskt distill teacher --student wrn-16-1 --out runs/a --steps 2000 --eval cifar10-test.zip

    Args:
        teacher: a teacher folder, or a run folder (its student).
        student: wrn-DEPTH-WIDTH, resnet-18, resnet-34, vgg-11, lenet-5, lenet-5-half or convnet-WIDTH.
        out: folder of the run: log, checkpoints, sample images, student, report.
        recipe: a name from `zskt recipes`, or auto.
        steps: outer iterations, each of one or more generator updates and several student updates.
        settings: values of the recipe to change, by the names that `zskt recipes NAME` prints.
        evaluate: labelled test images, to measure on and never to train on.
        seed: of the student, the generator and the latents.
        batch_size: pseudo images per batch.
        device: auto, cpu, cuda or cuda:N.
        precision: bf16 is faster on hardware that has it.
        stop_after: leave early, after a time (90s, 9m, 2h) or a number of steps, to go on with --resume.
        resume: go on with the run in --out, exactly where its last checkpoint is.
    """
    network = load_network(teacher)
    changes = dict(map(from_text, settings))
    given = {"steps": steps, "seed": seed, "batch_size": batch_size, "device": device, "precision": precision}
    changes = {name: value for name, value in given.items() if value is not None} | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = models.build(student, network.num_classes, network.input_size)
    config, reason = plan(network, module, recipe, changes)
    notice(f"recipe {config.recipe} ({reason}), {config.steps:,} steps, generator width {config.generator.width}")
    images = _test_images(evaluate, network) if evaluate else None
    with distilling() as callback:
        result = distill(
            network,
            module,
            config,
            out=out,
            evaluate=images,
            callbacks=[callback],
            stop_after=stop_after,
            resume=resume,
        )
    for light in result.warnings:
        notice(f"warning: {light}")
    if result.finished:
        write_report([out], out / "report.html")
        notice(f"look at {out / 'report.html'}")
    else:
        notice(f"stopped at step {result.step:,} of {config.steps:,}; continue with --resume")
    return {
        "finished": result.finished,
        "step": result.step,
        "recipe": config.recipe,
        "student": str(out),
        "student_parameters": count_parameters(module),
        "teacher_parameters": count_parameters(network.module),
        **result.measured,
        "warnings": result.warnings,
    }


def run_evaluate(model: tyro.conf.Positional[Path], /, *, data: Data, teacher: Path | None = None) -> Result:
    """Measure a teacher or a student on labelled test images and, beside a teacher, how far they agree.

    Example: zskt evaluate runs/a --data cifar10-test.zip --teacher teacher

    Args:
        model: a teacher folder, or a run folder (its student).
        data: labelled images, as in zskt teach; their test split is used.
        teacher: also measure agreement and divergence from this one.
    """
    network = load_network(model)
    other = load_network(teacher) if teacher is not None else None
    return measure(network, *_test_images(data, network), other)


def run_sample(run: tyro.conf.Positional[Path], /, *, out: Path, seed: int = 0) -> Result:
    """Draw 64 pseudo images from the generator of a finished run.

    Example: zskt sample runs/a --out samples.png

    Args:
        run: a run folder.
        out: the PNG to write.
        seed: of the latents.
    """
    images = sample(run, seed)
    save_image(out, image_grid(images))
    return {"images": len(images), "out": str(out)}


def run_report(runs: tyro.conf.Positional[tuple[Path, ...]], /, *, out: Path | None = None) -> Result:
    """Write one HTML page about a run, or about several with mean and standard deviation.

    Example: zskt report runs/seed-0 runs/seed-1 runs/seed-2 --out report.html

    Args:
        runs: one or more run folders.
        out: the page; by default report.html in the run folder, or here for several.
    """
    if not runs:
        raise UsageError("expected at least one run folder, found none")
    path = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    measured = write_report(runs, path)
    return {"report": str(path), **measured}


def run_recipes(name: tyro.conf.Positional[str | None] = None, /) -> Result:
    """List the recipes, or print one with every value spelled out.

    Example: zskt recipes zskt

    Args:
        name: the recipe to print.
    """
    texts = recipe_texts()
    if name is not None and name != AUTO:
        config = load_recipe(name)
        header = [line for line in texts[name].splitlines() if line.startswith("#")]
        notice("\n".join(header) + "\n\n" + to_toml(config))
        return flat(config)
    summaries = {AUTO: "zskt-prior where the teacher has BatchNorm, else zskt-fresh; the default"}
    summaries |= {recipe: text.splitlines()[0].removeprefix("# ") for recipe, text in texts.items()}
    table = Table("recipe", "what it is")
    for recipe, summary in summaries.items():
        table.add_row(recipe, summary)
    console().print(table)
    return summaries


COMMANDS: dict[str, Callable[..., Result]] = {
    "demo": run_demo,
    "teach": run_teach,
    "import": run_import,
    "inspect": run_inspect,
    "distill": run_distill,
    "evaluate": run_evaluate,
    "sample": run_sample,
    "report": run_report,
    "recipes": run_recipes,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    try:
        result = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="zskt", description=__doc__, args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
        )
    except Interrupted as error:
        notice(f"zskt: {error}")
        return error.status
    except ZsktError as error:
        notice(f"zskt: {error}")
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        notice(f"zskt: {cannot('use', Path(str(error.filename or 'a file')), error)}")
        return 1
    except KeyboardInterrupt:
        notice("zskt: interrupted")
        return 130
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

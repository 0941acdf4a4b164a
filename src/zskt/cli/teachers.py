"""Subcommands that make and inspect teachers. Their docstrings are the help texts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from torch import Tensor, nn

from zskt.cli.options import Assignments, File, ImageSize, Reals, Time, Words, options, typed
from zskt.cli.progress import bar, notice, say_if_emulated, teaching, warn
from zskt.data.images import KNOWN, Dataset, read, read_unlabelled
from zskt.errors import UsageError, ZsktError
from zskt.evaluate.measures import measure
from zskt.files import expanded
from zskt.method.protocol import Make
from zskt.networks import models
from zskt.networks.classifier import Classifier, count_parameters, unit_normalisation
from zskt.networks.factories import find_function, parse_arguments
from zskt.networks.folder import check_teacher_folder, save_teacher
from zskt.networks.loading import Loaded, is_own_folder, load, refuse_unused
from zskt.networks.models import Size
from zskt.networks.weights import NOT_MEASURED, import_weights, parse_renames, with_module
from zskt.paper.baselines import teach
from zskt.paper.experiments import normalisation
from zskt.paper.training import Training, updates_in
from zskt.run import checkpoint
from zskt.run.unfinished import is_unfinished, load_unfinished
from zskt.runtime import seeded

Result = dict[str, Any]
Data = Annotated[tuple[str, ...], tyro.conf.arg(metavar="DATA...", help_behavior_hint="")]

Network = Annotated[str, tyro.conf.arg(metavar="NETWORK")]

PLAUSIBLE = 0.5
"""Accuracy below which an import is doubted."""


@dataclass(frozen=True)
class Foreign:
    """How to read a network that is not in a zskt folder, as in: zskt inspect my.py:make --teacher-weights net.pt
    --teacher-args depth=20 --input-size 3 32 32 --mean .5 .5 .5 --std .2 .2 .2"""

    teacher_weights: File = None
    """checkpoint for a factory, timm:NAME or torchvision:NAME; nothing in it is executed."""
    teacher_key: str = ""
    """the part of that file to take, if it holds several networks, as in ema_state_dict or teacher."""
    teacher_args: Assignments = ()
    """arguments for the factory, as in depth=20 classes=37."""
    input_size: ImageSize = None
    """channels, height and width, as in 3 32 32, unless stored with the weights."""
    mean: Reals = ()
    """per channel, for pixels in [0, 1] or 0..255, as in .4914 .4822 .4465, unless stored with the weights."""
    std: Reals = ()
    """standard deviation per channel, on the same scale as the mean, as in .2023 .1994 .2010."""
    trust: bool = False
    """load .pt2 and TorchScript files, and folders that name a factory, although they can run arbitrary code."""


Options = tyro.conf.OmitArgPrefixes[Foreign]
FOREIGN = Foreign()


def open_networks(
    networks: Sequence[str | Path | None], foreign: Foreign, *, unfinished: bool = False
) -> list[Loaded | None]:
    """The networks that a command names, in order; None stays None.

    With `unfinished`, the first one may be the folder of a stopped run: the student of its newest checkpoint.
    """
    named = [str(network) for network in networks if network is not None]
    options = iter(each_foreign(named, foreign))
    found: list[Loaded | None] = []
    for network in networks:
        if network is None:
            found.append(None)
        elif unfinished and str(network) == named[0] and is_unfinished(expanded(network)):
            found.append(open_unfinished(str(network), next(options)))
        else:
            found.append(open_as(str(network), next(options)))
    return found


def open_unfinished(name: str, foreign: Foreign) -> Loaded:
    """The student of a stopped run's newest checkpoint, which contains all that options could say."""
    given = {"weights": foreign.teacher_weights, "args": foreign.teacher_args, "input-size": foreign.input_size}
    refuse_unused(
        given | {"key": foreign.teacher_key, "mean": foreign.mean, "std": foreign.std},
        f"{name}, which contains all of this",
    )
    student, about = load_unfinished(expanded(name), trust=foreign.trust)
    warn(f"{name} is at {about['warnings'][0]}; taking the student of its newest checkpoint")
    return Loaded(student, "checkpoint of a run", "the checkpoint", unfinished=about)


def each_foreign(named: Sequence[str], foreign: Foreign) -> list[Foreign]:
    """The options for each of some networks: those for networks outside of zskt folders, and for the one factory."""
    outside = [name for name in named if not is_own_folder(expanded(name))] or named[
        :1
    ]  # loading it then rejects the options
    made = [name for name in outside if not expanded(name).exists()] or outside[:1]
    if len(made) > 1 and (foreign.teacher_weights or foreign.teacher_args):
        raise UsageError(
            f"--teacher-weights and --teacher-args are for one factory, found {made[0]} and {made[1]}; give one of them"
        )
    found = []
    for name in named:
        options = foreign if name in outside else Foreign(trust=foreign.trust)
        found.append(
            options if name in made else replace(options, teacher_weights=None, teacher_key="", teacher_args=())
        )
    return found


def open_as(name: str, foreign: Foreign) -> Loaded:
    """A network, with the options that are its own."""
    return load(
        name,
        weights=foreign.teacher_weights,
        arguments=parse_arguments(foreign.teacher_args, "--teacher-args"),
        input_size=foreign.input_size,
        mean=foreign.mean,
        std=foreign.std,
        trust=foreign.trust,
        notice=notice,
        key=foreign.teacher_key,
    )


def say_if_larger(student: nn.Module, teacher: Classifier) -> None:
    """Warn of a student that has more parameters than its teacher."""
    ours, theirs = count_parameters(student), count_parameters(teacher.module)
    if ours > theirs > 0:
        warn(
            f"the student has {ours:,} parameters, more than the teacher's {theirs:,}; for a smaller one give, say, "
            "--student auto:0.25"
        )


def said_progress(loaded: Loaded) -> Result:
    """What a result says of the student of a run that has not finished."""
    if loaded.unfinished is None:
        return {}
    return {"finished": False, "step": loaded.unfinished["step"], "steps": loaded.unfinished["steps"]}


def open_network(network: str | Path, foreign: Foreign) -> Loaded:
    """The only network that a command names."""
    (loaded,) = open_networks([network], foreign)
    assert loaded is not None
    return loaded


def read_images(sources: Sequence[str], split: Literal["train", "test"], size: Size | None) -> Dataset:
    """One split of the data, with a progress bar."""
    with bar(f"reading {split} images", "images") as show:
        dataset = read(sources, split, size=size, progress=lambda done, total: show(done, total, ""), notice=notice)
        show(len(dataset.images), len(dataset.images), "")
    return dataset


def test_images(sources: Sequence[str], network: Classifier) -> tuple[Tensor, Tensor]:
    """Test images (M, C, H, W) and labels (M,), checked against the network's classes."""
    return labelled(sources, network)[0]


def labelled(sources: Sequence[str], network: Classifier) -> tuple[tuple[Tensor, Tensor], tuple[str, ...]]:
    """The same, and the names of the classes."""
    test = read_images(sources, "test", network.input_size)
    if len(test.class_names) != network.num_classes:
        raise ZsktError(
            f"expected data of {network.num_classes} classes, found {len(test.class_names)}: "
            f"{', '.join(test.class_names[:5])}, ...; give data with the classes that the network was trained on"
        )
    if network.class_names is not None and network.class_names != test.class_names:
        notice(f"note: class names differ: network {network.class_names[:3]}..., data {test.class_names[:3]}...")
    return (test.images, test.labels), tuple(test.class_names)


def own_images(source: Path, network: Classifier) -> Tensor:
    """Unlabelled images (M, C, H, W) of the user's own, at the network's size."""
    with bar("reading your images", "images") as show:
        return read_unlabelled(
            source, network.input_size, progress=lambda done, total: show(done, total, ""), notice=notice
        )


def open_method(spec: str, trust: bool) -> Make:
    """The function that builds a custom method."""
    if not trust:
        raise UsageError(f"--method {spec} runs that code: add --trust if you trust it")
    return find_function(spec)


if TYPE_CHECKING:
    TrainingOptions = Any
else:
    TrainingOptions = options(
        Training,
        "",
        leave_out={"updates"},
        notes={
            **{name: f"default: {value}" for name, value in vars(Training(updates=1)).items()},
            "random_crop": "default: an eighth of the image side",
            "horizontal_flip": "default: on for known data sets that allow it",
        },
    )
AS_DEFAULT = TrainingOptions()


def run_teach(
    *,
    model: str,
    data: Data,
    out: Path,
    input_size: ImageSize = None,
    mean: Reals = (),
    std: Reals = (),
    epochs: int = 60,
    stop_after: Time = None,
    resume: bool = False,
    given: Annotated[TrainingOptions, tyro.conf.arg(name="")] = AS_DEFAULT,
) -> Result:
    """Train a teacher on labelled images and save it with its normalisation and accuracy.

    Example: zskt teach --model wrn-16-2 --data cifar10-train.zip cifar10-test.zip --out teacher

    Args:
        model: wrn-DEPTH-WIDTH (-raw after it: shortcuts of the raw input), resnet-18, resnet-34, vgg-11, lenet-5,
            lenet-5-half or convnet-WIDTH.
        data: zips or folders of images as split/class/file, the original files of MNIST, CIFAR or SVHN, or `digits`.
        out: output folder.
        input_size: channels, height and width; by default those of the images.
        mean: per channel, for pixels in [0, 1]; by default the published ones of a known data set, else computed.
        std: standard deviation per channel, on the same scale as the mean.
        epochs: passes over the training images.
        stop_after: stop after a time (90s, 9m, 2h) or a number of updates; continue with --resume.
        resume: continue unfinished training in --out from its last checkpoint.
        given: how to train.
    """
    train = read_images(data, "train", input_size)
    size = train.images.shape[1], train.images.shape[2], train.images.shape[3]
    test = read_images(data, "test", size)
    if test.class_names != train.class_names:
        raise ZsktError(
            f"expected the same classes in train and test, found {len(train.class_names)} and {len(test.class_names)} "
            "with different names; correct the folders"
        )
    if bool(mean) != bool(std):
        raise UsageError("--mean and --std go together: give both or neither")
    if mean:
        unit_mean, unit_std, lines = unit_normalisation(mean, std)
        for line in lines:
            notice(line)
    else:
        unit_mean, unit_std = normalisation(train)
        notice(f"normalisation: mean {list(unit_mean)}, std {list(unit_std)}")
    known = KNOWN.get(train.name)
    flips = known is not None and known.horizontal_flip
    chosen = {"random_crop": min(size[1:]) // 8, "horizontal_flip": flips} | typed(given)
    updates = updates_in(epochs, len(train.images), chosen.get("batch_size", Training.batch_size))
    training = Training(updates=updates, **chosen)
    say_if_emulated(training.precision, training.device)
    with seeded(training.seed):
        module = models.build(model, len(train.class_names), size)
    with teaching() as callback:
        result = teach(
            module,
            (train.images, train.labels),
            (test.images, test.labels),
            training,
            mean=unit_mean,
            std=unit_std,
            class_names=train.class_names,
            out=out,
            resume=resume or checkpoint.restarted(out),
            stop_after=stop_after,
            callbacks=[callback],
        )
    for line in result.warnings:
        warn(line)
    return {"finished": result.finished, "update": result.update, **result.measured, "teacher": str(out)}


def run_import(
    weights: tyro.conf.Positional[Path],
    /,
    *,
    model: str,
    input_size: Annotated[Size, tyro.conf.arg(metavar="C H W")],
    num_classes: int,
    mean: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT...")],
    std: Annotated[tuple[float, ...], tyro.conf.arg(metavar="FLOAT...")],
    out: Path,
    key: str = "",
    rename: Words = (),
    data: Data = (),
) -> Result:
    """Turn a PyTorch checkpoint into a teacher folder. Nothing in the file is executed.

    Example: zskt import wrn.pth.tar --model wrn-16-1 --input-size 3 32 32 --num-classes 10
    --mean .4914 .4822 .4465 --std .2023 .1994 .2010 --out teacher --data cifar10-test.zip

    Args:
        weights: a .pth, .pth.tar, .pt or .safetensors file that contains a state dict.
        model: the architecture, as in zskt teach.
        input_size: channels, height and width.
        num_classes: number of classes.
        mean: per channel, for pixels in [0, 1]; values above 1 are taken as 0..255.
        std: standard deviation per channel, on the same scale as the mean.
        out: output folder.
        key: the part of the file to take, if it holds several networks: an entry, as in ema_state_dict, or how the
            names begin, as in teacher.
        rename: FOREIGN=OURS name components, if no unique renaming fits; FOREIGN= drops one, FOREIGN=- its tensors.
        data: labelled test images to measure the import with: the only check of padding, activations and normalisation.
            If another of our networks has tensors of the same names and shapes, the more accurate one is taken. The
            classes get their names from it.
    """
    check_teacher_folder(out)
    teacher, report = import_weights(
        weights, model, input_size, num_classes, mean, std, rename=parse_renames(rename), key=key
    )
    for line in report.notices:
        notice(line)
    measured: dict[str, float] = {}
    if data:
        test, teacher.class_names = labelled(data, teacher)
        measured = measure(teacher, *test)
        notice(f"accuracy {measured['accuracy']:.4f}")
        for other in models.with_same_tensors(model):
            variant = with_module(teacher, other)
            variant.class_names = teacher.class_names
            found = measure(variant, *test)
            if better := found["accuracy"] > measured["accuracy"]:
                teacher, measured = variant, found
            notice(f"as {other}, of the same tensors: accuracy {found['accuracy']:.4f}{', taken' * better}")
        if measured["accuracy"] < PLAUSIBLE:
            warn(
                f"accuracy {measured['accuracy']:.4f} is implausible for a trained network, although names and shapes "
                "fit: check --mean and --std, the order of classes, and whether --model computes what the original does"
            )
    else:
        notice(NOT_MEASURED)
    save_teacher(out, teacher, **report.metadata, measured=measured)
    return {"teacher": str(out), "renamed": report.metadata["renamed"], "measured": bool(data), **measured}

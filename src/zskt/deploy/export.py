"""The student in other formats: ONNX, torch.export and a folder in the Hugging Face layout; int8 without data.

Every export is read back and compared with the original network on N pseudo images of shape (C, H, W), K classes; one
that differs is deleted. The packages of the `export` extra are imported only when needed.
"""

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from zskt.deploy.formats import Input, feed, need, open_onnx, quantise, write_onnx, write_pt2
from zskt.deploy.hub import write_hub
from zskt.errors import UsageError, ZsktError, failing, first_line, unknown
from zskt.evaluate.measures import agreement
from zskt.files import appearing, expanded, read_json
from zskt.method.protocol import Make
from zskt.networks.checks import as_teacher, bare
from zskt.networks.classifier import Classifier, count_parameters
from zskt.networks.folder import load_network, load_student
from zskt.networks.foreign import quiet
from zskt.networks.loading import load_teacher
from zskt.networks.observe import evaluating
from zskt.networks.rebuild import describe_module
from zskt.run.distill import DistillResult, Sample, sampler

Format = Literal["onnx", "pt2", "hub"]
IMAGES = 256  # pseudo images to compare on, and as many others to calibrate with
BATCHES = (1, 7, 56, 64, 64, 64)
"""Batch sizes of the comparison: several, to detect a fixed one; small enough for large images."""
TIMED = (1, 32)  # batch sizes that are timed
TURNS, PATIENCE = 100, 5.0
"""Timings of each network and batch size: this many, or as many as fit into this many seconds, but at least 10."""

Answer = Callable[[Tensor], Tensor]  # an exported file, read back: images as they are fed (N, C, H, W) -> logits (N, K)


@dataclass(frozen=True)
class Timing:
    """A network in onnxruntime, on one thread."""

    network: str
    parameters: int
    bytes: int
    milliseconds: dict[int, float]  # median wall time, by batch size
    processor: dict[int, float]  # the same in CPU time: much less if other programs disturbed the timing


@dataclass(frozen=True)
class Exported:
    """What was written and how far it is from the original network."""

    path: Path
    format: Format
    input: Input  # what it takes as input
    int8: bool
    bytes: int
    images: int  # compared on
    images_from: str
    largest_logit: float  # of the network itself, in magnitude
    max_difference: float  # of a logit, in magnitude
    agreement: float  # fraction of images with the same most probable class
    timings: tuple[Timing, ...] = ()  # of teacher and student, where a teacher was given


@torch.random.fork_rng(devices=[])  # tracing and comparing draw from them
def export(
    source: "DistillResult | Classifier | Source | str | Path",
    path: str | Path,
    format: Format | None = None,
    *,
    input: Input | None = None,
    int8: bool = False,
    teacher: Classifier | str | Path | None = None,
    tolerance: float = 1e-3,
    least_agreement: float = 0.9,
    module: nn.Module | None = None,
    method: Make | None = None,
    trust: bool = False,
) -> Exported:
    """Write a finished run's student, or any network, to `path`; read it back; compare; remove it if it is wrong.

    `source` is a result, a run or teacher folder, or a network with its normalisation; `module` and `trust` are for a
    folder whose network only its own code makes, as in `load_student`; a run with a custom method needs that `method`
    and its `teacher`. By default `format` follows from the suffix of `path`: .onnx, .pt2, none for hub. `input` is what
    the exported network takes: `fraction` images in [0, 1] (the default), `uint8` images, or `normalised` ones; a
    hub folder has the plain network, which takes normalised images. Input "images" (N, C, H, W), any N; output "logits"
    (N, K). `int8` quantises an ONNX file, calibrated on pseudo images of the run. With `teacher`, both
    networks are timed in onnxruntime.

    Logits may differ by `tolerance` of the largest one; after quantisation `least_agreement` of the images must keep
    their class instead. Raises ZsktError, with the numbers, if they do not, and if `path` exists.
    """
    path = expanded(path)
    formats: dict[str, Format] = {".onnx": "onnx", ".pt2": "pt2", "": "hub"}
    if format is None and path.suffix not in formats:
        raise UsageError(
            f"expected {path.name} to end in .onnx or .pt2, or in no suffix for a hub folder, found {path.suffix}; "
            "give a format, as in --format hub"
        )
    form = format or formats[path.suffix]
    fed: Input = input or ("normalised" if form == "hub" else "fraction")
    _check_request(form, fed, int8, tolerance, least_agreement)
    other = teacher if isinstance(teacher, Classifier | None) else load_network(teacher, trust=trust)
    origin = read_source(source, module, trust, method, other)
    if int8 and origin.sample is None:
        raise ZsktError(
            "int8 is calibrated on pseudo images, and this network comes without a generator; export a run folder"
        )
    if form == "onnx" or other is not None:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            need(package)
    network = as_teacher(origin.network).cpu()
    images = feed(network, origin.pseudo_images(range(IMAGES // 64)), fed)  # (256, C, H, W)
    with appearing(path) as place:
        beside = place.parent / f".{place.name}.parts"  # what is made on the way, under no name that `out` can have
        beside.mkdir()
        plain = beside / "fp32" / "student.onnx" if int8 else place
        plain.parent.mkdir(exist_ok=True)
        if form == "onnx":
            write_onnx(plain, network, fed)
        elif form == "pt2":
            write_pt2(plain, network, fed)
        else:
            plain.mkdir()
            write_hub(plain, network, origin.metadata)
        found = deviation(read_back(plain, form, network), network, images, fed)
        check(found, form, tolerance)
        if int8:
            calibration = feed(network, origin.pseudo_images(range(IMAGES // 64, 2 * IMAGES // 64)), fed)
            quantise(plain, place, calibration)
            found = deviation(read_back(place, form, network), network, images, fed)
            check_agreement(found, least_agreement)
        timings: tuple[Timing, ...] = ()
        if other is not None:
            reference = plain if form == "onnx" else beside / "student" / "student.onnx"
            timed = {"teacher": (copy.deepcopy(other).cpu(), beside / "teacher" / "teacher.onnx")}
            timed |= {"student": (network, reference)} | ({"student, int8": (network, place)} if int8 else {})
            timings = time_networks(timed, fed, tolerance)
        size = sum(file.stat().st_size for file in (place, *place.rglob("*")) if file.is_file())
    images_from = "seeded noise in [0, 1]" if origin.sample is None else "the run's pseudo images"
    return Exported(path, form, fed, int8, size, len(images), images_from, **found, timings=timings)


def _check_request(form: str, fed: str, int8: bool, tolerance: float, least_agreement: float) -> None:
    for what, name, valid in (("format", form, get_args(Format)), ("input", fed, get_args(Input))):
        if name not in valid:
            raise unknown(what, name, valid)
    if form == "hub" and fed != "normalised":
        raise UsageError(
            f"input {fed}: a hub folder holds the network alone, its preprocessor_config.json the normalisation; leave "
            "--input out, or export to onnx or pt2"
        )
    if int8 and form != "onnx":
        raise UsageError(f"int8 is for ONNX files, found format {form}: use --format onnx")
    if not 0 <= tolerance < math.inf or not 0 <= least_agreement <= 1:
        raise UsageError(
            f"expected a tolerance of at least 0 and an agreement from 0 to 1, found {tolerance} and {least_agreement}"
        )


@dataclass(frozen=True)
class Source:
    """A network, its metadata and, if it is from a run, a function that draws the run's pseudo images."""

    network: Classifier
    metadata: Mapping[str, Any]
    sample: Sample | None

    def pseudo_images(self, seeds: Sequence[int]) -> Tensor:
        """64 images for each seed (64 seeds, C, H, W), normalised, on the CPU; noise if there is no run."""
        if self.sample is not None:
            return torch.cat([self.sample(64, seed).cpu() for seed in seeds])
        noises = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.cat([torch.rand(64, *self.network.input_size, generator=rng) for rng in noises])
        return self.network.normalise(noise).cpu()


def read_source(
    source: DistillResult | Classifier | Source | str | Path,
    module: nn.Module | None = None,
    trust: bool = False,
    method: Make | None = None,
    teacher: Classifier | None = None,
) -> Source:
    """The source that `export` was given as a `Source`; raises ZsktError for an unfinished run."""
    if isinstance(source, Source):
        return source
    if isinstance(source, DistillResult):
        if not source.finished:
            raise ZsktError(f"expected a finished run, found one at step {source.step:,}; resume it first")
        return Source(source.network, source.metadata(), source.method.sample)
    if isinstance(source, Classifier):
        return Source(source, {}, None)
    if not isinstance(source, str | Path):
        raise UsageError(
            f"expected a result, a folder or a zskt.Classifier to export, found {type(source).__name__}: wrap it, as "
            "in zskt.Classifier(module, input_size=(3, 32, 32), mean=..., std=...), so that its normalisation is known"
        )
    return from_folder(expanded(source), load_network(source, module=module, trust=trust), method, teacher)


def from_folder(
    folder: Path, network: Classifier, method: Make | None = None, teacher: Classifier | None = None
) -> Source:
    """A loaded network with its folder's metadata; a run with a custom method needs `method` and its `teacher`."""
    paths = [folder / f"{name}.json" for name in ("student", "teacher", "config")]
    metadata: dict[str, Any] = next((read_json(path) for path in paths if path.exists()), {})
    is_run = (folder / "config.toml").exists() and (folder / "student.json").exists()
    sample = sampler(folder, network, method=method, teacher=teacher) if is_run else None
    return Source(network, metadata, sample)


def read_back(path: Path, form: Format, network: Classifier) -> Answer:
    """What was written, as a function of images as they are fed (N, C, H, W); raises ZsktError if it cannot be read."""
    try:
        if form == "onnx":
            session = open_onnx(path)
            return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        if form == "pt2":
            with quiet():  # a program, but we have just written it
                return torch.export.load(path).module()
        how = describe_module(network.module, network.num_classes, network.input_size)
        if "transformers" in how:
            return load_teacher(path, notice=lambda line: None).float()  # its notes are known already
        return load_student(path, module=None if "spec" in how else bare(network.module)).float()
    except Exception as error:  # a damaged file can raise anything
        why = f"({first_line(error)}); nothing was written; use another --format"
        raise ZsktError(f"the exported {form} cannot be read back {why}") from error


def deviation(answer: Answer, network: Classifier, images: Tensor, fed: Input) -> dict[str, float]:
    """How far `answer` is from the network on images (N, C, H, W) as they are fed: logits and most probable classes."""
    theirs, ours = [], []
    network = copy.deepcopy(network).float()
    with evaluating(network):
        for batch in torch.split(images, list(BATCHES)):
            what = f"the exported network fails on a batch of {len(batch)}"
            with failing(what, "nothing was written; use another --format"):
                theirs.append(answer(batch).detach())  # (N, K)
            ours.append(network(batch if fed == "normalised" else network.normalise(batch)))
    found, expected = torch.cat(theirs).double(), torch.cat(ours).double()  # (N, K) each
    return {
        "largest_logit": float(expected.abs().max()),
        "max_difference": float((found - expected).abs().max()),
        "agreement": agreement(found, expected),
    }


def check(found: Mapping[str, float], form: str, tolerance: float) -> None:
    """Raise ZsktError unless the logits are the network's, up to rounding."""
    allowed = tolerance * found["largest_logit"]
    if not found["max_difference"] <= allowed:  # rejects NaN, too
        raise ZsktError(
            f"the exported {form} disagrees with the network: logits differ by up to {found['max_difference']:.3g}, "
            f"allowed are {allowed:.3g} ({tolerance:g} of the largest), and {found['agreement']:.4f} of {IMAGES} "
            "images keep their class; nothing was written; use another --format or a larger --tolerance"
        )


def check_agreement(found: Mapping[str, float], least: float) -> None:
    """Raise ZsktError unless enough images keep their class after quantisation."""
    if not found["agreement"] >= least or math.isnan(found["max_difference"]):
        raise ZsktError(
            f"after quantisation only {found['agreement']:.4f} of {IMAGES} pseudo images keep the student's class, "
            f"expected at least {least:g} (logits differ by up to {found['max_difference']:.3g}); nothing was written; "
            "leave --int8 out or lower --least-agreement"
        )


def time_networks(networks: Mapping[str, tuple[Classifier, Path]], fed: Input, tolerance: float) -> tuple[Timing, ...]:
    """Interleaved timings of networks in onnxruntime; a missing ONNX file is written and checked."""
    sessions = {}
    for name, (network, path) in networks.items():
        if not path.exists():
            path.parent.mkdir()
            images = feed(network, Source(network, {}, None).pseudo_images(range(IMAGES // 64)), fed)
            try:
                write_onnx(path, network, fed)
                check(deviation(read_back(path, "onnx", network), network, images, fed), "onnx", tolerance)
            except ZsktError as error:
                raise ZsktError(f"cannot time the {name} in onnxruntime ({error}); leave --teacher out") from error
        sessions[name] = open_onnx(path)
    clock, processor = ({name: dict[int, float]() for name in networks} for _ in range(2))
    for batch in TIMED:
        inputs = {
            name: feed(network, Source(network, {}, None).pseudo_images([0])[:batch], fed).numpy()
            for name, (network, _) in networks.items()
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}
        started = time.monotonic()
        for turn in range(TURNS + 3):
            for name, session in sessions.items():
                before = time.perf_counter(), time.thread_time()
                session.run(["logits"], {"images": inputs[name]})
                taken[name].append((time.perf_counter() - before[0], time.thread_time() - before[1]))
            if turn >= 12 and time.monotonic() - started > PATIENCE:
                break
        for name, pairs in taken.items():  # the first three warm up
            clock[name][batch], processor[name][batch] = (
                1e3 * statistics.median(values) for values in zip(*pairs[3:], strict=True)
            )
    return tuple(
        Timing(name, count_parameters(network.module), path.stat().st_size, clock[name], processor[name])
        for name, (network, path) in networks.items()
    )


def as_json(exported: Exported) -> dict[str, Any]:
    """What `zskt export` prints: every number, agreement lost and latencies included."""
    result = dataclasses.asdict(exported) | {"path": str(exported.path), "agreement_lost": 1 - exported.agreement}
    result["timings"] = [
        {"network": t.network, "parameters": t.parameters, "bytes": t.bytes, "threads": 1}
        | {f"ms_batch_{batch}": round(ms, 4) for batch, ms in t.milliseconds.items()}
        | {f"processor_ms_batch_{batch}": round(ms, 4) for batch, ms in t.processor.items()}
        for t in exported.timings
    ]
    return result

"""Every number of a run, typed, checked and documented; TOML in and out.

The defaults are the released ZSKT code's for CIFAR-10, WRN-40-2 -> WRN-16-1 (polo5/ZeroShotKnowledgeTransfer@e24915d,
[code] below); recipes hold only their differences from them. An unknown, mistyped, out-of-range or contradictory value
is an error, and so is one that nothing would read.
"""

import contextlib
import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import tomli_w

from zskt.files import UsageError, short, unknown


@dataclass(frozen=True)
class GeneratorLoss:
    """Weights of the terms the generator minimises; minus a divergence makes it an adversary. 0 = not computed."""

    kl: float = -1.0
    """forward KL of teacher and student logits [paper: maximised]"""
    kl_scale: Literal["per_class", "batchmean"] = "per_class"
    """per_class = mean over images and classes [code], batchmean = over images"""
    l1: float = 0.0
    """mean absolute difference of the logits [DFAD, DFME]"""
    jensen_shannon: float = 0.0
    """Jensen-Shannon divergence of teacher and student, nats"""
    batchnorm: float = 0.0
    """distance to the teacher's BatchNorm statistics, summed over layers [DeepInversion]"""
    one_hot: float = 0.0
    """cross-entropy of the teacher's logits to their own argmax, nats [DAFL, DFQ]"""
    balance: float = 0.0
    """minus the entropy of the mean class probability, nats [DAFL, DFQ]"""
    activation: float = 0.0
    """minus the mean absolute value of the teacher's last stage output [DAFL]"""
    total_variation: float = 0.0
    """mean absolute difference of neighbouring pixels [DeepInversion]"""


@dataclass(frozen=True)
class StudentLoss:
    """Weights of the terms the student minimises. 0 = not computed."""

    kl: float = 1.0
    """forward KL of teacher and student logits [paper eq. 1]"""
    kl_scale: Literal["per_class", "batchmean"] = "per_class"
    """per_class = mean over images and classes [code], batchmean = over images"""
    temperature: float = 1.0
    """softmax temperature of the KL, which is multiplied by its square [code: 1]"""
    l1: float = 0.0
    """mean absolute difference of the logits [DFAD]"""
    jensen_shannon: float = 0.0
    """Jensen-Shannon divergence of teacher and student, nats"""
    attention: float = 250.0
    """attention transfer, summed over stages [paper, code]; goes with the per_class KL"""
    stages: tuple[str, ...] = ()
    """what attention compares, as teacher's=student's, in a list or between commas; empty: paired by resolution"""


@dataclass(frozen=True)
class Generator:
    """The generator and how it is updated."""

    latent: int = 100
    """dimension Z of the standard normal latent [paper, code]"""
    width: int | Literal["auto"] = 128
    """channels of its first convolution [code]; auto: a power of two from 16 to 128, no dearer than both networks"""
    updates: int = 1
    """generator updates per step, nG [paper]"""
    learning_rate: float = 1e-3
    """initial learning rate of Adam [code; the paper says 2e-3, which costs 2 points]"""
    clip: float = 5.0
    """largest gradient norm, 0 = no clipping [code]"""
    mode_for_student: Literal["train", "eval"] = "train"
    """BatchNorm mode while it makes the student's images [code]"""
    loss: GeneratorLoss = field(default_factory=GeneratorLoss)
    """what it minimises"""


@dataclass(frozen=True)
class Student:
    """How the student is updated."""

    updates: int = 10
    """student updates per step, nS [paper]"""
    optimizer: Literal["adam", "sgd"] = "adam"
    """[paper, code: adam]"""
    learning_rate: float = 2e-3
    """initial learning rate [paper, code]"""
    momentum: float = 0.0
    """of sgd"""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient [code: none]"""
    clip: float = 5.0
    """largest gradient norm, 0 = no clipping [code]"""
    mode_in_search: Literal["train", "eval"] = "train"
    """BatchNorm mode during generator updates [code]"""
    loss: StudentLoss = field(default_factory=StudentLoss)
    """what it minimises"""


@dataclass(frozen=True)
class Memory:
    """Which pseudo batches the student sees."""

    kind: Literal["same", "fresh", "bank"] = "same"
    """same = the searched batch every time [paper], fresh = a new one each time [ReScience 2020], bank = past ones"""
    capacity: int = 0
    """searched batches in the bank, 0 unless kind is bank"""


@dataclass(frozen=True)
class Schedule:
    """How both learning rates decay."""

    kind: Literal["cosine", "multistep", "constant"] = "cosine"
    """cosine to 0 over the run [paper, code]; multistep: times `factor` at each milestone"""
    milestones: tuple[float, ...] = ()
    """as fractions of the run, for multistep"""
    factor: float = 0.1
    """of multistep"""
    clock: Literal["step", "update"] = "step"
    """whether the rate changes after every step [code] or after every update"""


@dataclass(frozen=True)
class Config:
    """One run of distillation, completely."""

    recipe: str = "zskt"
    """name of the recipe these values started from"""
    steps: int = 80_000
    """outer iterations N = pseudo batches in the paper's counting [paper: 80,000 for CIFAR-10, 50,000 for SVHN]"""
    batch_size: int = 128
    """pseudo images per batch [code]"""
    seed: int = 0
    """of latents, initialisation made here, dropout"""
    device: str = "auto"
    """a torch device; auto: cuda where there is one, else cpu"""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """fp32: the networks' own dtype; bf16: autocast, losses and weights in fp32; auto: bf16 where it is known to do"""
    memory_format: Literal["channels_last", "contiguous"] = "channels_last"
    """of weights and images; channels_last is faster"""
    fused: bool = True
    """fused optimisers: one kernel for all parameters"""
    cuda_graph: bool = False
    """repeat every step as one CUDA graph, instead of launching its kernels one by one; for device cuda"""
    log_every: int | Literal["auto"] = "auto"
    """steps between lines of metrics.jsonl; auto: at most 1,000 lines"""
    evaluate_every: int | Literal["auto"] = "auto"
    """steps between evaluations and sample images; auto: 20 in a run"""
    checkpoint_every: int | Literal["auto"] = "auto"
    """steps between checkpoints; auto: 50 in a run"""
    generator: Generator = field(default_factory=Generator)
    """the adversary"""
    student: Student = field(default_factory=Student)
    """the learner"""
    memory: Memory = field(default_factory=Memory)
    """what the student sees"""
    schedule: Schedule = field(default_factory=Schedule)
    """learning rates over the run"""

    def __post_init__(self) -> None:
        for name, value in flat(self).items():
            check_bounds(name, value)
            if name in _POSITIVE and not (value == "auto" or value > 0):
                raise UsageError(f"{name} = {value!r}: expected a positive number")
            if name in _NOT_NEGATIVE and value < 0:
                raise UsageError(f"{name} = {value!r}: expected 0 or a positive number")
        if self.cuda_graph and not self.fused:
            raise UsageError("cuda_graph = true needs fused = true: other optimisers wait for the device")
        if self.batch_size < 2:
            raise UsageError("batch_size = 1: expected at least 2, as BatchNorm compares the images of a batch")
        student, schedule, loss = self.student, self.schedule, self.generator.loss
        if student.optimizer == "adam" and student.momentum:
            raise UsageError("student.momentum is for sgd, and student.optimizer is adam: drop one of them")
        if (self.memory.kind == "bank") != (self.memory.capacity > 0):
            raise UsageError("memory.capacity is for memory.kind = bank, and a bank needs one: set both or neither")
        if (schedule.kind == "multistep") != bool(schedule.milestones):
            raise UsageError(
                "schedule.milestones are for schedule.kind = multistep, which needs them: set both or neither"
            )
        if list(schedule.milestones) != sorted(schedule.milestones) or not all(0 < m < 1 for m in schedule.milestones):
            raise UsageError(f"schedule.milestones = {list(schedule.milestones)}: expected rising fractions of the run")
        divergences = ("kl", "l1", "jensen_shannon")
        if not any(getattr(student.loss, name) for name in (*divergences, "attention")):
            raise UsageError("student.loss has no term with a weight: set student.loss.kl")
        if not any(value for name, value in vars(loss).items() if name != "kl_scale"):
            raise UsageError("generator.loss has no term with a weight: set generator.loss.kl")
        unread = {
            "student.loss.temperature": (student.loss.temperature != 1 and not student.loss.kl, "student.loss.kl"),
            "student.loss.kl_scale": (student.loss.kl_scale != "per_class" and not student.loss.kl, "student.loss.kl"),
            "student.loss.stages": (bool(student.loss.stages) and not student.loss.attention, "student.loss.attention"),
            "generator.loss.kl_scale": (loss.kl_scale != "per_class" and not loss.kl, "generator.loss.kl"),
            "schedule.clock": (schedule.clock != "step" and schedule.kind == "constant", "another schedule.kind"),
            "schedule.factor": (schedule.factor != 0.1 and schedule.kind != "multistep", "schedule.kind = multistep"),
        }
        for name, (nobody_reads_it, needed) in unread.items():
            if nobody_reads_it:
                raise UsageError(f"{name} is for {needed}, which is not set: drop one of them or set both")

    def interval(self, what: Literal["log_every", "evaluate_every", "checkpoint_every"]) -> int:
        """The number of steps between two of these, with `auto` resolved."""
        value: int | str = getattr(self, what)
        times = {"log_every": 1_000, "evaluate_every": 20, "checkpoint_every": 50}[what]
        return -(-self.steps // times) if isinstance(value, str) else value


LARGEST = 10**9
"""of a whole number: beyond it nothing here makes sense, and libraries below overflow"""


def check_bounds(name: str, value: Any) -> None:
    """Raise UsageError for a number that is not finite, or a whole number that no run could mean."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name} = {value!r}: expected a finite number")
    if type(value) is int and abs(value) > LARGEST:
        raise UsageError(f"{name} = {short(value)}: expected at most {LARGEST:,}")


_POSITIVE = {
    "steps",
    "batch_size",
    "log_every",
    "evaluate_every",
    "checkpoint_every",
    "generator.latent",
    "generator.width",
    "generator.updates",
    "generator.learning_rate",
    "student.updates",
    "student.learning_rate",
    "student.loss.temperature",
    "schedule.factor",
}
_NOT_NEGATIVE = {
    "seed",
    "generator.clip",
    "student.clip",
    "student.momentum",
    "student.weight_decay",
    "memory.capacity",
}


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """All values by dotted name, in order of definition: what `--set` takes."""
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            values |= flat(value, f"{prefix}{entry.name}.")
        else:
            values[prefix + entry.name] = value
    return values


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with values changed by dotted name; raises UsageError for unknown names and wrong types."""
    tree = dataclasses.asdict(config)
    valid = flat(config)
    for name, value in changes.items():
        if name not in valid:
            raise unknown("setting", name, valid)
        *sections, last = name.split(".")
        branch = tree
        for section in sections:
            branch = branch[section]
        branch[last] = value
    return _config(tree)


def from_text(assignment: str, option: str = "--set") -> tuple[str, Any]:
    """`key=value` of the command line; the value in TOML, or a bare word. `option` names it in errors."""
    name, equals, text = assignment.partition("=")
    if not equals:
        raise UsageError(
            f"{option} {short(assignment)!r}: expected key=value, as in {option} student.learning_rate=1e-3"
        )
    try:
        return name.strip(), tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        with contextlib.suppress(ValueError):
            return name.strip(), float(text)  # .5 and 1e-3 are numbers to everybody but TOML
        return name.strip(), text.strip()
    except (RecursionError, ValueError) as error:  # a number of thousands of digits
        raise UsageError(f"{option} {short(assignment)!r}: expected a value, found one too long or too deep") from error


def from_toml(text: str, where: str) -> Config:
    """A config from TOML text that holds differences from the defaults; `where` names it in errors."""
    try:
        return _config(tomllib.loads(text))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not valid TOML: {error}") from error
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error


def to_toml(config: Config) -> str:
    """The whole config as TOML, every value spelled out."""
    return tomli_w.dumps(dataclasses.asdict(config))


def _config(tree: Mapping[str, Any]) -> Config:
    config: Config = _build(Config, tree, "")
    return config


def _build(kind: type[Any], values: Mapping[str, Any], prefix: str) -> Any:
    """An instance of the dataclass `kind` from nested mappings, strictly."""
    hints = typing.get_type_hints(kind)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        full = prefix + name
        if name not in hints:
            raise unknown("setting", full, [prefix + hint for hint in hints])
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                raise UsageError(
                    f"{full} = {short(repr(value))}: expected a section; set one of its values, as in {full}.name=..."
                )
            arguments[name] = _build(typing.cast(type[Any], hints[name]), value, f"{full}.")
        else:
            arguments[name] = _typed(full, value, hints[name])
    return kind(**arguments)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as `hint` wants it: exact types, whole numbers accepted as floats, lists as tuples."""
    choices: list[str] = []
    origin = typing.get_origin(hint)
    for option in typing.get_args(hint) if origin in (types.UnionType, typing.Union) else (hint,):
        if typing.get_origin(option) is Literal:
            choices += typing.get_args(option)
            if value in choices:
                return value
        elif typing.get_origin(option) is tuple:
            if str in typing.get_args(option):
                choices.append("a list of words")
                if isinstance(value, str):
                    return tuple(word.strip() for word in value.split(",") if word.strip())
                if isinstance(value, (list, tuple)) and all(type(item) is str for item in value):
                    return tuple(value)
                continue
            choices.append("a list of numbers")
            if isinstance(value, (list, tuple)) and all(type(item) in (int, float) for item in value):
                return tuple(float(item) for item in value)
        else:
            choices.append({int: "a whole number", float: "a number", bool: "true or false", str: "a word"}[option])
            if type(value) is option or (option is float and type(value) is int):
                return option(value)
    raise UsageError(f"{name} = {short(repr(value))}: expected {' or '.join(choices)}")

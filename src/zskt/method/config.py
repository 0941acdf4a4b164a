"""Every number of a run, typed, checked and documented.

The defaults are the released ZSKT code's for CIFAR-10, WRN-40-2 -> WRN-16-1 (polo5/ZeroShotKnowledgeTransfer@e24915d,
[code] below); recipes hold only their differences from them. An unknown, mistyped, out-of-range, contradictory or
unused value is an error.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from zskt.errors import UsageError, ZsktError
from zskt.files import read_text
from zskt.method.schedule import Schedule
from zskt.runtime import parse_limit
from zskt.settings import check_bounds, flat, from_toml, without


@dataclass(frozen=True)
class GeneratorLoss:
    """Weights of the terms the generator minimises; minus a divergence makes it an adversary. 0 = not computed."""

    kl: float = -1.0
    """forward KL of teacher and student logits [paper: maximised]"""
    kl_scale: Literal["per_class", "batchmean"] = "per_class"
    """per_class = mean over images and classes [code], batchmean = over images"""
    kl_where: Literal["everywhere", "agreeing"] = "everywhere"
    """agreeing: the KL of images that both networks put in the same class, 0 for others [CMI, Fast, NAYER]"""
    l1: float = 0.0
    """mean absolute difference of the logits [DFAD, DFME]"""
    jensen_shannon: float = 0.0
    """divergence of both networks from their mean, at temperature 3 and clipped, nats [DeepInversion]"""
    batchnorm: float = 0.0
    """distance to the teacher's BatchNorm statistics, summed over layers [DeepInversion]"""
    one_hot: float = 0.0
    """cross-entropy of the teacher's logits to the target classes, where a method draws them [CMI, Fast], or to their
    own argmax [DAFL, DFQ], nats"""
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
    attention: float = 250.0
    """attention transfer, summed over stages [paper, code]; goes with the per_class KL"""
    stages: tuple[str, ...] = ()
    """stages to compare, as TEACHER=STUDENT, comma-separated or as a list; empty: paired by resolution"""


@dataclass(frozen=True)
class Generator:
    """The generator and how it is updated."""

    latent: int = 100
    """dimension Z of the standard normal latent [paper, code]"""
    width: int | Literal["auto"] = 128
    """channels of its first convolution [code]; auto: a power of two from 16 to 128, costing at most as much as both
    networks, or 16 if none does"""
    updates: int = 1
    """generator updates per step, nG [paper], or per round of method bank"""
    output: Literal["batchnorm", "pixels"] = "batchnorm"
    """what comes last: a BatchNorm of the channels [code], or a sigmoid, so that pixels are in [0, 1] [CMI]"""
    learning_rate: float = 1e-3
    """initial learning rate of Adam [code; the paper says 2e-3, which costs 2 points]"""
    beta1: float = 0.9
    """decay of Adam's first moment [code: .9; GANs: .5]"""
    clip: float = 5.0
    """largest gradient norm, 0 = no clipping [code]"""
    mode_for_student: Literal["train", "eval"] = "train"
    """BatchNorm mode when generating images for the student [code]"""
    loss: GeneratorLoss = field(default_factory=GeneratorLoss)
    """weights of its loss terms"""


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
    """momentum of sgd"""
    nesterov: bool = False
    """Nesterov momentum"""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient [code: none]"""
    clip: float = 5.0
    """largest gradient norm, 0 = no clipping [code]"""
    mode_for_generator: Literal["train", "eval"] = "train"
    """BatchNorm mode during generator updates [code]"""
    loss: StudentLoss = field(default_factory=StudentLoss)
    """weights of its loss terms"""


@dataclass(frozen=True)
class Replay:
    """Which pseudo batches the student sees."""

    kind: Literal["same", "fresh", "buffer"] = "same"
    """same = the newest batch every time [paper], fresh = a new one every time [ReScience 2020], buffer = past ones"""
    capacity: int = 0
    """batches in the buffer, 0 unless kind is buffer"""


@dataclass(frozen=True)
class Bank:
    """Method bank: rounds of synthesis that fill a bank of images, from which the student learns."""

    rounds: int = 0
    """rounds of synthesis in a run; 0 unless method is bank"""
    warmup: int = 20
    """rounds before the first student update"""
    until: float = 0.8
    """fraction of the student updates after which no more images are made"""
    batch_size: int = 256
    """images per round"""
    pixels: bool = False
    """optimise the pixels of a round's images themselves, without a generator [DeepInversion]"""
    latent_learning_rate: float = 1e-2
    """learning rate of Adam for a round's latents, or pixels"""
    momentum: float = 0.0
    """share of earlier rounds in the BatchNorm statistics of the images [Fast: .9]"""
    survives: Literal["last", "meta"] = "last"
    """the generator that the next round begins with: as the last round left it, or as one step of Adam along the sum of
    all the round's gradients makes it, at generator.updates times the learning rate [Fast]"""
    reset: Literal["nothing", "first_layer", "generator"] = "nothing"
    """what is initialised anew every `reset_every` rounds [first layer: Fast; generator: CMI, NAYER]"""
    reset_every: int = 0
    """rounds between two resets, 0 unless something is reset"""
    views: int = 8
    """fixed crops and flips of each image, for which the teacher is asked once; 0: new ones, and the teacher, at every
    update"""
    random_crop: int | Literal["auto"] = "auto"
    """pixels of padding that random crops are taken from, 0 = none; auto: an eighth of the shorter side"""
    horizontal_flip: bool | Literal["auto"] = False
    """whether half of the views are flipped left to right; auto: if the teacher takes most flipped pseudo images
    for the same class"""


@dataclass(frozen=True)
class Machine:
    """How a run uses the machine. These settings affect results only by rounding and may change on resume."""

    device: str = "auto"
    """a torch device; auto: cuda if available, else cpu"""
    threads: int | Literal["auto"] = "auto"
    """CPU threads; auto: torch's default"""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """fp32: the networks' own dtype; bf16: autocast, losses and weights in fp32; auto: bf16 where the CPU supports it
    and the recipe was validated in it"""
    memory_format: Literal["channels_last", "contiguous"] = "channels_last"
    """memory format of weights and images; channels_last is faster"""
    fused: bool = True
    """fused optimisers: one kernel for all parameters"""
    cuda_graph: bool = False
    """run each step as one CUDA graph instead of launching its kernels one by one; for device cuda"""

    def __post_init__(self) -> None:
        if self.cuda_graph and not self.fused:
            raise UsageError(
                "machine.cuda_graph needs machine.fused, as other optimisers wait for the device: set both or neither"
            )


@dataclass(frozen=True)
class Config:
    """All settings of a distillation run."""

    format: int = 2
    """version of these settings, the log and checkpoints; 1 was zskt before its methods were separated"""
    recipe: str = "zskt"
    """the recipe that these values started from"""
    method: str = "belief_matching"
    """belief_matching, bank, or the function that builds a custom method"""
    steps: int = 80_000
    """outer iterations N = pseudo batches in the paper's counting [paper: 80,000 for CIFAR-10, 50,000 for SVHN]; bank:
    student updates, and the generator updates of the warm-up"""
    batch_size: int = 128
    """pseudo images per batch [code]; bank: in a batch of the student"""
    budget: str = ""
    """time that steps, and the rounds of a bank, are chosen for, as in 90s, 10m, 2h; empty: as given"""
    seed: int = 0
    """for latents, initialisation and dropout"""
    log_every: int | Literal["auto"] = "auto"
    """steps between lines of metrics.jsonl; auto: at most 1,000 lines"""
    evaluate_every: int | Literal["auto"] = "auto"
    """steps between evaluations and sample images; auto: 20 in a run"""
    checkpoint_every: int | Literal["auto"] = "auto"
    """steps between checkpoints; auto: 50 in a run"""
    on_collapse: Literal["warn", "restart"] = "warn"
    """restart: at a warning of collapse or of a dead generator go back to the last good checkpoint, with half of the
    generator's learning rate, three times at the most"""
    machine: Machine = field(default_factory=Machine)
    """device, threads and arithmetic"""
    generator: Generator = field(default_factory=Generator)
    """the generator"""
    student: Student = field(default_factory=Student)
    """the student"""
    replay: Replay = field(default_factory=Replay)
    """the pseudo batches for the student"""
    bank: Bank = field(default_factory=Bank)
    """the bank of images"""
    schedule: Schedule = field(default_factory=Schedule)
    """learning rate schedule"""

    def __post_init__(self) -> None:
        for name, value in flat(self).items():
            check_bounds(name, value)
            if name in _POSITIVE and not (value == "auto" or value > 0):
                raise UsageError(f"{name} = {value!r}: expected a positive number")
            if name in _NOT_NEGATIVE and not (value == "auto" or value >= 0):
                raise UsageError(f"{name} = {value!r}: expected 0 or a positive number")
        if self.format != FORMAT:
            raise UsageError(f"format = {self.format}: expected {FORMAT}, as this version writes; {OTHER_FORMAT}")
        if not 0 <= self.generator.beta1 < 1:
            raise UsageError(f"generator.beta1 = {self.generator.beta1}: expected at least 0 and below 1")
        if self.budget and math.isinf(parse_limit(self.budget, "budget")[0]):
            raise UsageError(f"budget = {self.budget!r}: expected a time such as 90s, 9m or 2h")
        if self.batch_size < 2:
            raise UsageError("batch_size = 1: expected at least 2, as BatchNorm compares the images of a batch")
        student, schedule, loss = self.student, self.schedule, self.generator.loss
        if student.nesterov and not student.momentum:
            raise UsageError("student.nesterov has no effect without student.momentum: set both or neither")
        if student.optimizer == "adam" and student.momentum:
            raise UsageError("student.momentum is for sgd, found student.optimizer = adam: drop one of them")
        if (self.replay.kind == "buffer") != (self.replay.capacity > 0):
            raise UsageError("replay.capacity and replay.kind = buffer go together: set both or neither")
        self._check_bank()
        divergences = ("kl", "l1", "jensen_shannon")
        for name, value in vars(loss).items():
            if name in divergences and value > 0:
                raise UsageError(
                    f"generator.loss.{name} = {value}: expected 0 or a negative weight, as the generator looks for "
                    "images on which the networks disagree"
                )
            if isinstance(value, float) and name not in divergences and value < 0:
                raise UsageError(f"generator.loss.{name} = {value}: expected 0 or a positive weight")
        for name, value in vars(student.loss).items():
            if isinstance(value, float) and value < 0:
                raise UsageError(
                    f"student.loss.{name} = {value}: expected 0 or a positive weight, as the student learns to agree"
                )
        for name, updates in (("generator", self.generator.updates), ("student", student.updates)):
            if updates > MOST_UPDATES:
                raise UsageError(
                    f"{name}.updates = {updates:,}: expected at most {MOST_UPDATES:,}, as a run is logged, saved and "
                    "stopped between steps; set more steps"
                )
        if not any(getattr(student.loss, name) for name in ("kl", "l1", "attention")):
            raise UsageError("all weights of student.loss are 0: set student.loss.kl")
        if not any(value for name, value in vars(loss).items() if name not in ("kl_scale", "kl_where")):
            raise UsageError("all weights of generator.loss are 0: set generator.loss.kl")
        unused = {
            "student.loss.temperature": (student.loss.temperature != 1 and not student.loss.kl, "student.loss.kl"),
            "student.loss.kl_scale": (student.loss.kl_scale != "per_class" and not student.loss.kl, "student.loss.kl"),
            "student.loss.stages": (bool(student.loss.stages) and not student.loss.attention, "student.loss.attention"),
            "generator.loss.kl_scale": (loss.kl_scale != "per_class" and not loss.kl, "generator.loss.kl"),
            "generator.loss.kl_where": (loss.kl_where != "everywhere" and not loss.kl, "generator.loss.kl"),
            "schedule.clock": (schedule.clock != "step" and schedule.kind == "constant", "another schedule.kind"),
            "schedule.factor": (schedule.factor != 0.1 and schedule.kind != "multistep", "schedule.kind = multistep"),
        }
        for name, (is_unused, needed) in unused.items():
            if is_unused:
                raise UsageError(f"{name} has no effect without {needed}: set both or neither")

    def _check_bank(self) -> None:
        """Raise UsageError for settings that do not go with the method."""
        if self.method == "belief_matching" and self.bank != Bank():
            raise UsageError("bank.* has no effect without method = bank: set both or neither")
        if self.method != "bank":
            return
        warmup = self.bank.warmup * self.generator.updates
        if not 0 < self.bank.warmup <= self.bank.rounds:
            raise UsageError(
                f"bank.warmup = {self.bank.warmup}: expected at least 1 and at most bank.rounds = {self.bank.rounds}, "
                "as the student learns from what is there"
            )
        if warmup >= self.steps:
            raise UsageError(
                f"steps = {self.steps}: expected more than the {warmup} of the warm-up, bank.warmup x generator.updates"
            )
        if self.student.updates != 1:
            raise UsageError(f"student.updates = {self.student.updates}: expected 1, as method is bank")
        unused = {
            "replay.kind": self.replay != Replay(),
            "generator.mode_for_student": self.generator.mode_for_student != "train",
            "student.mode_for_generator": self.student.mode_for_generator != "train",
            "generator.loss.activation": self.generator.loss.activation != 0,
        }
        for name in (name for name, is_set in unused.items() if is_set):
            raise UsageError(f"{name} has no effect with method = bank: leave it out")
        if self.student.loss.attention:
            raise UsageError(
                "student.loss.attention needs the teacher's stages, which a bank does not hold: set it to 0"
            )
        if self.generator.output != "pixels":
            raise UsageError("generator.output = batchnorm: expected pixels, as a bank stores images as bytes")
        if (self.bank.reset == "nothing") != (self.bank.reset_every == 0):
            raise UsageError("bank.reset and bank.reset_every go together: set both or neither")
        if self.bank.pixels and (self.bank.survives, self.bank.reset) != ("last", "nothing"):
            raise UsageError("bank.survives and bank.reset have no effect with bank.pixels: set one or the other")
        crop = self.bank.random_crop
        if crop != "auto" and crop > MOST_CROP:
            raise UsageError(
                f"bank.random_crop = {crop}: expected at most {MOST_CROP}, as a bank stores places as bytes"
            )
        if not 0 < self.bank.until <= 1:
            raise UsageError(f"bank.until = {self.bank.until}: expected a fraction of the run, above 0 and at most 1")
        if not 0 <= self.bank.momentum < 1:
            raise UsageError(f"bank.momentum = {self.bank.momentum}: expected at least 0 and below 1")

    RENAMED: ClassVar[dict[str, str]] = {
        **{name: f"machine.{name}" for name in ("device", "precision", "memory_format", "fused", "cuda_graph")},
        **{f"memory.{name}": f"replay.{name}" for name in ("kind", "capacity")},
        "student.mode_in_search": "student.mode_for_generator",
    }
    """names in format 1 -> names now"""
    GONE: ClassVar[dict[str, float]] = {"student.loss.jensen_shannon": 0.0}
    """settings that are no more -> the value that had no effect, which configs of earlier runs hold"""

    def interval(self, what: Literal["log_every", "evaluate_every", "checkpoint_every"]) -> int:
        """The number of steps between two of these, with `auto` resolved."""
        value: int | str = getattr(self, what)
        times = {"log_every": 1_000, "evaluate_every": 20, "checkpoint_every": 50}[what]
        return -(-self.steps // times) if isinstance(value, str) else value


FORMAT = 2
MOST_UPDATES = 100_000  # of one network in a step
MOST_CROP = 127  # pixels on each side: a view's place, up to twice as many, is stored as a byte
OTHER_FORMAT = "finish or read that run with the version of zskt that wrote it, which student.json names"

_POSITIVE = {
    "machine.threads",
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
    "bank.batch_size",
    "bank.latent_learning_rate",
}
_NOT_NEGATIVE = {
    "seed",
    "generator.clip",
    "student.clip",
    "student.momentum",
    "student.weight_decay",
    "replay.capacity",
    "bank.rounds",
    "bank.warmup",
    "bank.until",
    "bank.momentum",
    "generator.beta1",
    "bank.views",
    "bank.reset_every",
    "bank.random_crop",
}


def read_config(path: Path) -> Config:
    """The config.toml of a run; raises ZsktError if it has another format."""
    text = read_text(path)
    if not re.search(r"^format *=", text, re.MULTILINE):
        raise ZsktError(f"expected format {FORMAT} in {path}, found an earlier one; {OTHER_FORMAT}")
    return from_toml(Config, without(text, Config.GONE, str(path)), str(path))

"""Evaluations of a run's student while it goes on, and the warnings that follow from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from zskt.evaluate.measures import judge, new_warnings, predict, pseudo_beliefs, pseudo_image_warnings
from zskt.files import read_sealed, write_tensors
from zskt.method.bank import BankDistillation
from zskt.method.generator import SAMPLES
from zskt.method.losses import forward_kl
from zskt.method.protocol import Method
from zskt.networks import ranks
from zskt.networks.classifier import Classifier
from zskt.networks.observe import evaluating, logits_of
from zskt.run.checkpoint import HALF_WAY
from zskt.run.plots import believed_grid, save_image
from zskt.runtime import seeded

COLLAPSES = {"collapse", "dead generator"}
"""Kinds of warnings that a gentler generator may mend."""


@dataclass
class Examiner:
    """Evaluates a run's student: beliefs about pseudo images, accuracy and agreement on test images."""

    teacher: Classifier
    method: Method
    folder: Path | None
    images: tuple[Tensor, Tensor] | None
    searches: bool = False  # whether the pseudo images are from a generator that searches for disagreement
    answers: Tensor | None = None
    measured: dict[str, float] = field(default_factory=dict)
    past: list[dict[str, Any]] = field(default_factory=list)
    """earlier evaluations of the run"""

    def examine(self, step: int) -> dict[str, Any]:
        """Both networks' beliefs about 64 pseudo images, always of the same seed, new warnings, and `measure`.

        No beliefs before a bank has images: those of its first round, half made, say nothing.
        """
        self.past = [line for line in self.past if line["step"] < step]  # the run may have gone back
        bank = self.method if isinstance(self.method, BankDistillation) else None
        line = self.beliefs(step) if bank is None or bank.has_images else {}
        if not ranks.is_main():
            return {}
        self.keep_generator(step)
        if line:
            progress = step / self.method.steps if bank is None else bank.progress
            if warnings := new_warnings(self.past, line, progress):
                line["warnings"] = warnings
            self.past.append(line | {"step": step})
        return line | (self.measure() if self.images is not None else {})

    def keep_generator(self, step: int) -> None:
        """Save the generator at the first evaluation of the run's second half: its images examine the student later."""
        half = self.method.steps / 2
        generator = self.method.modules().get("generator")
        if self.folder is None or generator is None or any(line["step"] >= half for line in self.past):
            return
        if half <= step < self.method.steps:
            write_tensors(self.folder / f"{HALF_WAY}.safetensors", generator.state_dict())

    def judge(self, line: Mapping[str, Any]) -> str | None:
        """What an evaluation's line says of the generator: sound, suspect, or collapsed once a warning is due."""
        if "class_entropy" not in line:
            return None
        if any(text.split(":")[0] in COLLAPSES for text in line.get("warnings", [])):
            return "collapsed"
        return "suspect" if COLLAPSES & pseudo_image_warnings(line).keys() else "sound"

    def said(self) -> list[str]:
        """All warnings so far."""
        return [text for line in self.past for text in line.get("warnings", [])]

    def beliefs(self, step: int | None = None) -> dict[str, Any]:
        """Both networks' beliefs about the pseudo images; with a `step`, also saves the images under its number."""
        with seeded(0, next(self.method.student.parameters()).device):  # a method may seed the global generator itself
            x = self.method.sample(SAMPLES, 0)  # (64, C, H, W); ranks draw them together
        if not ranks.is_main():
            return {}
        with ranks.alone(), evaluating(self.method.student):
            logits = {"T": self.teacher(x), "S": logits_of(self.method.student(x))}  # (64, K) each
        if step is not None and self.folder is not None:
            grid = believed_grid(self.teacher.denormalise(x), logits, self.teacher.class_names)
            save_image(self.folder / "samples" / f"{step:08d}.png", grid)
        variation = float(self.teacher.denormalise(x.float()).std(dim=0).mean())  # of a pixel, over the images
        # Where the images are a bank's, the student has learnt them: that it matches there says nothing.
        found = {"adversary_kl": float(forward_kl(logits["S"], logits["T"]))} if self.searches else {}
        return pseudo_beliefs(logits["T"], logits["S"]) | {"pseudo_variation": variation} | found

    def measure(self) -> dict[str, float]:
        """Accuracy and agreement now; the teacher's predictions are computed once per run."""
        assert self.images is not None
        pictures, labels = self.images
        with ranks.alone():
            if self.answers is None:
                self.answers = predict(self.teacher, pictures)  # (M, K)
            self.measured = judge(predict(self.teacher.like(self.method.student), pictures), labels, self.answers)
        return self.measured

    def last(self) -> dict[str, float]:
        """Measures at the last step, or those on disk for a finished run that is resumed without images."""
        if self.images is not None:
            return self.measured or self.measure()
        if self.folder is not None and (self.folder / "student.json").exists():
            found: dict[str, float] = read_sealed(self.folder / "student.json").get("measured", {})
            return found
        return {}

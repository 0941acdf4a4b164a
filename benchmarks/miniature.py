"""Choosing settings of the bank in miniature, on CIFAR-10, without the test images.

python benchmarks/miniature.py TEACHER --rounds 10 [KEY=VALUE ...]
python benchmarks/miniature.py TEACHER --data cifar10-train.zip --student wrn-10-1 steps=1500 [KEY=VALUE ...]

The first form needs no data: after each round of synthesis it prints how many images the teacher takes for their target
class, and the BatchNorm prior's distance. The second distils and prints the accuracy on 5,000 of the training images.
"""

import argparse
import json

import torch

import zskt
from zskt.data.images import KNOWN, read
from zskt.method.bank import BankDistillation
from zskt.method.build import arrange
from zskt.method.recipe import plan
from zskt.networks.checks import as_teacher
from zskt.networks.models import build
from zskt.runtime import arithmetic
from zskt.settings import from_text

SETTINGS = {"machine.precision": "bf16", "bank.horizontal_flip": True}


def synthesis(teacher: zskt.Classifier, student: torch.nn.Module, rounds: int, settings: dict[str, object]) -> None:
    """Print hits and distance after each round."""
    planned = plan(teacher, student, "bank", {"steps": 9_000} | settings)
    frozen = as_teacher(teacher)
    arrange(frozen, planned.config)
    arrange(student, planned.config)
    torch.manual_seed(0)
    method = planned.make(frozen, student, planned.config)
    assert isinstance(method, BankDistillation)
    weight = planned.config.generator.loss.batchnorm
    with arithmetic():
        for number in range(1, rounds + 1):
            made = None
            while made is None:
                losses, made = method.synthesis.update()
            with torch.no_grad():
                hits = (frozen(made.images).argmax(dim=1) == made.labels).double().mean()
            distance = float(losses.terms["batchnorm"]) / weight
            print(
                json.dumps({"round": number, "hits": round(float(hits), 3), "distance": round(distance, 2)}), flush=True
            )


def main() -> None:
    """Measure one setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--student", default="wrn-10-1")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--data", nargs="+")
    arguments = parser.parse_intermixed_args()
    settings = SETTINGS | dict(from_text(text) for text in arguments.settings)
    teacher = zskt.load_teacher(arguments.teacher)
    torch.manual_seed(int(str(settings.get("seed", 0))))
    student = build(arguments.student, teacher.num_classes, teacher.input_size)
    if arguments.rounds:
        synthesis(teacher, student, arguments.rounds, settings)
        return
    train = read(arguments.data, "train", size=KNOWN["cifar10"].size)
    chosen = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(7))[:5_000]  # (5,000,)
    held_out = train.images[chosen], train.labels[chosen]
    result = zskt.distill(teacher, student, "bank", settings=settings, evaluate=held_out)
    print(json.dumps({"settings": settings, **result.measured}))


if __name__ == "__main__":
    main()

"""The student's update: in the bank, compiled, in recipe `zskt`, and a plain loop of torch, in turns on one machine.

python benchmarks/student_update.py [--pairs wrn] [--rounds 10] [--device cuda]

plain     the least it can be: KL towards logits that lie ready, for images that lie ready, SGD; no hooks, no views
bank      an update from the bank, with drawing the batch, cutting views from bytes and normalising them
compiled  the same with the student under torch.compile
zskt      an update of recipe `zskt`, attention term included, for a batch that lies ready with the teacher's answer

Run it on an idle machine. What compiling costs before the first update is a column of its own.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import record
from zskt.bench import step_time as bench
from zskt.method import build
from zskt.method.bank import BankDistillation
from zskt.method.config import Config
from zskt.method.recipe import load_recipe
from zskt.networks.classifier import Classifier
from zskt.runtime import pick_device, seeded
from zskt.settings import replace

ROUNDS = 8
"""Of images in the bank: more than a batch, so that drawing gathers."""


def networks(pair: bench.Pair, config: Config, device: torch.device) -> tuple[Classifier, torch.nn.Module]:
    """Teacher and student with random weights, arranged as the config says."""
    with seeded(0):
        teacher, student, _ = bench.networks(pair, device)
    build.arrange(teacher, config)
    build.arrange(student, config)
    return teacher, student


def from_bank(pair: bench.Pair, config: Config, device: torch.device, compiled: bool) -> Callable[[], object]:
    """An update of the student from a bank of random images."""
    teacher, student = networks(pair, config, device)
    if compiled:
        student = torch.compile(student)  # type: ignore[assignment]
    method = build.bank(teacher, student, config)
    assert isinstance(method, BankDistillation)
    method.bank.add(torch.randn(ROUNDS * config.bank.batch_size, *pair.input_size, device=device))
    return lambda: method.student_step(method.bank.draw(config.batch_size))


def from_matching(pair: bench.Pair, precision: bench.Precision, device: torch.device) -> Callable[[], object]:
    """An update of recipe `zskt`."""
    matching = bench.engine(pair, precision, device)
    batch = matching.ask(matching.draw())
    return lambda: matching.student_step(batch)


def plain(pair: bench.Pair, config: Config, device: torch.device) -> Callable[[], object]:
    """The same optimiser and loss on a batch that lies ready."""
    teacher, student = networks(pair, config, device)
    images = torch.randn(config.batch_size, *pair.input_size, device=device)  # (N, C, H, W)
    heat = config.student.loss.temperature
    with torch.no_grad():
        target = (teacher(images) / heat).log_softmax(dim=1)  # (N, K)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)
    student.train()

    def update() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.machine.precision == "bf16"):
            logits = student(images)  # (N, K)
        beliefs = (logits.float() / heat).log_softmax(dim=1)  # (N, K)
        loss = heat**2 * F.kl_div(beliefs, target, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return update


def measure(pair: bench.Pair, precision: bench.Precision, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds of each arm's updates, in turns after two of each, and what compiling takes."""
    size = {"steps": 1_000_000, "batch_size": pair.batch_size, "generator.width": 16, "machine.precision": precision}
    size |= {
        "bank.rounds": ROUNDS,
        "bank.warmup": 1,
        "bank.views": 1,
        "bank.random_crop": 4,
        "bank.horizontal_flip": True,
    }
    config = replace(load_recipe("bank"), size)
    arms = {
        "plain": plain(pair, config, device),
        "bank": from_bank(pair, config, device, False),
        "compiled": from_bank(pair, config, device, True),
        "zskt": from_matching(pair, precision, device),
    }
    taken = bench.in_turns(arms, device, rounds + 2)
    seconds = {arm: times[2:] for arm, times in taken.items()}
    return {"seconds": seconds, "compiling": taken["compiled"][0] - statistics.median(seconds["compiled"])}


def main() -> None:
    """Time each pair in the precisions that the machine computes in."""
    arguments = record.pair_arguments(__doc__, "rounds")
    device = pick_device(arguments.device)
    precisions: list[bench.Precision] = ["fp32"]
    if device.type == "cuda" or torch.cpu._is_avx512_bf16_supported():
        precisions.append("bf16")
    results, rows = {}, []
    for name in arguments.pairs:
        for precision in precisions:
            pair = bench.PAIRS[name]
            found = measure(pair, precision, device, arguments.rounds)
            results[f"{name}, {precision}"] = found
            seconds = found["seconds"]
            for arm, times in seconds.items():
                cells = [f"{statistics.median(times):.3f}"]
                for other in ("plain", "zskt"):
                    ratios = sorted(a / b for a, b in zip(seconds[other], times, strict=True))
                    cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
                compiling = f"{found['compiling']:.0f}" if arm == "compiled" else ""
                what = f"{pair.teacher} -> {pair.student}, batch {pair.batch_size}"
                rows.append([what, precision, arm, *cells, compiling])
    head = ["pair", "precision", "update", "s, median", "times as fast as plain", "as zskt", "compiling, s"]
    name = "-".join(["student-update", *arguments.pairs, device.type])
    record.write(name, "One update of the student, in turns", results, head, rows)


if __name__ == "__main__":
    main()

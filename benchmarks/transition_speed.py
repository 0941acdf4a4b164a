"""The speed-up of batched transition curves over the released loop (batch size 1, with weight gradients).

python benchmarks/transition_speed.py

64 images, 9 target classes, 30 steps, a pair of WRN-16-1; both arms interleaved in one process with the same threads.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.progress import track

import record
from zskt.bench.reference import released_transitions
from zskt.evaluate.transitions import Paths, transition_curves
from zskt.networks import models
from zskt.networks.classifier import Classifier
from zskt.runtime import arithmetic, pick_device, seeded, synchronise

SIZE = (3, 32, 32)


def main() -> None:
    """Time both arms; record the median of the pairwise ratios and the largest difference between the curves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    with seeded(0):
        first, second = (
            Classifier(models.wide_resnet(16, 1), input_size=SIZE, mean=[0.5] * 3, std=[0.25] * 3).to(device)
            for _ in range(2)
        )
        images = torch.rand(arguments.images, *SIZE)
    starts = torch.arange(arguments.images) % 10
    first.module.requires_grad_(True)  # as released, where weight gradients are computed and unused
    x = first.normalise(images)

    def released(count: int = arguments.images, steps: int = arguments.steps) -> Any:
        return released_transitions(first, second, x[:count], starts[:count], 10, steps=steps, step_size=1.0)

    def ours(count: int = arguments.images, steps: int = arguments.steps) -> Any:
        return transition_curves(first, second, images[:count], starts[:count], Paths(steps=steps))

    def timed(work: Callable[[], Any]) -> float:
        synchronise(device)
        begun = time.perf_counter()
        work()
        synchronise(device)
        return time.perf_counter() - begun

    with arithmetic():
        loop, batched = released(2, 4), ours(2, 4)  # warm-up, also compared below
        difference = float((torch.stack(loop).cpu() - batched.examples).abs().max())
        pairs = [(timed(released), timed(ours)) for _ in track(range(arguments.rounds))]
    ratios = [slow / fast for slow, fast in pairs]
    result = {
        "device": str(device),
        "images": arguments.images,
        "steps": arguments.steps,
        "speedup": statistics.median(ratios),
        "ratios": ratios,
        "seconds_released": [slow for slow, _ in pairs],
        "seconds_batched": [fast for _, fast in pairs],
        "largest_difference": difference,
    }
    rows = [[f"{slow:.1f}", f"{fast:.1f}", f"{slow / fast:.2f}"] for slow, fast in pairs]
    work = f"{arguments.images} images, 9 targets, {arguments.steps} steps"
    title = f"Transition curves of {work}: {statistics.median(ratios):.1f} times as fast"
    head = ["released loop, s", "batched, s", "ratio"]
    record.write(f"transition-speed-{device.type}", title, result, head, rows)


if __name__ == "__main__":
    main()

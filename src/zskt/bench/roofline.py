"""How much of this machine a step uses: the time that its operations and bytes would take at best, by phase.

What is counted is what runs: every product (convolution, linear layer, their gradients) with its operations, and with
the bytes of its operands and results, each moved once; every fused optimiser with its state. All else, such as
BatchNorm, activations and losses, could be done on the way, so that these are the fewest bytes. A product takes no less
than its operations at the rate of a large matrix product and its bytes at the rate of a copy, whichever is more; both
rates are measured in the same run.
"""

import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from zskt.method.matching import BeliefMatching
from zskt.runtime import arithmetic, seeded, synchronise

PHASES = {
    "generator_step": "generator update",
    "draw": "draw images",
    "ask": "ask the teacher",
    "student_step": "student updates",
}
"""Methods of the step, in order, and what they do; a generator update runs all networks forwards and backwards."""

MATRIX = {"cpu": 3072, "cuda": 8192}
"""Side of the matrices whose product gives the peak rate."""
COPIED = 2**28
"""Bytes that are copied, more than most caches hold."""


@dataclass
class Work:
    """What one phase does in one step."""

    operations: float = 0.0
    bytes: float = 0.0
    products: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    """(operations, bytes) of a product -> how many of them"""

    def at_best(self, rate: float, bandwidth: float) -> float:
        """Seconds at `rate` operations and `bandwidth` bytes per second, product by product."""
        return sum(count * max(ops / rate, size / bandwidth) for (ops, size), count in self.products.items())


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts products and fused optimisers while it is on, under the phase that it is told."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phases: dict[str, Work] = defaultdict(Work)
        self.phase = "other"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        optimiser = packet.__name__.startswith("_fused_")
        if packet in flop_registry or optimiser:
            operations = 0 if optimiser else flop_registry[packet](*args, **(kwargs or {}), out_val=result)
            tensors = [leaf for leaf in tree_leaves((args, kwargs or {}, result)) if isinstance(leaf, Tensor)]
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            if optimiser:  # gradients are read; parameters and moments are read and written
                size = 2 * size - sum(gradient.numel() * gradient.element_size() for gradient in args[1])
            work = self.phases[self.phase]
            work.operations += operations
            work.bytes += size
            work.products[int(operations), int(size)] += 1
        return result


@contextlib.contextmanager
def watching(matching: BeliefMatching, around: Callable[[str, Callable[[], Any]], Any]) -> Iterator[None]:
    """Every phase of the step is called as around(its name, the call) for a while."""

    def wrapped(name: str) -> Callable[..., Any]:
        inner = getattr(matching, name)
        return lambda *args, **kwargs: around(name, lambda: inner(*args, **kwargs))

    try:
        for name in PHASES:
            setattr(matching, name, wrapped(name))
        yield
    finally:
        for name in PHASES:
            delattr(matching, name)


def count(matching: BeliefMatching) -> dict[str, Work]:
    """The products of one step, by phase."""
    counter = Counter()

    def around(name: str, call: Callable[[], Any]) -> Any:
        outside, counter.phase = counter.phase, name
        try:
            return call()
        finally:
            counter.phase = outside

    with watching(matching, around), counter:
        matching.step()
    return {name: counter.phases[name] for name in (*PHASES, "other") if name in counter.phases}


def clock(matching: BeliefMatching, device: torch.device, steps: int) -> dict[str, float]:
    """Seconds of each phase in a step, and of all under "step": medians over `steps`."""
    taken: dict[str, list[float]] = {name: [] for name in (*PHASES, "step")}

    def around(name: str, call: Callable[[], Any]) -> Any:
        synchronise(device)
        begun = time.perf_counter()
        result = call()
        synchronise(device)
        taken[name][-1] += time.perf_counter() - begun
        return result

    with watching(matching, around), arithmetic():
        for _ in range(steps):
            for times in taken.values():
                times.append(0.0)
            around("step", matching.step)
    return {name: statistics.median(values) for name, values in taken.items()}


def peaks(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Operations per second of a large matrix product, bytes per second (read and written) of a large copy."""
    side = MATRIX[device.type]
    with seeded(0, device):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    result = torch.empty_like(a)
    source = torch.ones(COPIED, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def best(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(7):
            synchronise(device)
            begun = time.perf_counter()
            work()
            synchronise(device)
            times.append(time.perf_counter() - begun)
        return min(times)

    return 2 * side**3 / best(lambda: torch.mm(a, b, out=result)), 2 * COPIED / best(lambda: target.copy_(source))


def explain(matching: BeliefMatching, device: torch.device, dtype: torch.dtype, *, steps: int = 5) -> dict[str, Any]:
    """Operations, fewest bytes, seconds at best and measured, and the fraction of the attainable, by phase.

    The matching takes `steps` + 2 further steps. Phases that a recipe does not have are left out; `step` is all of it.
    """
    matching.step()
    works = count(matching)
    rate, bandwidth = peaks(device, dtype)
    seconds = clock(matching, device, steps)
    rows = {
        name: {
            "operations": work.operations,
            "bytes": work.bytes,
            "seconds_at_best": work.at_best(rate, bandwidth),
            "seconds": seconds[name],
        }
        for name, work in works.items()
        if name in PHASES
    }
    rows["step"] = {key: sum(row[key] for row in rows.values()) for key in ("operations", "bytes", "seconds_at_best")}
    rows["step"]["seconds"] = seconds["step"]
    for row in rows.values():
        row["fraction"] = row["seconds_at_best"] / row["seconds"]
    return {"operations_per_second": rate, "bytes_per_second": bandwidth, "phases": rows}

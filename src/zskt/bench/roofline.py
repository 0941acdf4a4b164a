"""A roofline of the step: the least time that its operations and bytes could take on this machine, by phase.

The operations that run are counted: for every matrix product (convolution, linear layer, their gradients) its FLOPs,
and the bytes of its operands and results, each moved once; for every fused optimiser its state. Everything else, such
as BatchNorm, activations and losses, could be fused, so this is a lower bound on the bytes. A product takes at least
its FLOPs at the rate of a large matrix product, or its bytes at the rate of a large copy if that is longer; both rates
are measured in the same run.
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
    "draw": "generate images",
    "ask": "teacher forward",
    "student_step": "student updates",
}
"""Methods of the step, in order, and their names; the generator update runs all three networks forward and backward."""

MATRIX = {"cpu": 3072, "cuda": 8192}  # side of the square matrices whose product gives the peak rate
COPIED = 2**28  # bytes copied to measure the bandwidth, more than most caches hold


@dataclass
class Work:
    """The work of one phase in one step."""

    operations: float = 0.0
    bytes: float = 0.0
    products: dict[tuple[int, int], int] = field(default_factory=lambda: defaultdict(int))
    """(operations, bytes) of a product -> count"""

    def at_best(self, rate: float, bandwidth: float) -> float:
        """Seconds at `rate` operations and `bandwidth` bytes per second, product by product."""
        return sum(count * max(ops / rate, size / bandwidth) for (ops, size), count in self.products.items())


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts products and fused optimisers while it is active, under the current `phase`."""

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
            if optimiser:  # gradients are read, parameters and moments read and written
                size = 2 * size - sum(gradient.numel() * gradient.element_size() for gradient in args[1])
            work = self.phases[self.phase]
            work.operations += operations
            work.bytes += size
            work.products[int(operations), int(size)] += 1
        return result


@contextlib.contextmanager
def watching(matching: BeliefMatching, around: Callable[[str, Callable[[], Any]], Any]) -> Iterator[None]:
    """Replace each call of a phase by around(its name, the call)."""

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
    """The work of one step, by phase."""
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
    """Seconds of each phase, and of the whole under "step": medians over `steps`."""
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
    """FLOP/s of a large matrix product, and bytes per second (read and written) of a large copy."""
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
    """By phase: operations, least bytes, least seconds, measured seconds, and the ratio of the last two.

    The matching takes `steps` + 2 steps. Phases that a recipe lacks are omitted; `step` is the whole.
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

"""A step as a CUDA graph: recorded once, then launched as a whole.

An outer iteration is some thousand kernels, most of them short, and a CPU cannot launch them as fast as a GPU runs
them. A graph repeats the same kernels on the same memory, so whatever changes from step to step is in tensors that they
read: learning rates are copied in, random generators advance with the graph, the replay buffer's slot is on the device.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from zskt.errors import ZsktError, first_line
from zskt.method.matching import BeliefMatching
from zskt.method.replay import ReplayBuffer
from zskt.run.checkpoint import optimizer_state
from zskt.runtime import seeded

WARM_UP = 3  # steps before the recording, in which libraries choose algorithms; their effect is undone

Step = Callable[[], Mapping[str, Tensor]]
Record = Callable[[Step, Sequence[torch.Generator]], Step]
"""Runs a step WARM_UP times and records it; returns a function that repeats it into the same tensors."""


def record_cuda(step: Step, generators: Sequence[torch.Generator]) -> Step:
    """Record a CUDA graph, in which `generators` draw new numbers at every repetition."""
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # capturable optimisers that run before they are captured
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        losses = step()

    def repeat() -> Mapping[str, Tensor]:
        graph.replay()
        return losses

    return repeat


class CapturedStep:
    """`matching.step`, recorded as soon as possible and repeated from then on; equal up to rounding.

    Its losses are copies, which the next step does not overwrite. Raises ZsktError for networks that synchronise with
    the device or otherwise cannot be recorded.
    """

    def __init__(self, matching: BeliefMatching, record: Record = record_cuda) -> None:
        self.matching = matching
        replay = matching.replay
        self.generators = [matching.rng, *([replay.rng] if isinstance(replay, ReplayBuffer) else [])]
        self.record = record
        self.players = [matching.generator_updates, matching.student_updates]
        device = next(matching.generator.parameters()).device
        self.rates = [torch.zeros(player.count, device=device) for player in self.players]
        self.repeat: Step | None = None

    def __call__(self) -> Mapping[str, Tensor]:
        if self.repeat is None and self.matching.replay.steady:
            self.repeat = self._recorded()
        if self.repeat is None:
            return self.matching.step()
        for player, rates in zip(self.players, self.rates, strict=True):
            if player.rate is not None:
                values = torch.tensor([player.rate(player.done + i) for i in range(player.count)])
                rates.copy_(values, non_blocking=True)  # otherwise the host would wait for the previous step
            player.done += player.count
        return {name: value.clone() for name, value in self.repeat().items()}

    def _recorded(self) -> Step:
        """The recorded step; networks, optimisers, replay buffer and random state are restored."""
        for player in self.players:
            for group in player.optimizer.param_groups:
                group["capturable"] = True
        before = {name: tensor.clone() for name, tensor in self._state().items()}
        drawn = [generator.get_state() for generator in self.generators]
        with seeded(0, self.rates[0].device):  # dropout's random numbers, which the warm-up would use up
            try:
                repeat = self.record(self._step_fed, self.generators)
            except RuntimeError as error:
                raise ZsktError(
                    f"this step cannot be recorded as a CUDA graph ({first_line(error)}): use --set "
                    "machine.cuda_graph=false"
                ) from error
        for name, tensor in self._state().items():
            if name in before:
                tensor.copy_(before[name])
            else:  # state of an optimiser before its first step
                tensor.zero_()
        for generator, state in zip(self.generators, drawn, strict=True):
            generator.set_state(state)
        return repeat

    def _step_fed(self) -> Mapping[str, Tensor]:
        """A step that reads its learning rates from tensors and leaves the update counts unchanged."""
        kept = [(player, player.rate, player.done) for player in self.players]
        try:
            for (player, rate, done), rates in zip(kept, self.rates, strict=True):
                if rate is not None:
                    player.rate = lambda update, rates=rates, done=done: rates[update - done]
            return self.matching.step()
        finally:
            for player, rate, done in kept:
                player.rate, player.done = rate, done

    def _state(self) -> dict[str, Tensor]:
        """All tensors that a step changes, by name."""
        parts = {
            **{name: module.state_dict() for name, module in self.matching.modules().items()},
            "replay": self.matching.replay.state_dict(),
            **{f"{i}": optimizer_state(player.optimizer) for i, player in enumerate(self.players)},
        }
        return {f"{part}/{name}": tensor for part, state in parts.items() for name, tensor in state.items()}

"""What can be seen of any `nn.Module` from outside: logits, stage outputs, BatchNorm statistics, operations.

A stage is the part of a network that works at one resolution. Networks of `zskt.models` name theirs (`stages`); in
others the last child at each resolution is taken.
"""

import contextlib
import copy
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from zskt.errors import ZsktError, first_line, short

T = TypeVar("T")

Resolution = tuple[int, ...]
"""(H, W) of a map"""


class ChannelStatistics(NamedTuple):
    """One BatchNorm layer's input over a batch, beside what the layer remembers from training; each (C,)."""

    mean: Tensor
    variance: Tensor
    running_mean: Tensor
    running_variance: Tensor


@dataclass
class Observation:
    """One forward: logits (N, K), the named stages' outputs and, where asked for, BatchNorm input statistics."""

    logits: Tensor
    stages: list[Tensor] = field(default_factory=list)
    statistics: list[ChannelStatistics] = field(default_factory=list)
    _derived: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, derive: Callable[[], T]) -> T:
        """What `derive` returns, worked out once per observation: a teacher's answer serves many student updates."""
        if key not in self._derived:
            self._derived[key] = derive()
        result: T = self._derived[key]
        return result


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, in float32 if it came in a half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def logits_of(output: Any) -> Tensor:
    """The logits (N, K) in what a network returned, a teacher or a student.

    They may be all of it, its `.logits` or `["logits"]` (as in transformers), or the first tensor of a tuple or list.
    """
    logits = getattr(output, "logits", None)
    if isinstance(output, Tensor):
        logits = output
    elif isinstance(output, Mapping):
        logits = output.get("logits")
    elif logits is None and isinstance(output, (tuple, list)):
        logits = next((item for item in output if isinstance(item, Tensor)), None)
    if isinstance(logits, Tensor) and logits.ndim == 2:
        return logits
    found = "" if isinstance(output, Tensor) else f"{type(output).__name__} without logits"
    if isinstance(logits, Tensor):
        shape = f"a tensor of shape {tuple(logits.shape)}"
        found = f"{type(output).__name__} with {shape}" if found else shape
    raise ZsktError(f"expected a network that returns logits of shape (batch, classes), found {found}; wrap it")


def batchnorm_layers(module: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that remember statistics of their training data."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]


class Observer:
    """Calls a network and records stage outputs and BatchNorm input statistics by hooks, until closed.

    Statistics are recorded only where gradients flow: their one use is a prior on generated images.
    """

    def __init__(self, module: nn.Module, stages: Sequence[str] = (), *, statistics: bool = False) -> None:
        self.module = module
        self._outputs: dict[str, tuple[Tensor, int]] = {}
        self._statistics: list[ChannelStatistics] = []
        self._handles = [module.get_submodule(name).register_forward_hook(self._record_output(name)) for name in stages]
        self._names = tuple(stages)
        if statistics:
            for layer in batchnorm_layers(module):
                self._handles.append(layer.register_forward_pre_hook(self._record_input))

    def _record_output(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise ZsktError(f"{name} returns {type(output).__name__}, not a tensor; name another stage")
            self._outputs[name] = (output, output._version)

        return hook

    def _record_input(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            assert isinstance(layer, _BatchNorm)
            assert layer.running_mean is not None
            assert layer.running_var is not None
            x = at_least_float32(inputs[0])  # (N, C, ...)
            rest = [d for d in range(x.ndim) if d != 1]
            variance, mean = torch.var_mean(x, dim=rest, correction=0)  # (C,), (C,)
            self._statistics.append(ChannelStatistics(mean, variance, layer.running_mean, layer.running_var))

    def __call__(self, images: Tensor) -> Observation:
        """Observe one forward of `images` (N, C, H, W)."""
        self._outputs.clear()  # somebody else may have called the network since
        self._statistics.clear()
        try:
            logits = logits_of(self.module(images))
            for name, (output, version) in self._outputs.items():
                if output._version != version:
                    raise ZsktError(
                        f"the output of {name} is changed in place by a later layer (an in-place ReLU, say), so it is "
                        "no stage output; name the later layer as the stage or make it out of place"
                    )
            if unseen := [name for name in self._names if name not in self._outputs]:
                raise ZsktError(f"{unseen[0]} is no stage: the network does not call it; name another stage")
            stages = [self._outputs[name][0] for name in self._names]
            return Observation(logits, stages, list(self._statistics))
        finally:
            self._outputs.clear()
            self._statistics.clear()

    def close(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for a while; afterwards every submodule has its own mode back."""
    modes = [(child, child.training) for module in modules for child in module.modules()]
    for module in modules:
        module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, training in modes:
            child.training = training


def blank_images(module: nn.Module, size: tuple[int, ...]) -> Tensor:
    """A batch of two, which all networks take, of zeros, (2, *size), of the module's device and dtype."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    return torch.zeros(2, *size, dtype=like.dtype, device=like.device)


_BATCHES = (1, 4, 8, 16, 32, 64)  # tried where a batch of two is refused: perhaps the network is fixed to one of them


def refusal(module: nn.Module, images: Tensor, error: BaseException) -> ZsktError:
    """Why a network did not take images (2, C, H, W): another batch size, integers, or another image size."""

    size = images.shape[1:]

    def taken(images: Tensor) -> bool:
        try:
            with torch.no_grad():
                module(images)
        except (Exception, SystemExit):
            return False
        return True

    for count in _BATCHES:
        if taken(images[:1].expand(count, *size).contiguous()):
            return fixed_batch(count, error)
    if any(taken(images.to(dtype)) for dtype in (torch.uint8, torch.int64)):
        return ZsktError("the network takes integer images, which no gradient reaches; let it take floating-point ones")
    return ZsktError(
        f"the network does not take images of {' x '.join(map(str, size))} ({first_line(error)}); check the input size"
    )


def fixed_batch(count: int, error: BaseException) -> ZsktError:
    """The error for a network that takes one batch size only."""
    return ZsktError(
        f"the network takes batches of exactly {count} ({first_line(error)}); export it with a dynamic batch, as in "
        "torch.export.export(..., dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))"
    )


def check_state(module: nn.Module, who: str) -> None:
    """Raise ZsktError, with the name, unless all that a network remembers are ordinary tensors with values."""
    try:
        state = module.state_dict()
    except (Exception, SystemExit) as error:
        raise ZsktError(f"the {who} does not give its state ({first_line(error)}); mend its state_dict") from error
    for name, value in state.items():
        found = "" if isinstance(value, Tensor) else f"a {type(value).__name__}, which no weights file holds"
        if is_lazy(value):
            found = "one without a shape yet; show the network an image first"
        elif isinstance(value, Tensor) and value.is_meta:
            found = "one without values, on the meta device; load its weights"
        elif isinstance(value, Tensor) and value.layout is not torch.strided:
            found = f"one of layout {value.layout}; make it dense"
        if found:
            raise ZsktError(f"expected an ordinary tensor in {short(name)} of the {who}, found {found}")


def layout(module: nn.Module, size: tuple[int, ...]) -> torch.memory_format:
    """The memory format in which to hand over images of `size` = (C, H, W): channels_last where the network takes it.

    On a CPU it is up to twice as fast. A network that reshapes maps by `view` takes contiguous images only.
    """
    blank = blank_images(module, size).contiguous(memory_format=torch.channels_last)
    try:
        with evaluating(module):
            module(blank)
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def memory_format(module: nn.Module, size: tuple[int, ...]) -> torch.memory_format:
    """In which to lay out a network's weights beside images of `size` = (C, H, W): channels_last where it works."""
    try:
        twin = copy.deepcopy(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    except RuntimeError:  # a tensor with five dimensions
        return torch.contiguous_format
    return layout(twin, size)


def forward_flops(module: nn.Module, size: tuple[int, ...]) -> int:
    """Operations (two per multiply-accumulate) of one forward of one input of `size`: convolutions and products."""
    with evaluating(module), FlopCounterMode(display=False) as counter:
        module(blank_images(module, size))
    return int(counter.get_total_flops()) // 2


class _Call(NamedTuple):
    """One module's forward on maps: (H, W) of its input and output, the output, and its version at that moment."""

    came_with: tuple[int, ...]
    resolution: tuple[int, ...]
    output: Tensor
    version: int


def find_stages(module: nn.Module, size: tuple[int, int, int]) -> tuple[str, ...]:
    """Names of the submodules whose outputs are the stage outputs for images of `size` = (C, H, W), finest first."""
    named = getattr(module, "stages", None)
    if isinstance(named, (tuple, list)) and all(map([name for name, _ in module.named_modules()].__contains__, named)):
        return tuple(named)
    calls: dict[str, _Call] = {}
    tokens = False

    def watch(name: str) -> Any:
        def hook(child: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            nonlocal tokens
            x = inputs[0] if inputs else None
            tokens |= isinstance(output, Tensor) and output.ndim == 3
            if isinstance(x, Tensor) and isinstance(output, Tensor) and x.ndim == output.ndim == 4:
                calls.pop(name, None)  # a module called twice counts where it was called last
                calls[name] = _Call(tuple(x.shape[2:]), tuple(output.shape[2:]), output, output._version)

        return hook

    # What TorchScript has compiled calls its children where no hook sees it, and refuses hooks.
    called = [(name, m) for name, m in module.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
    handles = [child.register_forward_hook(watch(name)) for name, child in called if name]
    try:
        with evaluating(module):
            module(blank_images(module, size))
    finally:
        for handle in handles:
            handle.remove()
    if tokens:  # a transformer: its one map, the patch embedding, is no stage
        return ()

    # A container that is never called itself, such as a ModuleList, leaves its children to the next one up.
    children: dict[str, list[str]] = {name: [] for name in ("", *calls)}
    for name in calls:
        above = name.split(".")[:-1]
        while ".".join(above) not in children:
            above.pop()
        children[".".join(above)].append(name)

    def visit(parent: str) -> Iterator[str]:
        for name in children[parent]:
            # A block that halves the resolution once also contains layers at its input's: only a child with several
            # resolutions of its own is a trunk that holds several stages.
            own = {calls[child].resolution for child in children[name]} - {calls[name].came_with}
            if len(own) > 1:
                yield from visit(name)
            else:
                yield name

    last: dict[tuple[int, ...], str] = {}
    for name in visit(""):
        call = calls[name]
        if call.resolution == (1, 1) or call.output._version != call.version:  # pooled away, or overwritten in place
            continue
        # A composite (a block) is a better place than a norm or an activation that follows it.
        if call.resolution not in last or children[name] or not children[last[call.resolution]]:
            last[call.resolution] = name
    return tuple(last.values())


def stage_resolutions(module: nn.Module, stages: Sequence[str], size: tuple[int, int, int]) -> list[Resolution]:
    """(H, W) of each named stage's output for images of `size` = (C, H, W)."""
    observer = Observer(module, stages)
    try:
        with evaluating(module):
            return [tuple(output.shape[2:]) for output in observer(blank_images(module, size)).stages]
    finally:
        observer.close()

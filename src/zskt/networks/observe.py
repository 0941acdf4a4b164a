"""Observation of any `nn.Module`: logits, stage outputs, BatchNorm statistics, FLOPs.

A stage is the part of a network that works at one resolution. Networks of `zskt.models` name theirs (`stages`);
otherwise it is the last child at each resolution.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from zskt.errors import ZsktError, failing, first_line, short
from zskt.networks import ranks

T = TypeVar("T")

Resolution = tuple[int, ...]  # (H, W) of a map


class ChannelStatistics(NamedTuple):
    """Statistics of a BatchNorm layer's input batch, and its running statistics; each (C,)."""

    mean: Tensor
    variance: Tensor
    running_mean: Tensor
    running_variance: Tensor


@dataclass
class Observation:
    """One forward: logits (N, K), outputs of the named stages and, on request, BatchNorm input statistics."""

    logits: Tensor
    stages: list[Tensor] = field(default_factory=list)
    statistics: list[ChannelStatistics] = field(default_factory=list)
    _derived: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Hashable, derive: Callable[[], T]) -> T:
        """What `derive` returns, cached: one observation of a teacher serves many student updates."""
        if key not in self._derived:
            self._derived[key] = derive()
        result: T = self._derived[key]
        return result


def at_least_float32(x: Tensor) -> Tensor:
    """`x`, converted to float32 if in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def logits_of(output: Any) -> Tensor:
    """The logits (N, K) in an output: itself, its `.logits` or `["logits"]`, or the first tensor of a tuple or list."""
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
    advice = "wrap the network"
    if isinstance(output, Mapping) and logits is None:
        found += f", with {short(', '.join(map(str, output)) or 'nothing')}"
        like = (key for key, value in output.items() if isinstance(value, Tensor) and value.ndim == 2)
        if (key := next(like, None)) is not None:
            advice += f" in a module whose forward returns its output[{short(repr(key))}], if that is the logits"
    raise ZsktError(f"expected a network that returns logits of shape (batch, classes), found {found}; {advice}")


def batchnorm_layers(module: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers with running statistics."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.running_mean is not None]


class _ChannelMoments(torch.autograd.Function):
    """By the kernel of BatchNorm's training mode, which reads half precision without a copy.

    On a CPU it is ten times as fast as `torch.var_mean`, which took a third of a generator update.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones(x.shape[1], device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        tiny = 1e-12  # some kernels return 0 for 1 / sqrt(0)
        _, mean, inverse = torch.native_batch_norm(x, one, torch.zeros_like(one), None, None, True, 0.0, tiny)
        ctx.save_for_backward(x, mean)
        return mean, inverse.pow(-2) - tiny

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """d mean / dx = 1 / M and d variance / dx = 2 (x - mean) / M, with M = N x ... values per channel."""
        x, mean = ctx.saved_tensors
        of_mean, of_variance = gradients
        per_channel = (1, -1, *[1] * (x.ndim - 2))
        slope = 2 * of_variance * x.shape[1] / x.numel()  # (C,)
        offset = of_mean * x.shape[1] / x.numel() - slope * mean  # (C,)
        return torch.addcmul(offset.to(x.dtype).view(per_channel), x, slope.to(x.dtype).view(per_channel))


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) over all but the second dimension of a batch (N, C, ...), in at least float32."""
    mean, variance = _ChannelMoments.apply(x)  # type: ignore[no-untyped-call]
    return mean, variance


def over_ranks(layers: Sequence[ChannelStatistics]) -> list[ChannelStatistics]:
    """Statistics of the whole batch, from those of this rank's share, in one message for all layers."""
    if ranks.size() == 1 or not layers:
        return list(layers)
    channels = [len(layer.mean) for layer in layers]
    mean, variance = ranks.moments(
        torch.cat([layer.mean for layer in layers]), torch.cat([layer.variance for layer in layers])
    )  # (all C,) each
    both = zip(layers, torch.split(mean, channels), torch.split(variance, channels), strict=True)
    return [layer._replace(mean=m, variance=v) for layer, m, v in both]


class Observer:
    """Calls a network and records stage outputs and BatchNorm input statistics by hooks, until closed.

    Statistics are recorded only with gradients enabled: their only use is a prior on generated images.
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
            mean, variance = channel_moments(inputs[0])
            self._statistics.append(ChannelStatistics(mean, variance, layer.running_mean, layer.running_var))

    def __call__(self, images: Tensor) -> Observation:
        """Observe one forward of `images` (N, C, H, W)."""
        self._outputs.clear()  # the network may have been called elsewhere since
        self._statistics.clear()
        try:
            logits = logits_of(self.module(images))
            for name, (output, version) in self._outputs.items():
                if output._version != version:
                    raise ZsktError(
                        f"the output of stage {name} is changed in place by a later layer (an in-place ReLU, say); "
                        "name the later layer as the stage or make it out of place"
                    )
            if unseen := [name for name in self._names if name not in self._outputs]:
                raise ZsktError(f"{unseen[0]} is not a stage, as the network does not call it; name another stage")
            stages = [self._outputs[name][0] for name in self._names]
            return Observation(logits, stages, over_ranks(self._statistics))
        finally:
            self._outputs.clear()
            self._statistics.clear()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the mode of each submodule is restored afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for child, training in modes:
            child.training = training


def blank_images(module: nn.Module, size: tuple[int, ...]) -> Tensor:
    """Zeros (2, *size) on the module's device and in its dtype; BatchNorm may reject a batch of one."""
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    return torch.zeros(2, *size, dtype=like.dtype, device=like.device)


_BATCHES = (1, 4, 8, 16, 32, 64)  # tried if a batch of two is rejected: the network may have a fixed batch size


def refusal(module: nn.Module, images: Tensor, error: BaseException) -> ZsktError:
    """The error for images (2, C, H, W) that a network rejects: fixed batch size, integer images or another size."""
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
        return ZsktError(
            "the network takes integer images, which have no gradient; make it accept floating-point images"
        )
    return ZsktError(
        f"the network does not accept images of {' x '.join(map(str, size))} ({first_line(error)}); check input_size"
    )


def answer(module: nn.Module, images: Tensor) -> Tensor:
    """Logits (2, K) of images (2, C, H, W); raises ZsktError saying why the network rejects them."""
    try:
        return logits_of(module(images))
    except ZsktError:
        raise
    except (Exception, SystemExit) as error:  # a foreign module may raise anything for a shape
        raise refusal(module, images.detach(), error) from error


def fixed_batch(count: int, error: BaseException) -> ZsktError:
    """The error for a network with a fixed batch size."""
    return ZsktError(
        f"the network takes batches of exactly {count} ({first_line(error)}); export it with a dynamic batch, as in "
        "torch.export.export(..., dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))"
    )


def check_state(module: nn.Module, who: str) -> None:
    """Raise ZsktError unless the state of the network `who` consists of dense tensors with values."""
    with failing(f"state_dict of the {who} fails", "fix it"):
        state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            found = f"a {type(value).__name__}, which no weights file can hold; store a tensor"
        elif is_lazy(value):
            found = "one without a shape; run the network on an image first"
        elif value.is_meta:
            found = "one on the meta device, without values; load its weights"
        elif value.layout is not torch.strided:
            found = f"one of layout {value.layout}; make it dense"
        else:
            continue
        raise ZsktError(f"expected an ordinary tensor in {short(name)} of the {who}, found {found}")


def layout(module: nn.Module, size: tuple[int, ...]) -> torch.memory_format:
    """The memory format for images of `size` (C, H, W): channels_last, faster on a CPU, if the network accepts it."""
    blank = blank_images(module, size).contiguous(memory_format=torch.channels_last)
    try:
        with evaluating(module):
            module(blank)
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def memory_format(module: nn.Module, size: tuple[int, ...]) -> torch.memory_format:
    """The memory format for a network's weights, given images of `size` = (C, H, W): channels_last if it works."""
    try:
        twin = copy.deepcopy(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    except RuntimeError:  # a tensor with five dimensions
        return torch.contiguous_format
    return layout(twin, size)


def forward_flops(module: nn.Module, size: tuple[int, ...]) -> int:
    """FLOPs (two per multiply-accumulate) of one forward of one input of `size`: convolutions and products."""
    with evaluating(module), FlopCounterMode(display=False) as counter:
        module(blank_images(module, size))
    return int(counter.get_total_flops()) // 2


class _Call(NamedTuple):
    """A module's forward on maps: (H, W) of input and output, the output, and the output's version."""

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

    def watch(name: str, child: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal tokens
        x = inputs[0] if inputs else None
        tokens |= isinstance(output, Tensor) and output.ndim == 3
        if isinstance(x, Tensor) and isinstance(output, Tensor) and x.ndim == output.ndim == 4:
            calls.pop(name, None)  # a module called twice counts where it was called last
            calls[name] = _Call(tuple(x.shape[2:]), tuple(output.shape[2:]), output, output._version)

    with contextlib.ExitStack() as hooks, evaluating(module):
        for name, child in module.named_modules():
            # TorchScript modules reject hooks, and call their children without them.
            if name and not isinstance(child, torch.jit.ScriptModule):
                hooks.enter_context(child.register_forward_hook(functools.partial(watch, name)))
        module(blank_images(module, size))
    if tokens:  # a transformer: its only map, the patch embedding, is not a stage
        return ()

    # Children of a container that is never called, such as a ModuleList, belong to the next module up.
    children: dict[str, list[str]] = {name: [] for name in ("", *calls)}
    for name in calls:
        above = name.split(".")[:-1]
        while ".".join(above) not in children:
            above.pop()
        children[".".join(above)].append(name)

    def visit(parent: str) -> Iterator[str]:
        for name in children[parent]:
            # A block that halves the resolution once also contains layers at its input resolution: only a child with
            # several others contains several stages.
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
    with contextlib.closing(Observer(module, stages)) as observer, evaluating(module):
        return [tuple(output.shape[2:]) for output in observer(blank_images(module, size)).stages]

"""Networks that come as a recorded graph: torch.export's `.pt2` and TorchScript's `.pt`.

They have parameters, but no mode to switch and nothing inside for hooks to watch, so they have no stages. The BatchNorm
operations of an exported graph are turned back into layers, whose statistics a prior can use.
"""

import contextlib
import copy
import io
import logging
import operator
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from zskt.errors import UsageError, ZsktError, first_line
from zskt.networks.archives import vetted

_NORM = torch.ops.aten.batch_norm.default
_UNCHECKED_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default
"""what decomposition makes of it: reads beyond tensors that are too short"""
_LAYERS: dict[int, type[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}
_EXPORT_AGAIN = (
    "export it with a dynamic batch, as in torch.export.export(model.eval(), (images,), "
    "dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))"
)


class Graph(nn.Module):
    """A recorded network: its graph is called as it is, in no mode, and it has no stages."""

    stages: tuple[str, ...] = ()

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        for parameter in graph.parameters():
            parameter.requires_grad_(False)
        self.graph = graph
        self.training = False

    def forward(self, images: Tensor) -> Any:
        """Whatever the graph returns for images (N, C, H, W)."""
        return nn.Module.__call__(self.graph, images)  # its own prints tracebacks when it fails

    def train(self, mode: bool = True) -> Self:
        """Does nothing: a loaded `.pt2` raises on it, and what is recorded has no modes."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Graph":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, about its own way to copy a graph
            memo[id(self)] = twin = Graph(copy.deepcopy(self.graph, memo))
        return twin


@dataclass(frozen=True)
class Recording:
    """A recorded network, the image size (C, H, W) where the file says it, and in one line what is lost."""

    network: Graph
    input_size: tuple[int, int, int] | None
    lost: str


def read_exported(path: Path, trust: bool = False) -> Recording:
    """The network in a `.pt2` file of torch.export.save.

    Without `trust` only what cannot run code is loaded (`archives.vetted`). Raises ZsktError for anything else, for
    programs of fixed batch size, of integer or several inputs, and those recorded in training mode.
    """
    source = path if trust else vetted(path)
    try:
        with _silent():
            program = torch.export.load(source)
            graph = program.module()
            assert isinstance(graph, fx.GraphModule)
            recovered, training = _recover_batchnorm(graph)
    except ZsktError as error:
        raise ZsktError(f"{path}: {error}") from error
    except Exception as error:  # a parser of foreign files
        raise ZsktError(f"{path} cannot be loaded ({_reason(error)}); export it again with this torch") from error
    inputs = [node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].ndim != 4:
        found = [tuple(map(str, value.shape)) if isinstance(value, Tensor) else value for value in inputs]
        raise ZsktError(
            f"{path}: expected one input of shape (N, C, H, W), found {found}; export a wrapper of that kind"
        )
    if not inputs[0].is_floating_point():
        raise ZsktError(
            f"{path} takes integer images ({inputs[0].dtype}), which no gradient reaches; export what comes after that"
        )
    sides: list[Any] = list(inputs[0].shape)  # symbols where they are dynamic
    batch, size = sides[0], sides[1:]
    if isinstance(batch, int):
        raise ZsktError(
            f"{path} takes batches of exactly {batch}, as it was exported without dynamic shapes; {_EXPORT_AGAIN}"
        )
    if training:
        raise ZsktError(f"{path} was exported in training mode ({training} does); {_EXPORT_AGAIN}")
    lost = "no attention transfer: hooks see nothing inside an exported graph"
    lost += f"; statistics of {recovered} BatchNorm layers read from it" if recovered else "; found no BatchNorm in it"
    fixed = all(isinstance(side, int) for side in size)
    return Recording(Graph(graph), (size[0], size[1], size[2]) if fixed else None, lost)


def read_torchscript(path: Path, trust: bool = False) -> Recording:
    """The network in a TorchScript file; raises UsageError without `trust`, because TorchScript is a program."""
    if not trust:
        raise UsageError(
            f"{path} is TorchScript, a program that runs when loaded; --trust loads it if you trust its maker"
        )
    try:
        with _silent():  # deprecated, and what many have
            script = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ZsktError(f"{path} cannot be loaded as TorchScript ({_reason(error)}); save it again") from error
    return Recording(
        Graph(script), None, "no attention transfer and no BatchNorm prior: hooks see nothing inside TorchScript"
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """torch prints, logs and warns about what it cannot load; the error says it in one line."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _reason(error: Exception) -> str:
    """The last line that says something: torch puts whole tracebacks into its messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return first_line(RuntimeError(lines[-1])) if lines else type(error).__name__


def _recover_batchnorm(graph: fx.GraphModule) -> tuple[int, str]:
    """Turn the graph's BatchNorm operations into layers; how many, and the first operation in training mode, if any."""
    count = 0
    for node in list(graph.graph.nodes):
        name = str(node.target)
        flag = {_NORM: 5, torch.ops.aten.dropout.default: 2}.get(node.target)
        if (flag is not None and _argument(node, flag)) or "_native_batch_norm_legit_functional" in name:
            return count, name
        if node.target is _UNCHECKED_NORM:
            node = _checked_norm(graph, node)
        if node.target is _NORM and _replace_norm(graph, node):
            count += 1
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return count, ""


def _argument(node: fx.Node, place: int) -> Any:
    """An argument of an operation, by its place in the schema, however it is given."""
    schema = node.target._schema.arguments[place]  # type: ignore[union-attr]
    return node.args[place] if place < len(node.args) else node.kwargs.get(schema.name, schema.default_value)


def _checked_norm(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The same BatchNorm as the one operation that looks at the sizes of its tensors."""
    arguments = [_argument(node, place) for place in range(7)]
    with graph.graph.inserting_before(node):
        call = graph.graph.call_function(_NORM, (*arguments[:5], False, *arguments[5:], False))
    call.meta = dict(node.meta)
    for user in list(node.users):  # it returns a tuple, whose first entry is the result
        if user.target is not operator.getitem or user.args[1] != 0:
            raise ZsktError("an operation uses what BatchNorm returns beside its result; export the network again")
        user.replace_all_uses_with(call)
        graph.graph.erase_node(user)
    graph.graph.erase_node(node)
    return call


def _replace_norm(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Put a BatchNorm layer in the place of one operation, if its tensors lie together under the usual names."""
    x, *tensors = (_argument(node, place) for place in range(5))
    names = ("weight", "bias", "running_mean", "running_var")
    given = {name: item for name, item in zip(names, tensors, strict=True) if item is not None}
    targets = {name: str(item.target) for name, item in given.items() if isinstance(item, fx.Node)}
    place = targets.get("running_mean", "").rpartition(".")[0]
    if not place or targets != {name: f"{place}.{name}" for name in given} or not isinstance(x, fx.Node):
        return False
    holder = graph.get_submodule(place)
    momentum, epsilon = _argument(node, 6), _argument(node, 7)
    dimensions = x.meta["val"].ndim if isinstance(x.meta.get("val"), Tensor) else 4
    affine = "weight" in given and "bias" in given
    if len(given) not in (2, 4) or (len(given) == 4) != affine or dimensions not in _LAYERS:
        return False
    if not isinstance(momentum, int | float) or not isinstance(epsilon, int | float):
        return False
    held = {name: tensor for name in given if isinstance(tensor := getattr(holder, name, None), Tensor)}
    if held.keys() != given.keys():
        return False
    layer = _LAYERS[dimensions](held["running_mean"].numel(), epsilon, momentum, affine=affine).eval()
    for name, tensor in held.items():
        setattr(layer, name, tensor)
    if isinstance(counter := getattr(holder, "num_batches_tracked", None), Tensor):
        layer.num_batches_tracked = counter
    graph.set_submodule(place, layer)
    with graph.graph.inserting_before(node):
        call = graph.graph.call_module(place, (x,))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    return True

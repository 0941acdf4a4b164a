"""Networks recorded as a graph: torch.export's `.pt2` and TorchScript's `.pt`.

Both are programs: reading one can run code that its maker put there, so `loading` requires `trust`. They have
parameters, but no training mode and no submodules for hooks, so they have no stages. The BatchNorm operations of an
exported graph are turned back into layers, whose statistics the prior can use.
"""

import copy
import json
import operator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from zskt.errors import ZsktError, failing, first_line
from zskt.files import strict_json
from zskt.networks.classifier import unit_normalisation
from zskt.networks.foreign import Found, quiet

_NORM = torch.ops.aten.batch_norm.default
_DECOMPOSED_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default
"""what `run_decompositions` makes of it; returns a tuple that begins with the result"""
_LAYERS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_EXPORT_AGAIN = (
    "export it with a dynamic batch, as in torch.export.export(model.eval(), (images,), "
    "dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))"
)


class Graph(nn.Module):
    """A recorded network, without training mode and stages."""

    stages: tuple[str, ...] = ()

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        for parameter in graph.parameters():
            parameter.requires_grad_(False)
        self.graph = graph
        self.training = False

    def forward(self, images: Tensor) -> Any:
        """Whatever the graph returns for images (N, C, H, W)."""
        return nn.Module.__call__(self.graph, images)  # the graph's own __call__ prints tracebacks

    def train(self, mode: bool = True) -> Self:
        """Does nothing: a recorded graph has no modes, and a loaded `.pt2` would raise."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Graph":
        with quiet():  # torch warns about its own way of copying a graph
            memo[id(self)] = twin = Graph(copy.deepcopy(self.graph, memo))
        return twin


def read_exported(path: Path) -> Found:
    """The network in a `.pt2` file, whose code runs; ZsktError unless it takes float images, any batch, in eval."""
    beside: dict[str, Any] = {"zskt.json": ""}
    try:
        with quiet():
            graph = torch.export.load(path, extra_files=beside).module()
            assert isinstance(graph, fx.GraphModule)
            recovered, training = _recover_batchnorm(graph)
    except Exception as error:  # a parser of foreign files
        raise ZsktError(f"cannot load {path} ({_reason(error)}); export it again with this version of torch") from error
    inputs = [node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"]
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or inputs[0].ndim != 4:
        found = [tuple(map(str, value.shape)) if isinstance(value, Tensor) else value for value in inputs]
        raise ZsktError(
            f"{path}: expected one input of shape (N, C, H, W), found {found}; export a wrapper that takes just images"
        )
    if not inputs[0].is_floating_point():
        raise ZsktError(
            f"{path} takes integer images ({inputs[0].dtype}), through which no gradient flows; export the part of the "
            "network after the conversion to floating point"
        )
    sides: list[Any] = list(inputs[0].shape)  # symbols where they are dynamic
    batch, size = sides[0], sides[1:]
    if isinstance(batch, int):
        raise ZsktError(f"{path} only takes batches of exactly {batch}; {_EXPORT_AGAIN}")
    if training:
        raise ZsktError(f"{path} was exported in training mode (it holds {training}); {_EXPORT_AGAIN}")
    lost = "no attention transfer: hooks do not work inside an exported graph"
    lost += f"; statistics of {recovered} BatchNorm layers read from it" if recovered else "; found no BatchNorm in it"
    fixed = all(isinstance(side, int) for side in size)
    network = Found(Graph(graph), "exported program", (size[0], size[1], size[2]) if fixed else None, lost=lost)
    if beside["zskt.json"]:
        _read_beside(network, beside["zskt.json"], path)
    return network


def _read_beside(found: Found, text: str, path: Path) -> None:
    """Complete what was found by the zskt.json that `zskt export` put into the file at `path`."""
    kinds = ValueError, TypeError, KeyError, AttributeError
    with failing(f"zskt.json in {path} is damaged", "export the network again", kinds=kinds):
        facts = strict_json(text)
        fed, names = facts["input"].partition(":")[0], [str(name) for name in json.loads(facts["class_names"])]
        mean, std = json.loads(facts["mean"]), json.loads(facts["std"])
        if fed == "fraction":  # the graph normalises
            mean, std = [0.0] * len(mean), [1.0] * len(std)
        found.mean, found.std, _ = unit_normalisation(mean, std, white=1, where=path)
    found.source = "zskt.json in it"
    found.class_names = None if names == [str(k) for k in range(len(names))] else names  # numbers stand for none


def read_torchscript(path: Path) -> Found:
    """The network in a TorchScript file; runs whatever code the file holds."""
    try:
        with quiet():  # deprecated, but widespread
            script = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except Exception as error:
        raise ZsktError(f"cannot load {path} as TorchScript ({_reason(error)}); save it again") from error
    lost = "no attention transfer and no BatchNorm prior: hooks do not work inside TorchScript"
    return Found(Graph(script), "TorchScript", lost=lost)


def _reason(error: Exception) -> str:
    """The last line with text: torch puts whole tracebacks into its messages."""
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
        if node.target in (_NORM, _DECOMPOSED_NORM) and _replace_norm(graph, node):
            count += 1
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return count, ""


def _argument(node: fx.Node, place: int) -> Any:
    """An argument of an operation, by its place in the schema, however it is given."""
    schema = node.target._schema.arguments[place]  # type: ignore[union-attr]
    return node.args[place] if place < len(node.args) else node.kwargs.get(schema.name, schema.default_value)


def _replace_norm(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Put a BatchNorm layer in the place of one operation, if its tensors lie together under the usual names."""
    x, *tensors = (_argument(node, place) for place in range(5))
    names = ("weight", "bias", "running_mean", "running_var")
    given = {name: str(item.target) for name, item in zip(names, tensors, strict=True) if item is not None}
    place = given.get("running_mean", "").rpartition(".")[0]
    results = [node] if node.target is _NORM else list(node.users)
    if (
        not place
        or given != {name: f"{place}.{name}" for name in given}
        or given.keys() not in (set(names), set(names[2:]))
        or (dimensions := x.meta["val"].ndim) not in _LAYERS
        or not all(user is node or (user.target is operator.getitem and user.args[1] == 0) for user in results)
    ):
        return False
    holder: Any = graph.get_submodule(place)
    first = 6 if node.target is _NORM else 5  # it has no flag for training
    momentum, epsilon = _argument(node, first), _argument(node, first + 1)
    layer = _LAYERS[dimensions](holder.running_mean.numel(), epsilon, momentum, affine="weight" in given).eval()
    for name in (*given, "num_batches_tracked"):
        if isinstance(tensor := getattr(holder, name, None), Tensor):
            setattr(layer, name, tensor)
    graph.set_submodule(place, layer)
    with graph.graph.inserting_before(node):
        call = graph.graph.call_module(place, (x,))
    call.meta = dict(x.meta)  # of the same shape
    for result in results:
        result.replace_all_uses_with(call)
    return True

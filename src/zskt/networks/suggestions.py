"""What a checkpoint may be, where it does not fit the model that was named: read off the shapes of its tensors."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from zskt.errors import ZsktError
from zskt.networks import models
from zskt.networks.models import Size

Shapes = Mapping[str, Sequence[int]]

COUNTER = "num_batches_tracked"  # of BatchNorm: may be absent, as torch before 0.4.1 did not save it
_SPECS = (
    *(f"wrn-{depth}-{width}" for depth in range(10, 53, 6) for width in (1, 2, 3, 4, 6, 8, 10)),
    *(f"resnet-{depth}-{width}" for depth in (18, 34) for width in (16, 32, 64)),
    *(f"convnet-{width}" for width in (8, 16, 32, 64)),
    *("vgg-11", "lenet-5", "lenet-5-half"),
)


def suggest(theirs: Shapes, spec: str, input_size: Size, num_classes: int) -> str:
    """The options that make the shapes of a file fit, as one clause, or "" if none was found.

    Tried: all tensors and those under each first component of their names (a teacher and a student saved together);
    the model that was named, then the usual ones, with the classes that were named or as many as a linear layer has.
    """
    parts = {"": theirs} | {key: part for key, part in parts_of(theirs).items() if 1 < len(part) < len(theirs)}
    for key, part in parts.items():
        found = _kinds(part)
        counts = [num_classes, *sorted({shape[0] for shape in part.values() if len(shape) == 2} - {num_classes})]
        for classes in counts:
            for other in (spec, *_SPECS):
                if _kinds(_shapes(other, classes, input_size)) == found:
                    return "its shapes are those of " + " ".join(_options(key, other, classes, spec, num_classes))
    return ""


def parts_of(theirs: Shapes) -> dict[str, Shapes]:
    """The tensors under each first component of the names, without that component."""
    parts: dict[str, dict[str, Sequence[int]]] = {}
    for name, shape in theirs.items():
        first, _, rest = name.partition(".")
        parts.setdefault(first, {})[rest] = shape
    return dict(parts)


def _options(key: str, model: str, classes: int, spec: str, num_classes: int) -> Iterator[str]:
    if key:
        yield f"--key {key}"
    if model != spec or not key:
        yield f"--model {model}"
    if classes != num_classes:
        yield f"--num-classes {classes}"


def _kinds(shapes: Shapes) -> Counter[tuple[str, tuple[int, ...]]]:
    """How many tensors there are of each last component and shape; names apart, all that two networks share."""
    leaves = ((name.rpartition(".")[2], tuple(shape)) for name, shape in shapes.items())
    return Counter(leaf for leaf in leaves if leaf[0] != COUNTER)


def _shapes(spec: str, num_classes: int, input_size: Size) -> Shapes:
    """Of a network of ours, which needs no memory for it; none if it cannot take such images or classes."""
    with contextlib.suppress(ZsktError), torch.device("meta"):
        return {name: tensor.shape for name, tensor in models.build(spec, num_classes, input_size).state_dict().items()}
    return {}

"""What a checkpoint may be, where it does not fit the model that was named: read off the shapes of its tensors."""

import contextlib
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from zskt.errors import ZsktError
from zskt.networks import models
from zskt.networks.models import Size
from zskt.networks.rebuild import unallocated

Shapes = Mapping[str, Sequence[int]]
Kinds = Counter[tuple[str, tuple[int, ...]]]
"""How many tensors there are of each last component and shape: names apart, all that two networks share."""

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
    the model that was named, then the usual ones, with as many classes as the last layer has.
    """
    parts = {"": theirs} | {key: part for key, part in parts_of(theirs).items() if 1 < len(part) < len(theirs)}
    for key, part in parts.items():
        found = _kinds_of(part)
        for other in (spec, *_SPECS):
            classes = _classes(found, _kinds(other, num_classes, input_size), num_classes)
            if classes is not None and (key, other, classes) != ("", spec, num_classes):
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


def _classes(theirs: Kinds, ours: Kinds, num_classes: int) -> int | None:
    """The number of classes with which our network has their shapes; None if there is none."""
    extra, missing = theirs - ours, ours - theirs
    if not extra and not missing:
        return num_classes
    rows = {shape[0] if shape else 0 for _, shape in extra}
    if len(rows) != 1:
        return None
    (classes,) = rows  # of the last layer, if it is that alone which differs
    relabelled: Kinds = Counter()
    for (leaf, shape), count in missing.items():
        if shape[:1] != (num_classes,):
            return None
        relabelled[leaf, (classes, *shape[1:])] += count
    return classes if relabelled == extra else None


def _kinds_of(shapes: Shapes) -> Kinds:
    leaves = ((name.rpartition(".")[2], tuple(shape)) for name, shape in shapes.items())
    return Counter(leaf for leaf in leaves if leaf[0] != COUNTER)


@functools.cache
def _kinds(spec: str, num_classes: int, input_size: Size) -> Kinds:
    """Of a network of ours; none if it cannot take such images or classes."""
    with contextlib.suppress(ZsktError), unallocated():
        return _kinds_of(
            {name: tensor.shape for name, tensor in models.build(spec, num_classes, input_size).state_dict().items()}
        )
    return Counter()

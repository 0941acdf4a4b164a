"""Is a student closer to its teacher than networks are that never saw it? Controls and bootstrap p-values.

A control is a network of the student's architecture that was trained independently, or not at all, compared with the
teacher in the same way as the student. M images.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from zskt.errors import ZsktError
from zskt.evaluate.measures import RESAMPLES
from zskt.networks.checks import as_teacher, bare
from zskt.networks.classifier import Classifier
from zskt.runtime import seeded


def p_value(student: Tensor, controls: Sequence[Tensor], *, paired: bool, seed: int = 0) -> float:
    """How often a control is as close to the teacher as the student is, or closer, when images are drawn anew.

    `student` (M,) and each control's values (M',) are per image, greater if closer. In each of 1,000 resamples one of
    the controls is drawn, and images with replacement: the same ones for both if `paired`, else those of each alone.
    The p-value is (1 + resamples in which the control's mean is not below the student's) / (1 + resamples), so that the
    smallest is 0.001. Few controls cannot show how much independent trainings differ. Source: the bootstrap of Efron
    and Tibshirani 1993, with the plus one of Davison and Hinkley 1997.
    """
    rng = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> Tensor:
        return torch.randint(count, (count,), generator=rng)  # (count,)

    as_close = 0
    for _ in range(RESAMPLES):
        control = controls[int(torch.randint(len(controls), (), generator=rng))]
        images = drawn(len(student))
        others = images if paired else drawn(len(control))
        as_close += bool(control[others].double().mean() >= student[images].double().mean())
    return (1 + as_close) / (1 + RESAMPLES)


def untrained(network: Classifier, seed: int = 0) -> Classifier:
    """A network of the same architecture with new random weights, as its layers' own constructors draw them.

    Raises ZsktError if it has weights that no layer knows how to initialise.
    """
    module = copy.deepcopy(bare(network.module))
    with seeded(seed):
        for name, layer in module.named_modules():
            reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
            if reset is not None:
                reset()
            elif own := [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]:
                raise ZsktError(
                    f"expected layers that can be initialised anew, found {name or 'the network itself'} "
                    f"({type(layer).__name__}) with {len(own)} tensors of its own; give control networks, not random"
                )
    return as_teacher(network.like(module))

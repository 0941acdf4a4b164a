"""Another BatchNorm prior in the step by hand: mean squares over channels in place of norms, the rest as in zskt-prior.

python examples/own_loss.py TEACHER    # a teacher's folder, as zskt teach and zskt import write it
"""

import sys

import torch
from torch import Tensor

import zskt


def mean_square_prior(beliefs: zskt.Beliefs) -> Tensor:
    """Sum over layers of mean_c (m - running mean)^2 + mean_c (v - running variance)^2, all (C,)."""
    layers = [
        (mean - running_mean).square().mean() + (variance - running_variance).square().mean()
        for mean, variance, running_mean, running_variance in beliefs.teacher.statistics
    ]
    return 10 * torch.stack(layers).sum()


def make(teacher: zskt.Classifier, student: torch.nn.Module, config: zskt.Config) -> zskt.Method:
    """The method of recipe zskt-prior, with this prior in place of its own."""
    method = zskt.belief_matching(teacher, student, config)
    method.generator_updates.loss = {**method.generator_updates.loss, "batchnorm": mean_square_prior}
    return method


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    teacher = zskt.load_teacher(sys.argv[1])
    student = zskt.make_student("auto:0.25", teacher)
    config = zskt.load_recipe("zskt-prior", {"steps": 200, "student.learning_rate": 5e-3})
    result = zskt.distill(teacher, student, config, method=make, out="runs/own-loss")
    print(result)

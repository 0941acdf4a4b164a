"""What the processes of one run have to have in common before it."""

import hashlib

import torch
from torch import nn

from zskt.errors import UsageError
from zskt.method.config import Config
from zskt.networks import ranks
from zskt.networks.classifier import Classifier
from zskt.networks.synchronised import synchronise
from zskt.runtime import versions
from zskt.settings import flat


def shapes(network: nn.Module) -> str:
    """A hash of the names, shapes and types of a network's tensors."""
    found = [(name, str(tensor.dtype), *tensor.shape) for name, tensor in network.state_dict().items()]
    return hashlib.sha256(repr(found).encode()).hexdigest()


def share(teacher: Classifier, student: nn.Module, config: Config, images: str) -> None:
    """Prepare the networks, in place, for a run of several ranks, which has to be the same on all of them.

    `images` is the fingerprint of the user's own.
    """
    if ranks.size() == 1:
        return
    ranks.check_device(config.machine.device)
    if config.machine.cuda_graph:
        raise UsageError("machine.cuda_graph is for one process; leave it out")
    ranks.check_divides(batch_size=config.batch_size)
    if config.method == "bank":
        ranks.check_divides(**{"bank.batch_size": config.bank.batch_size})
    chosen = {name: str(value) for name, value in flat(config).items()}
    device = next(student.parameters()).device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts = {**versions(), "device": kind, "teacher": teacher.fingerprint(), "student": shapes(student)}
    ranks.check_same({**facts, "images": images, **chosen})
    ranks.copy_from_main(student)
    synchronise(teacher.module, "teacher")
    synchronise(student, "student")

"""What the processes of one run have to have in common before it."""

from torch import nn

from zskt.errors import UsageError
from zskt.method.config import Config
from zskt.networks import ranks
from zskt.networks.classifier import Classifier
from zskt.networks.synchronised import synchronise
from zskt.runtime import versions
from zskt.settings import flat


def share(teacher: Classifier, student: nn.Module, config: Config, images: str) -> None:
    """Prepare the networks, in place, for a run of several ranks, which has to be the same on all of them.

    `images` is the fingerprint of the user's own.
    """
    if ranks.size() == 1:
        return
    if config.machine.cuda_graph:
        raise UsageError("machine.cuda_graph is for one process; leave it out")
    ranks.check_divides(batch_size=config.batch_size)
    if config.method == "bank":
        ranks.check_divides(**{"bank.batch_size": config.bank.batch_size})
    chosen = {name: str(value) for name, value in flat(config).items()}
    ranks.check_same({**versions(), "teacher": teacher.fingerprint(), "images": images, **chosen})
    ranks.copy_from_main(student)
    synchronise(teacher.module, "teacher")
    synchronise(student, "student")

"""Where else a run's numbers may go. A logger is a callback; those of other services are in docs/own-method.md."""

from pathlib import Path
from typing import Any

from zskt.files import expanded
from zskt.networks.foreign import optional
from zskt.run.lifecycle import Callback, Event

FOLDER = "tensorboard"


def to_tensorboard(out: str | Path) -> Callback:
    """A callback that writes every number of a run's log for TensorBoard, to the folder tensorboard in `out`.

    What a process that was killed had written after its last checkpoint is replaced on resume. Raises ZsktError where
    the tensorboard package is missing.
    """
    optional("tensorboard", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = None

    def callback(event: Event) -> None:
        nonlocal writer
        if event.line is None:
            return
        if writer is None:  # now that the folder is the run's
            writer = SummaryWriter(str(expanded(out) / FOLDER), purge_step=event.step)
        for name, value in event.numbers().items():
            writer.add_scalar(name, value, event.step)
        writer.flush()

    return callback

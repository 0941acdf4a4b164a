"""Third-party libraries: imported on demand, silenced, their failure to import as one line."""

import contextlib
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from zskt.errors import ZsktError, first_line
from zskt.networks.models import Size


@dataclass
class Found:
    """A network from outside, and what was found with it; `mean` and `std` are for pixels in [0, 1]."""

    module: nn.Module
    kind: str
    input_size: Size | None = None
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    source: str = ""
    class_names: Sequence[str] | None = None
    lost: str = ""
    others: bool = False  # the weights are not those that mean and std belong to


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the logs, warnings and prints of libraries: stdout is reserved for the result.

    stderr stays open, as a handler that a library creates meanwhile would keep using its replacement.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    transformers = sys.modules.get("transformers.utils.logging")
    bars = transformers is not None and transformers.is_progress_bar_enabled()
    if transformers is not None and bars:
        transformers.disable_progress_bar()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if transformers is not None and bars:
            transformers.enable_progress_bar()


def optional(package: str, extra: str) -> Any:
    """A package that one of our extras installs, imported now."""
    try:
        with quiet():
            return importlib.import_module(package)
    except Exception as error:  # a torchvision that does not fit torch raises RuntimeError
        raise ZsktError(
            f'this needs {package}, which cannot be imported ({first_line(error)}): pip install "zskt[{extra}]"'
        ) from error

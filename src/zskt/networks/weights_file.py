"""The one reader of foreign weight files."""

import argparse
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from zskt.errors import ZsktError, cannot, first_line
from zskt.files import read_tensors
from zskt.networks.archives import open_archive


def read_weights(path: Path) -> Any:
    """What a `.safetensors` or torch checkpoint file holds, without executing anything in it.

    Torch files go through weights-only loading, with `argparse.Namespace` (which many training scripts store beside
    the weights) allowed by name. Raises ZsktError for anything unreadable, truncated or unsafe.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        with path.open("rb") as file:
            zipped = zipfile.is_zipfile(file)
    except OSError as error:
        raise cannot("read", path, error) from error
    damaged = None
    if zipped:
        with open_archive(path) as archive:
            try:
                damaged = archive.testzip()
            except Exception as error:
                raise ZsktError(f"{path} is a damaged archive ({first_line(error)}); fetch or save it again") from error
    if damaged is not None:  # torch does not look at checksums
        raise ZsktError(f"{path} is damaged: the checksum of {damaged} is wrong; fetch or save it again")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickle protocols: what matters is whether it loads
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise ZsktError(
                f"{path} wants to run {wanted[1]} while loading, which is refused; save the plain state dict "
                "(safetensors or torch.save(model.state_dict(), ...)) and import that"
            ) from error
        raise ZsktError(f"{path} is not a plain torch checkpoint; fetch it again, or save the state dict") from error
    except Exception as error:  # damaged files fail in every way that a parser can
        raise ZsktError(
            f"{path} is truncated or not a weights file ({first_line(error)}); fetch or save it again"
        ) from error

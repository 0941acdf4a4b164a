"""Reads weight files without running code."""

import argparse
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from zskt.errors import ZsktError, first_line, system_errors
from zskt.files import read_tensors
from zskt.networks.archives import open_archive


def read_weights(path: Path) -> Any:
    """The content of a `.safetensors` file or torch checkpoint; no code in it is run.

    Torch files are loaded with `weights_only`; of other classes only `argparse.Namespace` is allowed, which many
    training scripts save with the weights. Raises ZsktError for anything unreadable, truncated or unsafe.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    with system_errors("read", path), path.open("rb") as file:
        zipped = zipfile.is_zipfile(file)
    damaged = None
    if zipped:
        with open_archive(path) as archive:
            try:
                damaged = archive.testzip()
            except Exception as error:
                raise ZsktError(f"{path} is a damaged archive ({first_line(error)}); fetch or save it again") from error
    if damaged is not None:  # torch does not verify checksums
        raise ZsktError(f"{path} is damaged: wrong checksum of {damaged}; fetch or save it again")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise ZsktError(
                f"{path} wants to run {wanted[1]} while loading, which is refused; save only the state dict, with "
                "safetensors or torch.save(model.state_dict(), ...), and import that"
            ) from error
        raise ZsktError(
            f"{path} is not a torch checkpoint of tensors; fetch it again, or save the state dict"
        ) from error
    except Exception as error:  # damaged files can raise anything
        raise ZsktError(
            f"{path} is truncated or not a weights file ({first_line(error)}); fetch or save it again"
        ) from error

"""BatchNorm over the batches of all ranks, for networks that are trained by several processes.

torch's own SyncBatchNorm refuses tensors on a CPU.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zskt.errors import ZsktError
from zskt.networks import ranks
from zskt.networks.observe import channel_moments


class _OverRanks(_BatchNorm):
    """Normalises a share (N / R, C, ...) by the moments of the whole batch."""

    def forward(self, input: Tensor) -> Tensor:
        if ranks.size() == 1 or not (self.training or self.running_mean is None):
            return super().forward(input)
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        mean, variance = ranks.moments(*channel_moments(input))  # (C,) each, of the whole batch
        if self.training and self.running_mean is not None:
            self._track(mean.detach(), variance.detach(), ranks.size() * input.numel() // input.shape[1])
        scale = (variance + self.eps).rsqrt()  # (C,)
        if self.weight is not None:
            scale = scale * self.weight
        offset = -mean * scale if self.bias is None else self.bias - mean * scale  # (C,)
        per_channel = (1, -1, *[1] * (input.ndim - 2))
        # Not in half precision, where both would be rounded before what they cancel.
        return torch.addcmul(offset.view(per_channel), input.to(scale.dtype), scale.view(per_channel)).to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics as torch does: the variance is that of a sample of `count` values."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((variance * (count / (count - 1))).to(self.running_var.dtype), momentum)


class _OverRanks1d(_OverRanks, nn.BatchNorm1d):
    pass


class _OverRanks2d(_OverRanks, nn.BatchNorm2d):
    pass


class _OverRanks3d(_OverRanks, nn.BatchNorm3d):
    pass


SYNCHRONISED: dict[type[Any], type[Any]] = {
    nn.BatchNorm1d: _OverRanks1d,
    nn.BatchNorm2d: _OverRanks2d,
    nn.BatchNorm3d: _OverRanks3d,
}


def synchronise(module: nn.Module, who: str) -> None:
    """Let the network's BatchNorm layers, in place, see the batches of all ranks; nothing in a single process.

    Parameters, buffers and hooks stay as they are: only the layers' class changes, as torch's parametrisations do.
    Raises ZsktError for a layer of another kind, whose statistics would be those of one rank's share.
    """
    if ranks.size() == 1:
        return
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, _OverRanks):
            if type(layer) not in SYNCHRONISED:
                raise ZsktError(
                    f"expected torch's BatchNorm in the {who}, found {type(layer).__name__} in {name or 'it'}, which "
                    "several processes cannot share; use torch's, or one process"
                )
            layer.__class__ = SYNCHRONISED[type(layer)]


def separate(module: nn.Module) -> None:
    """Undo `synchronise`."""
    before = {new: old for old, new in SYNCHRONISED.items()}
    for layer in module.modules():
        if isinstance(layer, _OverRanks):
            layer.__class__ = before[type(layer)]

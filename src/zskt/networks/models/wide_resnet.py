"""WideResNet-d-k with pre-activation blocks (Zagoruyko & Komodakis 2016), the ZSKT paper's networks."""

import torch.nn.functional as F
from torch import Tensor, nn

from zskt.errors import UsageError
from zskt.networks.models.common import check_width, initialise_convolutions


class _Block(nn.Module):
    """BN-ReLU-conv twice, plus the input; where the shape changes, a 1x1 convolution of the *activated* input.

    With `raw`, that convolution sees the input before BatchNorm and ReLU, as in some other implementations.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, raw: bool) -> None:
        super().__init__()
        self.raw = raw
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changes = inputs != outputs or stride != 1
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x), inplace=True)
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(activated)), inplace=True))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(x if self.raw else activated)
        return shortcut + residual


class _Stage(nn.Module):
    """Blocks at one resolution; the first one changes width and stride."""

    def __init__(self, blocks: int, inputs: int, outputs: int, stride: int, raw: bool) -> None:
        super().__init__()
        first = _Block(inputs, outputs, stride, raw)
        self.layer = nn.Sequential(first, *(_Block(outputs, outputs, 1, raw) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output


class WideResNet(nn.Module):
    """(N, C, H, W) -> (N, K): three stages of (depth - 4) / 6 blocks, 16k, 32k and 64k channels wide.

    k may be a multiple of 1/16, as in wrn-40-1.5: what pruning leaves of a wider one. At k = 1 the first block has no
    shortcut convolution, and at any other k it has one. `raw`: these convolutions see the raw input of their block; the
    tensors have the same names and shapes, so only images tell the two apart.
    """

    stages = ("block1", "block2", "block3")

    def __init__(
        self, depth: int, width: float, *, num_classes: int = 10, channels: int = 3, raw: bool = False
    ) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        self.spec = f"wrn-{depth}-{int(width) if width == int(width) else width}{'-raw' * raw}"
        base = int(16 * width)  # channels of the first stage
        check_width(self.spec, base)
        if base != 16 * width:
            raise UsageError(f"{self.spec}: expected a width that is a multiple of 1/16, found {width}")
        if rest or blocks < 1:
            raise UsageError(f"{self.spec}: expected a depth of 6 n + 4 (10, 16, 22, 28, 34, 40, ...), found {depth}")
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = _Stage(blocks, 16, base, 1, raw)
        self.block2 = _Stage(blocks, base, 2 * base, 2, raw)
        self.block3 = _Stage(blocks, 2 * base, 4 * base, 2, raw)
        self.bn1 = nn.BatchNorm2d(4 * base)
        self.fc = nn.Linear(4 * base, num_classes)
        initialise_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))  # (N, 64 k, H / 4, W / 4)
        x = F.relu(self.bn1(x), inplace=True)
        x = F.avg_pool2d(x, x.shape[2:]).flatten(1)  # (N, 64 k)
        logits: Tensor = self.fc(x)  # (N, K)
        return logits


wide_resnet = WideResNet

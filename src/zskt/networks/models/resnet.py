"""ResNet-18 and -34 for small images (He et al. 2016, 3x3 stem without pooling), with torchvision's attribute names."""

import torch.nn.functional as F
from torch import Tensor, nn

from zskt.errors import UsageError
from zskt.networks.models.common import WIDTH, check_width, initialise_convolutions


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, plus the input (through a 1x1 convolution where the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if inputs != outputs or stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        shortcut: Tensor = x if self.downsample is None else self.downsample(x)
        return F.relu(shortcut + residual, inplace=True)


class ResNet(nn.Module):
    """(N, C, H, W) -> (N, K): four stages of basic blocks, `width` (64) to 8 `width` channels wide."""

    stages = ("layer1", "layer2", "layer3", "layer4")

    def __init__(self, depth: int, width: int = WIDTH, *, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}.get(depth)
        if blocks is None:
            raise UsageError(f"resnet-{depth}: expected a depth of 18 or 34")
        self.spec = f"resnet-{depth}" if width == WIDTH else f"resnet-{depth}-{width}"
        check_width(self.spec, width)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(blocks[0], width, width, stride=1)
        self.layer2 = self._stage(blocks[1], width, 2 * width, stride=2)
        self.layer3 = self._stage(blocks[2], 2 * width, 4 * width, stride=2)
        self.layer4 = self._stage(blocks[3], 4 * width, 8 * width, stride=2)
        self.fc = nn.Linear(8 * width, num_classes)
        initialise_convolutions(self)

    @staticmethod
    def _stage(blocks: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
        first = _BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(_BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (N, width, H, W)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # (N, 8 width, H / 8, W / 8)
        logits: Tensor = self.fc(F.avg_pool2d(x, x.shape[2:]).flatten(1))  # (N, K)
        return logits


resnet = ResNet

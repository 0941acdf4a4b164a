"""A small BatchNorm network of two convolution stages, for 8x8 digits and for tests."""

import torch.nn.functional as F
from torch import Tensor, nn

from zskt.networks.models.common import check_width

GRID = 4  # side of the grid that the last stage is pooled to, as global pooling would lose positions


class ConvNet(nn.Module):
    """(N, C, H, W) -> (N, K): conv-BN-ReLU `width` wide, 2x2 max pooling, conv-BN-ReLU twice as wide, linear."""

    stages = ("stage1", "stage2")

    def __init__(self, width: int, *, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.spec = f"convnet-{width}"
        check_width(self.spec, width)
        self.stage1 = self._stage(channels, width)
        self.stage2 = self._stage(width, 2 * width)
        self.fc = nn.Linear(2 * width * GRID**2, num_classes)

    @staticmethod
    def _stage(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stage1(x), 2)  # (N, width, H / 2, W / 2)
        x = F.adaptive_avg_pool2d(self.stage2(x), GRID)  # (N, 2 width, 4, 4)
        logits: Tensor = self.fc(x.flatten(1))  # (N, K)
        return logits


convnet = ConvNet

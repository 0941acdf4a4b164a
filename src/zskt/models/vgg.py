"""VGG-11 with BatchNorm for small images (Simonyan & Zisserman 2015; one linear layer after global pooling)."""

import torch
from torch import Tensor, nn

from zskt.files import UsageError


class VGG(nn.Module):
    """(N, C, H, W) -> (N, K): eight 3x3 convolutions with BatchNorm in five stages, 64 to 512 channels wide."""

    stages = ("stage1", "stage2", "stage3", "stage4", "stage5")
    spec = "vgg-11"

    def __init__(self, *, num_classes: int = 10, input_size: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = input_size
        if min(height, width) < 16:
            size = f"{channels} x {height} x {width}"
            raise UsageError(f"{self.spec} needs images of at least 16 x 16, found {size}: choose another model")
        self.stage1 = self._stage(channels, 64)
        self.stage2 = self._stage(64, 128)
        self.stage3 = self._stage(128, 256, 256)
        self.stage4 = self._stage(256, 512, 512)
        self.stage5 = self._stage(512, 512, 512)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(512, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(inputs: int, *widths: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for outputs in widths:
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
            x = self.pool(stage(x))  # (N, 64 .. 512, H / 2 .. H / 16, W / 2 .. W / 16)
        x = torch.mean(self.stage5(x), dim=(2, 3))  # (N, 512)
        logits: Tensor = self.fc(x)  # (N, K)
        return logits


def vgg11(*, num_classes: int = 10, input_size: tuple[int, int, int] = (3, 32, 32)) -> VGG:
    """VGG-11 with BatchNorm for images of `input_size` = (C, H, W)."""
    return VGG(num_classes=num_classes, input_size=input_size)

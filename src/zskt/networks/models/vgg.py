"""VGG-11 with BatchNorm for small images (Simonyan & Zisserman 2015; one linear layer after global pooling)."""

import torch.nn.functional as F
from torch import Tensor, nn

from zskt.networks.models.common import WIDTH, Size, check_size, check_width, initialise_convolutions


class VGG(nn.Module):
    """(N, C, H, W) -> (N, K): eight 3x3 convolutions with BatchNorm in five stages, `width` (64) to 8 `width` wide."""

    stages = ("stage1", "stage2", "stage3", "stage4", "stage5")

    def __init__(self, width: int = WIDTH, *, num_classes: int = 10, input_size: Size = (3, 32, 32)) -> None:
        super().__init__()
        self.spec = "vgg-11" if width == WIDTH else f"vgg-11-{width}"
        check_width(self.spec, width)
        check_size(self.spec, input_size, 16)
        self.stage1 = self._stage(input_size[0], width)
        self.stage2 = self._stage(width, 2 * width)
        self.stage3 = self._stage(2 * width, 4 * width, 4 * width)
        self.stage4 = self._stage(4 * width, 8 * width, 8 * width)
        self.stage5 = self._stage(8 * width, 8 * width, 8 * width)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(8 * width, num_classes)
        initialise_convolutions(self)

    @staticmethod
    def _stage(inputs: int, *widths: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for outputs in widths:
            convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        for stage in (self.stage1, self.stage2, self.stage3, self.stage4):
            x = self.pool(stage(x))  # (N, width .. 8 width, H / 2 .. H / 16, W / 2 .. W / 16)
        x = self.stage5(x)
        x = F.avg_pool2d(x, x.shape[2:]).flatten(1)  # (N, 8 width)
        logits: Tensor = self.fc(x)  # (N, K)
        return logits


vgg11 = VGG

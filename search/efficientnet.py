"""EfficientNet-Lite0: EfficientNet-B0 without what integer arithmetic and small devices are slow at."""

from torch import Tensor, nn

# Of each stage: blocks, kernel, stride of the first block, expansion of the channels inside, channels that come out.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, FEATURES, IMAGENET = 32, 1280, 1000


class InvertedResidual(nn.Module):
    """A wide depthwise convolution between two narrow ends (Sandler 2018, arXiv 1801.04381), without attention."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _convolution(inputs, wide, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _convolution(wide, wide, kernel, stride, groups=wide)
        self.project = _convolution(wide, outputs, 1)[:-1]  # what comes out is not cut off below zero
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """`(n, inputs, h, w)` to `(n, outputs, h / stride, w / stride)`."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class EfficientNetLite0(nn.Module):
    """Tan 2019 (arXiv 1905.11946) as changed for the Lite family: ReLU6, no squeeze-and-excitation; 4.65 M parameters.

    Made for pictures whose sides are multiples of 32, in ImageNet's case 224 pixels and values `(rgb - 127) / 128`.
    """

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.stem = _convolution(channels, STEM, 3, 2)
        blocks, width = [], STEM
        for count, kernel, stride, expansion, outputs in STAGES:
            for i in range(count):
                blocks.append(InvertedResidual(width, outputs, kernel, stride if i == 0 else 1, expansion))
                width = outputs
        self.blocks = nn.Sequential(*blocks)
        self.features = _convolution(width, FEATURES, 1)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, channels, h, w)` to `(n, classes)`."""
        features: Tensor = self.features(self.blocks(self.stem(x)))
        return self.head(self.dropout(features.mean((2, 3))))  # type: ignore[no-any-return]


def efficientnet_lite0(classes: int, channels: int) -> nn.Module:
    """With random weights; where the data name no classes, for ImageNet's 1,000."""
    return EfficientNetLite0(classes or IMAGENET, channels)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """With its norm and ReLU6."""
    # The published weights were trained with what is added to even sides for a stride of 2 at the right and below.
    before = (kernel - stride) // 2
    after = kernel - stride - before
    padded = [nn.ZeroPad2d((before, after, before, after))] if before != after else []
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=0 if padded else before, groups=groups, bias=False)
    return nn.Sequential(*padded, convolution, nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01), nn.ReLU6())

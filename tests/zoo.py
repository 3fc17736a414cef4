"""Small nets named by graph shape, each adversarial in one way; every contract suite runs on all of them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses


def _conv(inputs: int, outputs: int, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class Plain(nn.Module):
    """A chain without any branch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = _conv(3, 16), _conv(16, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Adds to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = _conv(16, 16), _conv(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(self.a(x)))


class Residual(nn.Module):
    """Two layers are added, so their widths are tied; one shortcut has a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = _conv(3, 16), Block()
        self.down, self.shortcut, self.head = _conv(16, 32), nn.Conv2d(16, 32, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.block(x)
        x = F.relu(self.down(x) + self.shortcut(x))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Concat(nn.Module):
    """One consumer sees the channels of two producers behind each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = _conv(3, 16), _conv(3, 16), _conv(32, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3)))  # type: ignore[no-any-return]


class Depthwise(nn.Module):
    """A depthwise layer ties its width to its producer's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth, self.point = _conv(3, 16), _conv(16, 16, groups=16), _conv(16, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.point(self.depth(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """Two linear layers own one weight tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.flat, self.first, self.second = nn.Linear(3 * 12 * 12, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.flat(x.flatten(1)))
        return self.head(F.relu(self.second(F.relu(self.first(x)))))  # type: ignore[no-any-return]


class Reused(nn.Module):
    """One module is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = _conv(3, 16), _conv(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.twice(self.twice(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Heads are folded into the width: query, key and value cannot be cut freely."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(36, 32)
        self.query, self.key, self.value, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.norm, self.up, self.down, self.head = (
            nn.LayerNorm(32),
            nn.Linear(32, 64),
            nn.Linear(64, 32),
            nn.Linear(32, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).reshape(x.shape[0], 12, 36))
        n, t, width = x.shape
        q, k, v = (f(x).reshape(n, t, 4, width // 4).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width)
        x = self.norm(x + self.out(mixed))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))  # type: ignore[no-any-return]


class GroupedQuery(nn.Module):
    """Two query heads share one key/value head, and together they are wider than what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = 8, 4, 8
        self.query, self.key, self.value, self.out = (
            nn.Linear(32, 64),
            nn.Linear(32, 32),
            nn.Linear(32, 32),
            nn.Linear(64, 32),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        pairs = (n, self.num_key_value_heads, 2, t, self.head_dim)
        q = self.query(x).reshape(n, t, self.num_heads, self.head_dim).transpose(1, 2).reshape(pairs)
        k, v = (
            f(x).reshape(n, t, self.num_key_value_heads, 1, self.head_dim).permute(0, 2, 3, 1, 4)
            for f in (self.key, self.value)
        )
        mixed = (q @ k.transpose(-1, -2) * self.head_dim**-0.5).softmax(-1) @ v
        mixed = mixed.permute(0, 3, 1, 2, 4).reshape(n, t, self.num_heads * self.head_dim)
        return self.out(mixed)  # type: ignore[no-any-return]


class Heads(nn.Module):
    """An attention block that says how many heads it has, which a cut must say anew."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.norm = nn.Linear(36, 32), GroupedQuery(), nn.LayerNorm(32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).reshape(x.shape[0], 12, 36))
        x = self.norm(x + self.attention(x))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))  # type: ignore[no-any-return]


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "residual": Residual,
    "concat": Concat,
    "depthwise": Depthwise,
    "tied": Tied,
    "reused": Reused,
    "attention": Attention,
    "heads": Heads,
}
CLASSES = 5


def images(count: int = 2, seed: int = 0) -> Tensor:
    """Inputs `(count, 3, 12, 12)` that every net takes."""
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def build(name: str, seed: int = 0) -> nn.Module:
    """The net in eval mode, with batch-norm statistics that are not the trivial ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = NETS[name]().train()
        for _ in range(3):
            net(torch.randn(16, 3, 12, 12))
    return net.eval()

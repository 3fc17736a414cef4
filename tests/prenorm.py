"""Small transformers, most with norms in front as language models have them, in which some channels stand out."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

OUTLIERS = [3, 17]


class Transformer(nn.Module):
    """One block of attention and one of linear layers, each behind a norm; takes the pictures of the zoo."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second, self.last = nn.Linear(36, 64), *(nn.LayerNorm(64) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(64, 64) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(2).reshape(x.shape[0], 12, 36))
        n, t, width = x.shape
        y = self.first(x)
        q, k, v = (f(y).reshape(n, t, 4, width // 4).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width)
        x = x + self.out(mixed)
        x = x + self.down(F.gelu(self.up(self.second(x))))
        return self.head(self.last(x)).mean(1)  # type: ignore[no-any-return]


class PostNorm(nn.Module):
    """Attention and linear layers as in BERT: what a norm gives is read, and added to what is made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.second = nn.Linear(36, 64), nn.LayerNorm(64), nn.LayerNorm(64)
        self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))
        self.up, self.down, self.head = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.embed(x.reshape(x.shape[0], 12, 36)))
        x = self.second(x + F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x)))
        return self.head(x + self.down(F.gelu(self.up(x)))).mean(1)  # type: ignore[no-any-return]


class Gated(nn.Module):
    """A gate in the place of an activation, and a norm without a shift."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(36, 32), nn.RMSNorm(32)
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.embed(x.reshape(len(x), 12, 36))))
        return self.down(F.silu(self.gate(x)) * self.up(x)).mean(1)  # type: ignore[no-any-return]


def made(kind: Callable[[], nn.Module]) -> nn.Module:
    """The same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


def rough(size: float = 32.0) -> nn.Module:
    """A transformer some of whose normed channels are so much larger than the others; readers heed them less."""
    return _with_outliers(
        made(Transformer), {"first": ("query", "key", "value"), "second": ("up",), "last": ("head",)}, size
    )


def rough_sums(size: float = 32.0) -> nn.Module:
    """The same of one in which such channels are added to others too."""
    return _with_outliers(made(PostNorm), {"first": ("query", "key", "value"), "second": ("up", "head")}, size)


@torch.no_grad()
def _with_outliers(model: nn.Module, norms: Mapping[str, Sequence[str]], size: float) -> nn.Module:
    for norm, readers in norms.items():
        for parameter in model.get_submodule(norm).parameters():
            parameter[OUTLIERS] *= size
        for reader in readers:
            model.get_parameter(f"{reader}.weight")[:, OUTLIERS] /= size / 4
    return model

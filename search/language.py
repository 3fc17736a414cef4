"""Causal language models, which can go on behind words they have seen before, and what they are taught."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  the name all torch code uses

from search.workload import Task

UNHEARD = -1e4
"""Added to a score, it leaves a later word without weight; minus infinity has no range that a quantizer could take."""


class CausalLM(nn.Module):
    """Around a causal language model of the transformers library: logits of what comes next, behind every word."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, words: Tensor, *past: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Whole numbers `(n, t)` to logits `(n, t, vocabulary)`; behind a `past`, with what the past has become.

        A past of p words is what `empty_past` gives, with p places where that has none; it becomes one of p + t.
        """
        if not past:
            return self._logits(words, None, seen=0)
        cache = _Cache(past)
        logits = self._logits(words, cache, seen=past[0].shape[2])
        return (logits, *cache.present)

    def empty_past(self, count: int) -> tuple[Tensor, ...]:
        """Keys and values `(count, heads, 0, width)` of each attention in turn, as many as the model now has."""
        cache = _Cache(())
        with torch.no_grad():
            self._logits(torch.zeros((count, 1), dtype=torch.long), cache, seen=0)
        return tuple(x[:, :, :0] for x in cache.present)

    def _logits(self, words: Tensor, cache: "_Cache | None", seen: int) -> Tensor:
        places = torch.arange(seen + words.shape[1])
        own = places[seen:]
        # Made here, because the library's follows from the length of a cache that it knows.
        mask = UNHEARD * (places[None] > own[:, None]).to(torch.float32)
        logits: Tensor = self.body(
            input_ids=words,
            position_ids=own[None],
            attention_mask=mask[None, None].expand(words.shape[0], -1, -1, -1),
            past_key_values=cache,
            use_cache=False,
        ).logits
        return logits


class _Cache:
    """Stands where the library has its own: attentions are served in the order in which they ask.

    So it holds nothing for a block that was left out, and asks nothing of how many heads an attention has.
    """

    def __init__(self, past: tuple[Tensor, ...]) -> None:
        self._past: Iterator[Tensor] = iter(past)
        self.present: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, *_where: object) -> tuple[Tensor, Tensor]:
        """All keys and values `(n, heads, p + t, width)` that an attention is to look at."""
        before = [next(self._past, None) for _ in range(2)]
        now = [x if old is None else torch.cat([old, x], 2) for old, x in zip(before, (keys, values), strict=True)]
        self.present += now
        return now[0], now[1]


def language() -> Task:
    """Outputs are logits of the word behind each word, and targets the words themselves.

    Imitation is word by word (Hinton's divergence at each place).
    """
    return Task("language", next_word_loss)


def next_word_loss(logits: Tensor, words: Tensor) -> Tensor:
    """Mean cross entropy, in nats a word, of `(n, t, vocabulary)` against `(n, t)`: each word from those before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), words[:, 1:].flatten())

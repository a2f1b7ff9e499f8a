"""Text from a model: prefill, then a token at a time from the latent cache, or several by speculation."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3_kernels.model.attention import LatentCache
from dsv3_kernels.model.model import DeepSeekV3


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits.

    temperature: logits are divided by it; 0 takes the likeliest token. top_p: of the likeliest tokens the
    fewest whose probabilities reach it are kept.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"Sampling: temperature is {self.temperature}, expected a finite number from 0 up"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_p is {self.top_p}, expected above 0 and at most 1")

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits: [vocab]. Returns the probability of each token: float64 [vocab]."""
        if self.temperature == 0:
            return torch.zeros_like(logits, dtype=torch.float64).index_fill_(0, logits.argmax(), 1.0)
        p = (logits.double() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ranked, order = p.sort(descending=True, stable=True)
            reached_before = ranked.cumsum(0) - ranked >= self.top_p
            p = p.index_fill(0, order[reached_before], 0.0)
        return p / p.sum()


@dataclass
class Speculation:
    """How the drafts of the MTP module fared."""

    drafted: int = 0
    accepted: int = 0

    @property
    def acceptance(self) -> float:
        return self.accepted / self.drafted if self.drafted else 0.0


class Generator:
    """Continues one prompt; every token drawn from the model's own distribution, speculated or not."""

    def __init__(
        self, model: DeepSeekV3, sampling: Sampling | None = None, *, seed: int = 0, speculative: bool = False
    ) -> None:
        """speculative: the first MTP module drafts the token after the next, and the model checks both at
        once: the draft is accepted with probability min(1, p / q), else the token is drawn from what p has
        over q (arXiv 2211.17192), which leaves p as it was; at temperature 0 that is the greedy text.
        Raises ValueError for a speculative generator of a model without an MTP module.
        """
        if speculative and not len(model.mtp):
            raise ValueError("Generator: the model has no MTP module to speculate with; expected one or more")
        self.model, self.sampling, self.speculative = model, sampling or Sampling(), speculative
        self.random = torch.Generator().manual_seed(seed)
        self.speculation = Speculation()

    @torch.no_grad()
    def tokens(self, prompt: list[int], count: int) -> Iterator[int]:
        """Yields the `count` tokens after the prompt, each as soon as it is known.

        Raises ValueError for an empty prompt, a token outside the vocabulary, or more positions than the
        model has, before the first token.
        """
        self._check(prompt, count)
        if count == 0:
            return
        self.model.eval()
        # A draft that is checked and refused stands in the caches for a moment: one position more.
        capacity = min(len(prompt) + count + 1, self.model.config.max_position_embeddings)
        cache = self.model.new_cache(1, capacity)
        logits, state = self.model.decode(self._row(prompt), cache)
        token = self._draw(self.sampling.probabilities(logits[0, -1]))
        yield token
        if self.speculative:
            yield from self._speculate(prompt, token, state, cache, count - 1)
            return
        for _ in range(count - 1):
            logits, _ = self.model.decode(self._row([token]), cache)
            token = self._draw(self.sampling.probabilities(logits[0, -1]))
            yield token

    def _speculate(
        self, prompt: list[int], token: int, state: Tensor, cache: LatentCache, count: int
    ) -> Iterator[int]:
        """Invariant at each draft: the cache holds all tokens before `token`, the newest; `state` belongs to
        those of them that the MTP module has not seen, `after` to the token after each."""
        drafts = self.model.new_mtp_cache(1, cache.rows.shape[2])
        after = [*prompt[1:], token]
        while count > 0:
            q = self.sampling.probabilities(self.model.decode_mtp(self._row(after), state, drafts)[0, -1])
            draft = self._draw(q)
            room = count > 1 and cache.length + 2 <= cache.rows.shape[2]
            logits, state = self.model.decode(self._row([token, draft] if room else [token]), cache)
            p = self.sampling.probabilities(logits[0, 0])
            self.speculation.drafted += 1
            if self._uniform() * q[draft] < p[draft]:
                self.speculation.accepted += 1
                after = [draft]
                if room:
                    after.append(self._draw(self.sampling.probabilities(logits[0, 1])))
            else:
                after = [self._draw((p - q).clamp(min=0))]
            cache.length -= state.shape[1] - len(after)
            state = state[:, : len(after)]
            yield from after
            count -= len(after)
            token = after[-1]

    def _draw(self, weights: Tensor) -> int:
        return int(torch.multinomial(weights.cpu(), 1, generator=self.random))

    def _uniform(self) -> float:
        return float(torch.rand((), dtype=torch.float64, generator=self.random))

    def _row(self, tokens: list[int]) -> Tensor:
        return torch.tensor([tokens], device=self.model.embedding.weight.device)

    def _check(self, prompt: list[int], count: int) -> None:
        config = self.model.config
        if not prompt:
            raise ValueError("generate: the prompt is empty, expected at least one token")
        for token in prompt:
            if not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"generate: the prompt holds token {token}, expected 0 to vocab_size - 1 = "
                    f"{config.vocab_size - 1}"
                )
        if len(prompt) + count > config.max_position_embeddings:
            raise ValueError(
                f"generate: prompt and continuation have {len(prompt)} + {count} tokens, expected at most "
                f"max_position_embeddings = {config.max_position_embeddings} together"
            )

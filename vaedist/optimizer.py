"""One Adam for all players, a parameter group each."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from vaedist.config import bounded


@dataclass(frozen=True, kw_only=True)
class Config:
    """Kingma & Ba 2015; a player's own settings (the discriminator's lr and betas) go before these.

    Nobody's weights decay unless its group says so, decoupled then (AdamW, Loshchilov & Hutter 2019).
    """

    lr: float = bounded(1e-4, above=0)
    betas: tuple[float, float] = bounded((0.9, 0.999), at_least=0, below=1)
    eps: float = bounded(1e-8, above=0)

    def build(self, groups: Iterable[dict[str, Any]]) -> torch.optim.AdamW:
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=0, fused=True)

"""One Adam for all players, a parameter group each, and the average of the weights that it leaves."""

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


class Average:
    """Keeps an exponential moving average of all weights, from the first step on, as `ema` among their moments.

    Called after an optimiser's step; under ZeRO the optimiser's weights are this rank's share of the model's.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        new = torch.where(optimizer.state[weights[0]]["step"] <= 1, 1.0, 1 - self._decay)  # 1: it begins
        skipped = getattr(optimizer, "found_inf", None)  # of fp16 under DDP, known on the device only
        if skipped is not None:
            new = new * (1 - skipped.squeeze())
        for weight in weights:
            state = optimizer.state[weight]
            if "ema" not in state:
                state["ema"] = weight.detach().clone()
            state["ema"].lerp_(weight.detach(), new.to(weight.dtype))

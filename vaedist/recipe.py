"""What a run is: the components' own Configs, composed."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vaedist import checkpoint, data, evaluators, optimizer, tracker
from vaedist.backend import Precision
from vaedist.config import ConfigError, bounded, component

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@dataclass(frozen=True, kw_only=True)
class Train:
    """Batch sizes are those of all ranks together."""

    steps: int = bounded(1_000_000, at_least=1)
    batch: int = bounded(64, at_least=1)            # images of an optimiser step
    accumulate: int = bounded(1, at_least=1)        # micro-batches of an optimiser step
    precision: Precision = "fp32"

    def local(self, world_size: int) -> int:
        """Rows of a micro-batch on one rank. Raises ConfigError when the batch does not divide."""
        rows, rest = divmod(self.batch, self.accumulate * world_size)
        if rest or not rows:
            sizes = [n for n in range(1, self.batch + 1) if self.batch % (self.accumulate * n) == 0]
            fitting = f"processes in {{{', '.join(map(str, sizes))}}}" if sizes else "a train.accumulate that divides it"
            raise ConfigError(
                f"train.batch={self.batch} does not divide into train.accumulate={self.accumulate} micro-batches "
                f"on {world_size} processes: use {fitting}"
            )
        return rows


@dataclass(frozen=True, kw_only=True)
class Recipe:
    run: Path                   # the run directory; by default runs/ and the recipe's name with the overrides
    seed: int = 0
    data: data.Config = field(default_factory=data.Config)
    model: Any = component("vaedist.models", default="conv64")
    objective: Any = component("vaedist.objectives", default="vae")
    optimizer: optimizer.Config = field(default_factory=optimizer.Config)
    train: Train = field(default_factory=Train)
    evaluate: evaluators.Config = field(default_factory=evaluators.Config)
    checkpoint: checkpoint.Config = field(default_factory=checkpoint.Config)
    track: tracker.Config = field(default_factory=tracker.Config)


# What may change when a run is resumed: where things lie and how fast they go, never what is computed.
FREE_ON_RESUME = (
    "run", "data.shards", "data.store", "data.cache", "data.draw", "train.steps", "train.accumulate",
    "train.precision", "evaluate.", "checkpoint.", "track.",
)  # fmt: skip

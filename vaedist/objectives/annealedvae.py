"""The VAE with a controlled capacity (Burgess et al. 2018, section 5)."""

from dataclasses import dataclass

from torch import Tensor

from vaedist import objectives
from vaedist.config import bounded
from vaedist.gaussian import Posterior
from vaedist.models import VAE
from vaedist.noise import Noise
from vaedist.world import World


@dataclass(frozen=True, kw_only=True)
class Config(objectives.Config):
    """The paper's: the capacity rises linearly from its first to its second value."""

    gamma: float = bounded(1000.0, at_least=0)
    capacity: tuple[float, float] = bounded((0.5, 25.0), at_least=0)  # nats
    steps: int = bounded(100_000, at_least=1)

    def build(self, vae: VAE, world: World, images: int) -> "AnnealedVAE":
        return AnnealedVAE(self, vae, world, images)


class AnnealedVAE(objectives.Objective):
    """loss = recon + gamma * |kl - C(step)|, where kl is the mean over the whole batch"""

    couples_rows = True

    def __init__(self, config: Config, vae: VAE, world: World, images: int) -> None:
        super().__init__(config, vae, world, images)
        self.gamma, self.capacity, self.steps = config.gamma, config.capacity, config.steps

    def regularizer(self, q: Posterior, noise: Noise, step: Tensor) -> dict[str, Tensor]:
        first, last = self.capacity
        capacity = first + (last - first) * (step / self.steps).clamp(max=1)
        kl = self.world.mean(q.kl().sum(1).mean())
        return {"regularizer": self.gamma * (kl - capacity).abs(), "capacity": capacity}

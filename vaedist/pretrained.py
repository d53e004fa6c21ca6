"""An exported model without its trainer: `load("DST")` reads what `python -m vaedist.export RUN DST` wrote."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vaedist.config import ConfigError, available
from vaedist.likelihood import Likelihood
from vaedist.models import VAE
from vaedist.noise import Noise
from vaedist.objectives.qlae import Codebook
from vaedist.world import World

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT = "vaedist-pretrained-1"
NO_NOISE = Noise(0, torch.empty(0, dtype=torch.int64))  # evaluation draws none


class Pretrained(nn.Module):
    """A VAE for use: images in and out are [batch, C, H, W] with pixels in [0, 1], whatever it was trained on."""

    def __init__(self, vae: VAE, likelihood: Likelihood, codebook: Codebook | None = None) -> None:
        super().__init__()
        self.vae, self.likelihood, self.codebook = vae, likelihood, codebook
        self.eval().requires_grad_(False)  # dropout and batch normalisation as they are when nothing is learnt

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar of q(z | images), [batch, latent] each; images: uint8, or float in [0, 1].

        Of quantised latents mu is the code, and logvar, since it is a point, minus infinity.
        """
        low, high = self.vae.pixel_range
        unit = images if images.is_floating_point() else images.float() / 255
        mu, logvar = self.vae.encode(low + unit * (high - low), NO_NOISE)
        if self.codebook is None:
            return mu, logvar
        return self.codebook(mu), torch.full_like(logvar, -torch.inf)

    def decode(self, z: Tensor) -> Tensor:
        """The expected images of latents [batch, latent]."""
        low, high = self.vae.pixel_range
        return ((self.likelihood.mean(self.vae.decode(z, NO_NOISE)) - low) / (high - low)).clamp(0, 1)

    def prior(self, count: int) -> Tensor:
        """Draws from p(z), [count, latent], by torch's global generator."""
        if self.codebook is None:
            return torch.randn(count, self.vae.latent, device=next(self.parameters()).device)
        values = self.codebook.values  # [latent, values]
        return values.gather(1, torch.randint(values.shape[1], (values.shape[0], count), device=values.device)).T


def load(directory: str | Path) -> Pretrained:
    """The model in a directory, in evaluation mode on the CPU, float32. Raises ConfigError if it is not an export."""
    path = Path(directory)
    try:
        config = json.loads((path / CONFIG).read_bytes())
        if config["format"] != FORMAT:
            raise ConfigError(f"{path / CONFIG}: of format {str(config['format'])[:40]}, this program reads {FORMAT}")
        return build(config, load_file(path / WEIGHTS))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{path}: not an exported model ({type(error).__name__}: {error})") from error


def build(config: dict[str, Any], weights: dict[str, Tensor]) -> Pretrained:
    """The model of a configuration with these weights, which must be all that it has."""
    settings = dict(config["model"])
    name = settings.pop("name")
    if name not in available("vaedist.models"):
        raise ValueError(f"no model {str(name)[:40]!r} among {', '.join(available('vaedist.models'))}")
    vae = import_module(f"vaedist.models.{name}").Config(**settings).build(tuple(config["shape"]), World())
    likelihood = Likelihood(config["objective"]["likelihood"], config["objective"]["scale"])
    values = weights.get("codebook.values")
    model = Pretrained(vae, likelihood, None if values is None else Codebook(*values.shape))
    model.load_state_dict(weights)
    return model

"""The networks, one file per architecture: `Config.build(shape, world)` gives a `VAE`."""

from torch import Tensor, nn

from vaedist.config import ConfigError
from vaedist.layers import BatchNorm2d, Sequential, widen
from vaedist.noise import Noise


class VAE(nn.Module):
    """An encoder into a diagonal Gaussian posterior of `latent` dimensions, ending in a WideLinear, and a decoder.

    Images are [batch, C, H, W] with pixels in `pixel_range`. Rows are independent but for batch normalisation.
    """

    def __init__(
        self, encoder: Sequential, decoder: Sequential, *, latent: int, pixel_range: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.latent, self.pixel_range = encoder, decoder, latent, pixel_range

    def encode(self, images: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """mu and logvar of q(z | images), [batch, latent] each."""
        mu, logvar = self.encoder(images, noise).chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor, noise: Noise) -> Tensor:
        """What the likelihood reads, in the shape of the images: [batch, latent] -> [batch, C, H, W]."""
        return widen(self.decoder(z, noise))

    @property
    def couples_rows(self) -> bool:
        """Whether a row's output depends on the other rows of its micro-batch."""
        return any(isinstance(module, BatchNorm2d) for module in self.modules())


def require_size(model: str, size: int, shape: tuple[int, int, int]) -> None:
    """Raises ConfigError unless the images of `shape` (C, H, W) are `size` pixels square."""
    if shape[1:] != (size, size):
        raise ConfigError(
            f"model.name={model} reads {size}x{size} images, but data.size={shape[1]}: set data.size={size}"
        )

"""From stored bytes to what a model sees; runs on the device, because bytes are a quarter of the traffic of floats."""

import torch
from torch import Tensor

from vaedist.layers import channels_last


def to_float(images: Tensor, dtype: torch.dtype, pixel_range: tuple[float, float]) -> Tensor:
    """uint8 [..., C, H, W] to `dtype`, same shape: 0 becomes the low end of `pixel_range`, 255 its high end.

    In memory the channels come last, as the networks want them.
    """
    low, high = pixel_range
    return low + channels_last(images).to(dtype) * ((high - low) / 255)


def flip(images: Tensor, bits: Tensor) -> Tensor:
    """Mirrors left to right the images [..., 3, size, size] whose bit (bool [...]) is set."""
    return torch.where(bits[..., None, None, None], images.flip(-1), images)

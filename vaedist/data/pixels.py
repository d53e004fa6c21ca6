"""From stored bytes to what a model sees; runs on the device, because bytes are a quarter of the traffic of floats."""

import torch
from torch import Tensor


def to_float(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [...] to `dtype` in [0, 1], same shape."""
    return images.to(dtype) / 255


def flip(images: Tensor, bits: Tensor) -> Tensor:
    """Mirrors left to right the images [..., 3, size, size] whose bit (bool [...]) is set."""
    return torch.where(bits[..., None, None, None], images.flip(-1), images)

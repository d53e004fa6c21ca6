"""Encoder and decoder as programs that need neither their source nor this repository: torch.export and ONNX."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vaedist.config import ConfigError
from vaedist.pretrained import WEIGHTS, Pretrained

BOUND = 1e-4  # on the difference from the model, in units of its largest value where that is above 1
INPUTS, OUTPUTS = {"encoder": "images", "decoder": "z"}, {"encoder": ["mu", "logvar"], "decoder": ["images"]}


class Encoder(nn.Module):
    """images [batch, C, H, W], float32 in [0, 1] -> mu, logvar."""

    def __init__(self, model: Pretrained) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval()
        self.model.vae.decoder = nn.Identity()  # type: ignore[assignment]  # its weights belong to the other file

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.encode(images)


class Decoder(nn.Module):
    """z [batch, latent] -> images in [0, 1]."""

    def __init__(self, model: Pretrained) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval()
        self.model.vae.encoder = nn.Identity()  # type: ignore[assignment]
        self.model.codebook = None

    def forward(self, z: Tensor) -> tuple[Tensor]:
        return (self.model.decode(z),)


def write_programs(
    model: Pretrained, loaded: Pretrained, shape: Sequence[int], draft: Path, onnx: bool
) -> dict[str, float]:
    """encoder.pt2, decoder.pt2 and where wanted .onnx, for any number of images of `shape`.

    How far every file, WEIGHTS as they were `loaded` among them, is from the model; ConfigError if more than BOUND.
    """
    found = {WEIGHTS: 0.0}
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, *shape, generator=generator)
    latents = torch.randn(5, model.vae.latent, generator=generator)
    for kind, probe in ((Encoder, images), (Decoder, latents)):
        name, module = kind.__name__.lower(), kind(model)
        batch = {INPUTS[name]: {0: torch.export.Dim("batch")}}
        program = torch.export.export(module, (probe[:2],), dynamic_shapes=batch)
        torch.export.save(program, draft / f"{name}.pt2")
        again: dict[str, Any] = {WEIGHTS: kind(loaded)}
        again[f"{name}.pt2"] = torch.export.load(draft / f"{name}.pt2").module()
        if onnx:
            again[f"{name}.onnx"] = write_onnx(program, draft / f"{name}.onnx", INPUTS[name], OUTPUTS[name])
        for file, run in again.items():
            apart = max(distance(module(some), run(some)) for some in (probe, probe[:1]))
            if not apart <= BOUND:
                raise ConfigError(f"{file} differs from the model by {apart:.1e}, more than {BOUND:.0e}; not exported")
            found[file] = max(found.get(file, 0.0), apart)
    return found


def write_onnx(program: Any, path: Path, name: str, outputs: list[str]) -> Any:
    """Writes the program as ONNX; what runs the file, by onnxruntime."""
    import onnxruntime

    torch.onnx.export(
        program, (), path, input_names=[name], output_names=outputs, external_data=False, dynamo=True, verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda some: [torch.from_numpy(found) for found in session.run(outputs, {name: some.numpy()})]


def distance(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest absolute difference, divided by the largest value where that is above 1."""
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        apart = torch.where(a == b, 0, (a - b).abs())  # equal: also the minus infinity that logvar of a point is
        scale = a.masked_fill(a.isinf(), 0).abs().max().clamp_min(1)
        worst = max(worst, (apart / scale).nan_to_num(torch.inf, torch.inf).max().item())
    return worst

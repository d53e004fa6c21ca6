"""Tensors as the bytes of a safetensors file, piece by piece."""

import json
from collections.abc import Iterator

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
PIECE = 2**24  # bytes


def pieces(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """What a file of these tensors, contiguous and on the CPU, consists of: views of their memory behind a header.

    The library's own `save` copies everything, and while it does so no other thread of the process moves: of 500 MB,
    training would stand still for a second.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))  # the widest first: all lie aligned
    header, end = {}, 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in names:
        content = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        yield from (content[start : start + PIECE] for start in range(0, len(content), PIECE))

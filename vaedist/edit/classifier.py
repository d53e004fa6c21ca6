"""A small network that reads attributes off images: the judge of edits, as good as its own held-out accuracy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vaedist import attributes
from vaedist.evaluators import Subject
from vaedist.noise import fork

STEPS, BATCH = 1000, 64
WIDTHS = (16, 32, 64, 64)


Figures = dict[str, Any]  # for JSON


def train(subject: Subject) -> nn.Module:
    """Reads images in the model's pixel range, [n, C, H, W], gives a logit per attribute; trained on all labels.

    Images with and without an attribute weigh the same in total, so that 0.5 parts them evenly. Every rank trains the
    same network by itself, one thread of each, since the order of sums on the CPU depends on their number.
    """
    having = torch.from_numpy(attributes.labels(subject.data.manifest)).float()
    share = having.mean(0).clamp(1 / len(having), 1 - 1 / len(having))
    weight = having / (2 * share) + (1 - having) / (2 * (1 - share))
    device, order = subject.backend.device, subject.data.order(fork(0, "classifier"))
    network = _network(subject.data.train.shape, having.shape[1]).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
    with _one_thread():
        for step in range(STEPS):
            ids = order.take(np.arange(step * BATCH, (step + 1) * BATCH))
            images, _ = subject.images(ids, "train")
            rows = torch.from_numpy(ids)
            loss = F.binary_cross_entropy_with_logits(
                network(images.float()), having[rows].to(device), weight[rows].to(device)
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return network.eval().requires_grad_(False)


def skill(said: np.ndarray, having: np.ndarray, training: np.ndarray) -> Figures:
    """How well images are classified: what is said of one attribute, what is true, and the training labels, bool.

    balanced_accuracy: the mean over images with and without, None where one of these are missing. majority: the
    accuracy of who always says what is true of most training images.
    """
    right = said == having
    parts = [right[having == value] for value in (True, False)]
    balanced = float(np.mean([part.mean() for part in parts])) if all(map(len, parts)) else None
    majority = float((having == (training.mean() > 0.5)).mean())
    return {"accuracy": float(right.mean()), "balanced_accuracy": balanced, "majority": majority}


def _network(shape: tuple[int, int, int], attributes: int) -> nn.Module:
    """Of images of any size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(fork(0, "classifier"))
        layers: list[nn.Module] = []
        for before, after in zip((shape[0], *WIDTHS), WIDTHS, strict=False):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * WIDTHS[-1], attributes))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

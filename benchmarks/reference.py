"""FactorVAE as people ordinarily write it, from its paper (Kim & Mnih 2018): what everything here is compared with.

Eager PyTorch, an optimiser for each player, a DataLoader over image files, `.item()` of every term in every step. The
networks are those of the paper's appendix, the mathematics that of `vaedist.objectives`; nothing of vaedist is used, so
that it can also be read as the plain form of what is there. VAE and beta-TCVAE are written likewise.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

LATENT, WIDTH = 10, 1000
BETA, GAMMA = 6.0, 6.4
WORKERS = 2  # of each DataLoader
Pair = tuple[Tensor, Tensor]  # images [batch, 3, 64, 64] in [0, 1] for the VAE and for the discriminator


class VAE(nn.Module):
    """Appendix A, Table 2."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 32, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(64, 64, 4, 2, 1), nn.ReLU(),
            nn.Flatten(),
            nn.Linear(1024, 256), nn.ReLU(),
            nn.Linear(256, 2 * LATENT),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, 256), nn.ReLU(),
            nn.Linear(256, 1024), nn.ReLU(),
            nn.Unflatten(1, (64, 4, 4)),
            nn.ConvTranspose2d(64, 64, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(32, 3, 4, 2, 1),
        )  # fmt: skip

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=1)
        return mu, logvar, mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


def discriminator() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(LATENT, WIDTH), nn.LeakyReLU(0.2)]
    for _ in range(5):
        layers += [nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 2))


def permute_dims(z: Tensor) -> Tensor:
    """Algorithm 1."""
    return torch.stack([column[torch.randperm(len(z), device=z.device)] for column in z.unbind(1)], dim=1)


def total_correlation(z: Tensor, mu: Tensor, logvar: Tensor, images: int) -> Tensor:
    """By minibatch-weighted sampling (Chen et al. 2018, section 3.1)."""
    pairs = -0.5 * ((z[:, None] - mu).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi))
    weight = math.log(len(z) * images)
    joint = pairs.sum(2).logsumexp(1) - weight
    return (joint - (pairs.logsumexp(1) - weight).sum(1)).mean()


class Training:
    """One of `vae`, `factorvae`, `betatcvae`: its networks, its optimisers, and a step."""

    def __init__(self, objective: str, images: int, device: torch.device, bf16: bool = False) -> None:
        """images: how many the training set has. bf16: the forward passes under autocast."""
        self.objective, self.images, self.device, self.bf16 = objective, images, device, bf16
        self.vae, self.discriminator = VAE().to(device), discriminator().to(device)
        self.optimizer = torch.optim.Adam(self.vae.parameters(), lr=1e-4)
        self.adversary = torch.optim.Adam(self.discriminator.parameters(), lr=1e-5, betas=(0.5, 0.9))

    def step(self, pair: Pair) -> dict[str, Tensor]:
        """Moves the weights, and returns the terms."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            mu, logvar, z = self.vae.encode(pair[0])
            decoded = self.vae.decoder(z)
        mu, logvar, z, decoded = (each.to(pair[0].dtype) for each in (mu, logvar, z, decoded))
        recon = F.binary_cross_entropy_with_logits(decoded, pair[0], reduction="sum") / len(z)
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1).mean()
        terms, loss = {"recon": recon, "kl": kl}, recon + kl
        if self.objective == "betatcvae":
            terms["tc"] = total_correlation(z, mu, logvar, self.images)
            loss = loss + (BETA - 1) * terms["tc"]
        if self.objective == "factorvae":
            terms["tc"] = self.density_ratio(z)
            loss = loss + GAMMA * terms["tc"]
        self.optimizer.zero_grad()
        loss.backward()
        if self.objective == "factorvae":
            terms["discriminator"] = self.adversary_step(z.detach(), pair[1])
        self.optimizer.step()
        return {"loss": loss} | terms

    def density_ratio(self, z: Tensor) -> Tensor:
        """Equation 3; no gradient of it is computed for the discriminator."""
        self.discriminator.requires_grad_(False)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.discriminator(z).to(z.dtype)
        self.discriminator.requires_grad_(True)
        return (logits[:, 0] - logits[:, 1]).mean()

    def adversary_step(self, z: Tensor, others: Tensor) -> Tensor:
        """The discriminator's half of Algorithm 2, with the encoder as it is before the step."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            with torch.no_grad():
                permuted = permute_dims(self.vae.encode(others)[2])
            logits = [self.discriminator(each).to(z.dtype) for each in (z, permuted)]
        labels = [torch.full((len(z),), label, device=self.device) for label in (0, 1)]
        loss = 0.5 * (F.cross_entropy(logits[0], labels[0]) + F.cross_entropy(logits[1], labels[1]))
        self.adversary.zero_grad()
        loss.backward()
        self.adversary.step()
        return loss


class Files(Dataset[Tensor]):
    """Image files as torchvision reads them."""

    def __init__(self, paths: Sequence[Path], crop: int) -> None:
        self.paths = paths
        self.style = transforms.Compose([transforms.CenterCrop(crop), transforms.Resize(64), transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        image: Tensor = self.style(Image.open(self.paths[i]).convert("RGB"))
        return image


def load(files: Files, batch: int, device: torch.device) -> Iterator[Tensor]:
    """Batches of images without end."""
    sampler = RandomSampler(files, replacement=True, num_samples=2**62)  # a batch may be larger than the set
    cuda = device.type == "cuda"
    for images in DataLoader(files, batch, sampler=sampler, num_workers=WORKERS, pin_memory=cuda):
        yield images.to(device, non_blocking=cuda)


def steps(training: Training, files: Files, batch: int) -> Iterator[dict[str, float]]:
    """Steps without end, the terms of each as numbers."""
    images = load(files, batch, training.device)
    second = load(files, batch, training.device) if training.objective == "factorvae" else images
    while True:
        first = next(images)
        pair = (first, next(second) if second is not images else first)
        yield {name: term.item() for name, term in training.step(pair).items()}

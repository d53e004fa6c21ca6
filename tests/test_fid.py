"""FID and KID against their definitions, and the weights they need."""

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_quality import identity

from vaedist import evaluators
from vaedist.config import ConfigError
from vaedist.evaluators import fid
from vaedist.recipe import load


def by_definition(real: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """FID, and KID of all pairs, from the formulas in float64."""
    a, b = real.astype(np.float64), found.astype(np.float64)
    covariances = [np.einsum("ni,nj->ij", x - x.mean(0), x - x.mean(0)) / (len(x) - 1) for x in (a, b)]
    values, vectors = np.linalg.eigh(covariances[0])
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root).clip(0)).sum()  # of the product's square root
    frechet = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1]) - 2 * cross

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    n, m = len(a), len(b)
    within = [(kernel(x, x).sum() - kernel(x, x).trace()) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(frechet), float(sum(within) - 2 * kernel(a, b).sum() / (n * m))


def features(count: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_fid_and_kid_are_those_of_the_papers():
    real, found = features(90, 12, 0), 1.5 * features(90, 12, 1).cumsum(1) / 3 + 0.2
    assert fid.distances(real, found) == pytest.approx(by_definition(real.numpy(), found.numpy()), rel=1e-8)


def test_fid_of_gaussians_is_the_closed_form_and_of_equal_sets_zero():
    white = features(200, 6, 0)
    white = white - white.mean(0)
    white = torch.linalg.qr(white).Q * 199**0.5  # covariance 1, mean 0, exactly
    scales, shift = torch.linspace(0.5, 3, 6), torch.linspace(-1, 2, 6)
    found, _ = fid.distances(white, white * scales + shift)
    assert found == pytest.approx((shift.square().sum() + (1 - scales).square().sum()).item(), rel=1e-6)
    assert fid.distances(white, white)[0] == pytest.approx(0, abs=1e-6)


def test_kid_of_large_sets_is_a_mean_over_subsets_drawn_the_same_every_time(monkeypatch):
    monkeypatch.setattr(fid, "SUBSET", 100)
    real, found = features(300, 3, 0), features(300, 3, 1) + 0.5
    again, every_pair = fid.distances(real, found)[1], by_definition(real.numpy(), found.numpy())[1]
    assert fid.distances(real, found)[1] == again != every_pair
    assert again == pytest.approx(every_pair, rel=0.1)


def test_the_evaluator_compares_reconstructions_and_samples_with_the_held_out_images(monkeypatch, capsys):
    class Pooled(torch.nn.Module):
        """Eight by eight pixels at a time."""

        def forward(self, images):
            assert images.dtype == torch.uint8
            return (images.double().unfold(2, 8, 8).unfold(3, 8, 8).mean((4, 5)).flatten(1),)

    monkeypatch.setattr(fid, "extractor", lambda file: Pooled())
    subject = identity(blur=True, count=70)
    numbers = dict(fid.run(subject))
    assert capsys.readouterr().out == (
        "fid: 70 held-out images are fewer than 2,048: compare KID, FID is mostly bias\n"
    )
    ids = np.arange(70)
    held = subject.data.valid.gather(ids)
    latents = {
        "samples": subject.objective.prior(subject.noise(ids), torch.float64), "reconstructions": subject.codes().mean
    }  # fmt: skip
    for what, z in latents.items():
        decoded = ((subject.objective.vae.decode(z, None) + 1) * 127.5).round().to(torch.uint8)
        expected = by_definition(*(Pooled()(images)[0].numpy() for images in (held, decoded)))
        assert (numbers[f"fid_{what}"], numbers[f"kid_{what}"]) == pytest.approx(expected, rel=1e-6)


def test_a_run_without_the_weights_says_before_it_starts_which_file_belongs_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    kept = f"{tmp_path}/checkpoints"
    expected = f"fid needs the weights of Inception, and {kept}/{fid.FILE} is not there: download {fid.URL} (95 MB)"
    with pytest.raises(ConfigError, match=r"^[^\n]+$") as raised:
        evaluators.Config(names=("fid",)).require(None, 2)
    assert f"evaluate.names: {expected} into {kept}, or say" in str(raised.value)
    with pytest.raises(ConfigError, match=r"fid needs the weights of Inception, and nowhere\.pth is not there"):
        evaluators.Config(names=("fid",), inception=Path("nowhere.pth")).require(None, 2)
    with pytest.raises(ConfigError, match=r"inception=x\.pth is for the evaluator fid, which names does not have"):
        load(["recipe=vae", "evaluate.inception=x.pth"])


def test_a_file_of_weights_executes_nothing_and_must_be_of_this_network(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    path = tmp_path / "weights.pth"
    pickled = [pickle.dumps(content, protocol=2) for content in ({"fc.weight": 3}, [], Trap())]
    cases = {"no weights": [b"", b"PK\x03\x04 cut off", *pickled], "of another network": []}
    torch.save({"fc.weight": Trap()}, path)
    cases["no weights"].append(path.read_bytes())
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, path)  # torchvision's
    cases["of another network"].append(path.read_bytes())
    for reason, contents in cases.items():
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(ConfigError, match=f"evaluate.inception={path}: {reason}"):
                evaluators.Config(names=("fid",), inception=path).require(None, 2)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.slow
def test_the_network_is_torch_fidelitys_with_the_users_weights_and_without_a_network(tmp_path, monkeypatch):
    from torch_fidelity import feature_extractor_inceptionv3 as library

    assert library.URL_INCEPTION_V3 == fid.URL
    with monkeypatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        drawn = library.FeatureExtractorInceptionV3("drawn", ["2048"])
    for module in drawn.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    torch.save(drawn.state_dict(), path := tmp_path / "weights.pth")

    monkeypatch.setattr(library, "load_state_dict_from_url", None)
    subject = replace(identity(count=9), config=evaluators.Config(names=("fid",), inception=path))
    numbers = dict(fid.run(subject))
    ids = np.arange(9)
    held = drawn(subject.data.valid.gather(ids))[0]
    decoded = subject.objective.prior(subject.noise(ids), torch.float64).view(-1, 3, 32, 32)
    expected = by_definition(held.numpy(), drawn(((decoded + 1) * 127.5).to(torch.uint8))[0].numpy())
    assert held.std() > 0.01
    assert (numbers["fid_samples"], numbers["kid_samples"]) == pytest.approx(expected, rel=1e-3)
    assert numbers["fid_reconstructions"] == pytest.approx(0, abs=1e-6 * expected[0])

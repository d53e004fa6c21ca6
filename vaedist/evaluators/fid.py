"""FID and KID of reconstructions and of samples against the held-out images, by torch-fidelity.

FID (Heusel et al. 2017) is the Frechet distance of the Gaussians with the moments of Inception's 2,048 features. It is
biased upwards by some 1 / images: compare it among equal numbers of images, and hardly where they are fewer than 2,048,
whose covariance is singular. KID (Binkowski et al. 2018) is the unbiased squared MMD under a cubic kernel, of 2 images
or more: the mean over 100 pairs of subsets of 1,000, or of all images where there are no more.
"""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shards.manifest import Manifest
from vaedist.config import ConfigError
from vaedist.console import Console
from vaedist.data.order import Ids
from vaedist.evaluators import Config, Subject
from vaedist.evaluators._sets import Images, held_out, reconstructions, samples, together

FILE = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
FEATURES = 2048
AT_ONCE = 32  # images of 299 x 299 pixels in the network
SUBSETS, SUBSET = 100, 1000
# What reading anything but a file of weights raises.
NOT_WEIGHTS = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, AttributeError, LookupError)


def require(config: Config, manifest: Manifest, latents: int) -> None:
    """Raises ConfigError where the weights are not there."""
    weights(config.inception)


def weights(file: Path | None) -> dict[str, Tensor]:
    """Inception's weights from `file`, or from where torch-fidelity keeps its own; no code of a file is executed.

    Nothing is downloaded: nodes that compute often cannot, and all ranks would at once. Raises ConfigError.
    """
    kept = Path(torch.hub.get_dir()) / "checkpoints"
    path = (file or kept / FILE).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"evaluate.names: fid needs the weights of Inception, and {path} is not there: download {URL} (95 MB) into "
            f"{kept}, or say where it is: evaluate.inception=FILE"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        shape = tuple(found["fc.weight"].shape)
    except NOT_WEIGHTS as error:
        raise ConfigError(
            f"evaluate.inception={path}: no weights ({type(error).__name__}); download {URL} again"
        ) from None
    if shape != (1008, FEATURES):
        raise ConfigError(f"evaluate.inception={path}: of another network than FID is defined by; download {URL}")
    return found


def run(subject: Subject) -> Iterator[tuple[str, float]]:
    if subject.count < FEATURES:
        Console(main=subject.backend.main).say(
            f"fid: {subject.count:,} held-out images are fewer than {FEATURES:,}: compare KID, FID is mostly bias"
        )
    network = extractor(subject.config.inception).to(subject.backend.device)
    real, *found = (_features(subject, network, of) for of in (held_out, reconstructions, samples))
    mine = [distances(real, other) for other in found] if subject.backend.main else []  # takes a minute
    for name, (fid, kid) in zip(("reconstructions", "samples"), subject.world.everyone(mine)[0], strict=True):
        yield f"fid_{name}", fid
        yield f"kid_{name}", kid


def extractor(file: Path | None) -> Any:
    """torch-fidelity's Inception: uint8 [n, 3, H, W] -> a tuple of features [n, 2048]."""
    from torch_fidelity import FeatureExtractorInceptionV3  # takes seconds

    harmless = io.BytesIO()  # the library reads its file with pickle: it gets one that we wrote
    torch.save(weights(file), harmless)
    harmless.seek(0)
    return FeatureExtractorInceptionV3("inception", [str(FEATURES)], feature_extractor_weights_path=harmless)


def distances(real: Tensor, found: Tensor) -> tuple[float, float]:
    """FID and KID of two sets of features, [n, d] each, in float64."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    real, found = real.double().cpu(), found.double().cpu()
    moments = [fid_features_to_statistics(features) for features in (real, found)]
    fid = fid_statistics_to_metric(*moments, verbose=False)[KEY_METRIC_FID]
    size = min(SUBSET, len(real))
    subsets = SUBSETS if len(real) > size else 1
    kid = kid_features_to_metric(real, found, kid_subsets=subsets, kid_subset_size=size, rng_seed=0, verbose=False)
    return fid, kid[KEY_METRIC_KID_MEAN]


def _features(subject: Subject, network: Any, of: Images) -> Tensor:
    """The features of a set of images as 8 bits would hold them, grey ones three times: [images, 2048]."""

    def features(ids: Ids) -> tuple[Tensor]:
        images = (of(subject, ids) * 255).round().to(torch.uint8)
        found: tuple[Tensor] = network(images.expand(-1, 3, -1, -1))
        return found

    (rows,) = together(subject, subject.count, features, AT_ONCE)
    return rows

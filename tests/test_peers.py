"""Faults found in public implementations of these models: each fails here the check that this code passes.

The faults are written anew, in a few lines, from what those implementations do. Those in the estimates of q(z) are in
test_aggregate.py; what several processes must hold together is in test_world_size.py.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small import LATENT, ROWS, SHAPE, STEP, micro_batches, small, step
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vaedist import evaluators, optimizer
from vaedist.backend import Backend, Config
from vaedist.data.pixels import to_float
from vaedist.evaluators import Subject
from vaedist.gaussian import Posterior
from vaedist.gradients import Gradients
from vaedist.meters import over_micros
from vaedist.models import conv128
from vaedist.noise import Noise
from vaedist.objectives import Objective
from vaedist.objectives.factorvae import Discriminator
from vaedist.world import World

NOISE = Noise(7, torch.arange(ROWS))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def factorvae() -> Objective:
    return small("factorvae", discriminator=Discriminator(layers=2, width=20, lr=1e-5))


def our_terms(objective: Objective) -> dict[str, Tensor]:
    """Of one micro-batch."""
    ((images, noise),) = micros = micro_batches(objective.streams)
    with torch.no_grad():
        (surveyed,) = objective.survey(micros, STEP)
    return objective(images, noise, STEP, surveyed)


def peers_losses(objective: Objective) -> tuple[Tensor, Tensor]:
    """The VAE's loss and the discriminator's, which peers compute from one z, with gradient."""
    (images, _), noise = micro_batches(2)[0]
    q = objective.posterior(images, noise)
    logits = objective.discriminator(q.z)
    vae = objective.recon(q.z, images, noise) + q.kl().sum(1).mean() + 6.4 * (logits[:, 0] - logits[:, 1]).mean()
    permuted = torch.stack([column[torch.randperm(ROWS)] for column in q.z.detach().T], dim=1)
    label = torch.arange(2).repeat_interleave(ROWS)
    return vae, F.cross_entropy(objective.discriminator(torch.cat([q.z, permuted])), label)


def test_no_weight_moves_before_the_last_gradient_is_taken():
    """Else torch refuses the discriminator's backward through the encoder that the VAE's optimiser has just changed."""
    step(factorvae(), micro_batches(2))
    objective = factorvae()
    adam = torch.optim.Adam(objective.vae.parameters())
    vae, discriminator = peers_losses(objective)
    vae.backward(retain_graph=True)
    adam.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        discriminator.backward()


def test_the_discriminators_loss_does_not_help_itself_through_the_encoder():
    def leak(vae: Tensor, total: Tensor, weight: Tensor) -> float:
        own, found = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (vae, total))
        return ((found - own).norm() / own.norm()).item()

    objective = factorvae()
    found = our_terms(objective)
    vae = found["recon"] + found["kl"] + objective.gamma * found["tc"]
    assert leak(vae, found["loss"], objective.vae.encoder[0].weight) == 0
    vae, discriminator = peers_losses(objective)
    assert leak(vae, vae + discriminator, objective.vae.encoder[0].weight) > 1e-3


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class PeersModel(nn.Module):
    """A module whose forward gives both losses, as pythae's does."""

    def __init__(self) -> None:
        super().__init__()
        self.objective = factorvae()

    def forward(self) -> tuple[Tensor, Tensor]:
        return peers_losses(self.objective)


@pytest.mark.usefixtures("process_group")
def test_every_gradient_crosses_the_ranks(monkeypatch):
    """The reduction over ranks puts zeros in the place of a gradient here: what is not zero has not been reduced."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.zero_())

    def wrapped(module: nn.Module) -> DistributedDataParallel:
        def zeros(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            future = torch.futures.Future()
            future.set_result(torch.zeros_like(bucket.buffer()))
            return future

        model = DistributedDataParallel(module)
        model.register_comm_hook(None, zeros)
        return model

    def missed(module: nn.Module) -> set[str]:
        """The players with a gradient of this rank's own."""
        own = [name for name, parameter in module.named_parameters() if parameter.grad.abs().sum() > 0]
        return {name.removeprefix("module.").removeprefix("objective.").partition(".")[0] for name in own}

    ours = factorvae()
    gradients = Gradients(ours.parameters(), World(rank=0, size=2))
    our_terms(ours)["loss"].backward()
    assert missed(ours) == {"vae", "discriminator"}
    gradients.average()
    assert missed(ours) == set()

    twice = wrapped(PeersModel())  # two backward passes after one forward: the second stays at home
    vae, discriminator = twice()
    vae.backward(retain_graph=True)
    discriminator.backward()
    assert missed(twice) == {"vae", "discriminator"}

    around = wrapped(factorvae())  # the module called without its wrapper
    our_terms(around.module)["loss"].backward()
    assert missed(around) == {"vae", "discriminator"}


def test_latents_are_permuted_across_the_batch_and_not_within_a_sample():
    def samples_the_marginals(permuted: Tensor) -> bool:
        """Every dimension keeps its values, every row is broken up."""
        columns, rows = (torch.equal(permuted.sort(dim).values, z.sort(dim).values) for dim in (0, 1))
        return columns and not rows

    z = torch.randn(ROWS, LATENT, dtype=torch.float64)
    positions = torch.arange(ROWS)[None]
    assert samples_the_marginals(World().permute_dims(z[None], Noise(7, positions))[0])
    assert not samples_the_marginals(torch.stack([row[torch.randperm(LATENT)] for row in z]))


def test_the_discriminator_judges_a_row_by_itself():
    def judges_alone(network: nn.Module) -> bool:
        z = torch.randn(8, LATENT, dtype=torch.float64)
        return torch.allclose(network(z)[:3], network(z[:3]), rtol=1e-12)

    normalised = nn.Sequential(nn.Linear(LATENT, 20), nn.BatchNorm1d(20), nn.LeakyReLU(0.2), nn.Linear(20, 2)).double()
    assert judges_alone(factorvae().discriminator)
    assert not judges_alone(normalised)


def test_the_discriminator_has_the_learning_rate_and_the_momentum_of_its_paper():
    def settings(adam: torch.optim.Optimizer, parameter: Tensor) -> tuple[float, tuple[float, float]]:
        (group,) = (group for group in adam.param_groups if any(parameter is p for p in group["params"]))
        return group["lr"], group["betas"]

    objective = factorvae()
    weight = objective.discriminator[0].weight
    assert settings(optimizer.Config(lr=1e-4).build(objective.param_groups()), weight) == (1e-5, (0.5, 0.9))
    assert settings(torch.optim.Adam(objective.parameters(), lr=5e-3), weight) != (1e-5, (0.5, 0.9))


def test_no_pass_through_the_networks_is_wasted():
    def passes(objective: Objective, run) -> dict[str, int]:
        """Rows through encoder and decoder in a step."""
        seen = {"encoder": 0, "decoder": 0}

        def count(name: str):
            def hook(_, inputs) -> None:
                seen[name] += len(inputs[0])

            return hook

        for name in seen:
            getattr(objective.vae, name).register_forward_pre_hook(count(name))
        run(objective)
        return seen

    def theirs(objective: Objective) -> None:
        try:
            for images in micro_batches(2)[0][0]:
                objective.recon(objective.posterior(images, NOISE).z, images, NOISE)
            raise ValueError("this loss makes its own step")
        except ValueError:
            our_terms(objective)

    necessary = {"encoder": 2 * ROWS, "decoder": ROWS}
    assert passes(factorvae(), our_terms) == necessary
    assert passes(factorvae(), theirs) != necessary


def test_the_vae_learns_from_every_image_of_the_batch():
    def learned_from(loss) -> int:
        images = micro_batches(2)[0][0].requires_grad_()
        loss(images).backward()
        return int((images.grad[0].flatten(1).abs().sum(1) > 0).sum())

    objective = factorvae()
    surveyed = torch.randn(ROWS, LATENT, dtype=torch.float64)

    def half(images: Tensor) -> Tensor:
        """The other half of the same batch is the discriminator's."""
        first, noise = images[0, : ROWS // 2], Noise(7, torch.arange(ROWS // 2))
        return objective.recon(objective.posterior(first, noise).z, first, noise)

    assert learned_from(lambda images: objective(images, NOISE, STEP, surveyed)["loss"]) == ROWS
    assert learned_from(half) == ROWS // 2


def test_the_permuted_latents_are_those_of_an_independent_second_batch():
    def read(survey) -> list[int]:
        """The streams that the permuted latents depend on."""
        ((images, noise),) = micro_batches(2)
        before = survey(images, noise)
        changed = [torch.stack([image + 0.1 * (k == stream) for k, image in enumerate(images)]) for stream in range(2)]
        return [stream for stream in range(2) if not torch.equal(survey(changed[stream], noise), before)]

    objective, world = factorvae(), World()
    assert read(lambda images, noise: objective.survey([(images, noise)], STEP)[0]) == [1]

    def same_batch(images: Tensor, noise: Noise) -> Tensor:
        return world.permute_dims(objective.posterior(images[0], noise).z[None], Noise(7, noise.positions[None]))

    assert read(same_batch) == [0]


def test_adding_up_losses_keeps_no_graph():
    objective = small("vae")
    micros = [our_terms(objective) for _ in range(2)]
    assert over_micros(micros)["loss"].grad_fn is None
    assert sum(terms["loss"] for terms in micros).grad_fn is not None


def test_a_checkpoint_holds_every_player():
    def kept(module: nn.Module) -> tuple[int, int]:
        """Numbers among the weights and among Adam's first moments."""
        adam = torch.optim.Adam(module.parameters(), fused=True)
        adam.step()
        backend = Backend(Config())
        backend.prepare(module, adam, None)
        weights = backend.weights()
        moments = {key: value for key, value in backend.moments().items() if key.endswith("exp_avg")}
        return tuple(sum(tensor.numel() for tensor in part.values()) for part in (weights, moments))

    objective = factorvae()
    step(objective, micro_batches(2))
    everything = sum(parameter.numel() for parameter in objective.parameters())
    assert kept(objective) == (everything, everything)
    assert kept(objective.vae) != (everything, everything)


def identity_latents(kind: str) -> Posterior:
    """Posteriors whose means (i), or draws (ii), have the identity as their covariance, exactly.

    Variances differ between latents, and between rows.
    """
    centred = torch.randn(ROWS, LATENT, dtype=torch.float64)
    centred = centred - centred.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(centred.T)), centred.T, upper=False).T
    variance = torch.linspace(0.1, 0.5, LATENT, dtype=torch.float64)
    mu = (white if kind == "i" else white * (1 - variance).sqrt()) + torch.arange(LATENT)
    spread = torch.linspace(0.5, 1.5, ROWS, dtype=torch.float64)[:, None]
    return Posterior(mu, (spread * variance).log(), mu)


def covariance_over_latents(q: Posterior, kind: str) -> Tensor:
    centred = q.mu - q.mu.mean(1, keepdim=True)
    covariance = centred.T @ centred
    return covariance if kind == "i" else covariance + (2 * q.logvar).exp().mean()


def diagonal_of_the_batch(q: Posterior, kind: str) -> Tensor:
    covariance = torch.cov(q.mu.T)
    return covariance if kind == "i" else covariance + torch.diag(q.logvar.exp()).mean()


def penalty(covariance: Tensor) -> float:
    return (covariance - torch.eye(LATENT)).square().sum().item()


@pytest.mark.parametrize("kind", ["i", "ii"])
def test_dipvae_has_nothing_to_say_of_latents_whose_covariance_is_the_identity(kind):
    q = identity_latents(kind)
    found = small("dipvae", kind=kind).regularizer(q, NOISE, STEP)
    assert found["off_diagonal"] + found["diagonal"] < 1e-24
    assert penalty(covariance_over_latents(q, kind)) > 1
    if kind == "ii":
        assert penalty(diagonal_of_the_batch(q, kind)) > 0.01


def test_the_capacity_is_that_of_the_batch_and_not_of_each_image():
    mu = torch.linspace(-2, 2, ROWS, dtype=torch.float64)[:, None].expand(-1, LATENT)
    q = Posterior(mu, torch.zeros_like(mu), mu)
    each = q.kl().sum(1)
    capacity = each.mean().item()
    found = small("annealedvae", gamma=1.0, capacity=(capacity, capacity)).regularizer(q, NOISE, STEP)
    assert found["regularizer"] < 1e-12
    assert (each - capacity).abs().mean() > 1


def test_the_mmd_of_draws_from_the_prior_is_zero_on_average():
    """That of all pairs, each draw with itself among them, is not."""
    objective, rows = small("infovae"), 8

    def with_itself(z: Tensor, prior: Tensor) -> Tensor:
        def kernel(a: Tensor, b: Tensor) -> Tensor:
            return torch.exp(-(a[:, None] - b).square().sum(2) / (2 * LATENT)).mean()

        return kernel(z, z) + kernel(prior, prior) - 2 * kernel(z, prior)

    unbiased, biased = [], []
    for seed in range(300):
        noise = Noise(seed, torch.arange(rows))
        z = noise.normal("latent", LATENT, torch.float64)
        q = Posterior(z, torch.zeros_like(z), z)
        unbiased.append(objective.regularizer(q, noise, STEP)["mmd"])
        biased.append(with_itself(z, objective.prior(noise, torch.float64)))

    def errors(found: list[Tensor]) -> float:
        """The distance of the mean from zero, in its standard errors."""
        values = torch.stack(found)
        return (values.mean().abs() / (values.std() / len(values) ** 0.5)).item()

    assert errors(unbiased) < 3
    assert errors(biased) > 30


def held_out(objective: Objective, batch: int, count: int) -> Subject:
    images = torch.randint(256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = SimpleNamespace(valid=SimpleNamespace(count=count, gather=lambda ids: images[ids]))
    backend = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float64, autocast=nullcontext)
    return Subject(evaluators.Config(names=("elbo",), batch=batch), objective, data, World(), backend, step=0)


def test_an_image_costs_the_same_in_training_and_in_evaluation():
    objective = small("vae")
    subject = held_out(objective, batch=ROWS, count=ROWS)
    (ids,) = subject.share()
    images, noise = subject.images(ids)
    found = objective(images[None], noise, STEP, None)
    assert evaluators.run(subject)[0]["elbo"] == pytest.approx(-found["loss"].item(), rel=1e-12)

    def theirs(kl_weight: float) -> float:
        """The mean over pixels, and a weight of the KL that is another one in validation."""
        q = objective.posterior(images, noise)
        squares = F.mse_loss(objective.vae.decode(q.z, noise).sigmoid(), images)
        return (squares + kl_weight * q.kl().sum(1).mean()).item()

    assert theirs(1.0) != pytest.approx(theirs(2.5e-4), rel=0.5)


def test_every_held_out_batch_counts():
    objective = small("vae")
    subject = held_out(objective, batch=5, count=13)
    batches = [objective.posterior(*subject.images(ids)).kl().sum(1) for ids in subject.share()]
    every_image = torch.cat(batches).mean().item()

    def returning_inside_the_loop() -> float:
        for kl in batches:
            return (kl.mean() / len(batches)).item()
        return 0.0

    assert evaluators.run(subject)[0]["kl"] == pytest.approx(every_image, rel=1e-12)
    assert returning_inside_the_loop() != pytest.approx(every_image, rel=0.1)


def test_an_evaluation_that_fails_is_not_repeated_with_gradients():
    objective = small("vae")
    with_gradient = []

    def failing(*_: object) -> Posterior:
        with_gradient.append(torch.is_grad_enabled())
        raise RuntimeError("out of memory")

    def theirs() -> None:
        try:
            with torch.no_grad():
                failing()
        except RuntimeError:
            failing()

    objective.posterior = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluators.run(held_out(objective, batch=5, count=13))
    assert with_gradient == [False]
    with pytest.raises(RuntimeError, match="out of memory"):
        theirs()
    assert with_gradient == [False, False, True]


def test_pixels_have_the_range_of_the_decoder():
    def reached_by_tanh(pixels: Tensor) -> bool:
        return (pixels.min().item(), pixels.max().item()) == (-1, 1)

    vae = conv128.Config(hidden=8).build((3, 128, 128), World())
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1)
    assert isinstance(vae.decoder[-1], nn.Tanh)
    assert reached_by_tanh(to_float(black_and_white, torch.float64, vae.pixel_range))
    assert not reached_by_tanh(black_and_white / 255)

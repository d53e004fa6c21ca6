"""What the disentanglement metrics say of codes whose answer is known, and of any code what their definitions say."""

import threading
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import disentanglement_references as references
import numpy as np
import pytest
import torch

from shards.manifest import Factor as Named
from vaedist.config import ConfigError
from vaedist.evaluators import Config, _ground_truth, dci, infomec
from vaedist.evaluators._ground_truth import Factor, discretise, generator, ground_truth, known
from vaedist.evaluators.betavae_metric import PAIRS, betavae_metric, differences
from vaedist.evaluators.factorvae_metric import SHARING, draw, factorvae_metric
from vaedist.evaluators.irs import irs
from vaedist.evaluators.mig import mig
from vaedist.evaluators.modularity import explicitness, modularity
from vaedist.evaluators.sap import accuracies, correlations, sap
from vaedist.udr import lasso, udr
from vaedist.world import World

SIZES = (2, 3, 4)  # values of the factors
COUNT = 600  # images
VOTES = {"train": 600, "test": 300}


def values(sizes=SIZES, count=COUNT) -> np.ndarray:
    """Every combination equally often, in an order by chance."""
    combinations = np.indices(sizes).reshape(len(sizes), -1).T
    rows = np.resize(np.arange(len(combinations)), count)
    return combinations[np.random.default_rng(1).permutation(rows)].astype(np.float64)


def noise(latent: int, count: int = COUNT) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(count, latent))


def perfect(factors: np.ndarray) -> np.ndarray:
    """A latent for every factor, of unit variance, and two that are dead."""
    return np.column_stack([(factors - factors.mean(0)) / factors.std(0), np.zeros((len(factors), 2))])


def rotated(factors: np.ndarray) -> np.ndarray:
    """The same without the dead latents, turned by an orthogonal matrix without a zero."""
    latent = factors.shape[1]
    return perfect(factors)[:, :latent] @ np.linalg.qr(np.random.default_rng(3).normal(size=(latent, latent)))[0]


def blurred(factors: np.ndarray) -> np.ndarray:
    """An ordinary code: each latent knows most of one factor, and a little of another."""
    codes = rotated(factors) * 0.4 + perfect(factors)[:, : factors.shape[1]]
    return np.column_stack([codes, np.zeros(len(codes))]) + 0.5 * noise(factors.shape[1] + 1, len(codes))


def truth(code, factors=None, continuous=False):
    factors = values() if factors is None else factors
    codes = code(factors) if callable(code) else code
    return known(codes, factors.astype(np.float32), [continuous] * factors.shape[1])


def scores(found) -> dict[str, float]:
    """Every metric but DCI, of fewer votes."""
    train, test = found.split()
    nmi = infomec.normalised_information(found)
    return {
        "factorvae_metric": factorvae_metric(found, **VOTES),
        "betavae_metric": betavae_metric(found, **VOTES),
        "mig": mig(found),
        "modularity": modularity(found),
        "explicitness": explicitness(train, test),
        "sap": sap(train, test),
        "irs": irs(found),
        "infom": infomec.concentration(nmi),
        "infoc": infomec.concentration(nmi.T),
        "infoe": infomec.infoe(found),
    }


def with_dci(found) -> dict[str, float]:
    return scores(found) | {f"dci_{name}": value for name, value in dci.dci(*found.split()).items()}


@pytest.fixture(scope="module")
def of_perfect():
    return with_dci(truth(perfect))


@pytest.fixture(scope="module")
def of_noise():
    return with_dci(truth(noise(5)))


@pytest.fixture(scope="module")
def of_rotated():
    return with_dci(truth(rotated))


def test_a_perfect_code_is_perfect(of_perfect):
    exactly = ("factorvae_metric", "betavae_metric", "mig", "irs", "infom", "infoc")
    assert {name: of_perfect[name] for name in exactly} == pytest.approx(dict.fromkeys(exactly, 1.0), abs=1e-12)
    assert of_perfect["dci_informativeness"] == of_perfect["dci_informativeness_train"] == 1
    for name in ("dci_disentanglement", "dci_completeness", "infoe"):
        assert of_perfect[name] == pytest.approx(1, abs=2e-3), name


def test_a_dead_latent_counts_as_one_without_modularity(of_perfect):
    assert of_perfect["modularity"] == pytest.approx(3 / 5, abs=1e-3)
    assert modularity(truth(lambda factors: perfect(factors)[:, :3])) == pytest.approx(1, abs=1e-3)


def test_what_is_linear_needs_factors_that_are_linear():
    """One class against the others is not linear in a latent, where it has neighbours on both sides."""
    binary = truth(perfect, values((2, 2, 2)))
    train, test = binary.split()
    assert explicitness(train, test) == 1
    assert sap(train, test) == pytest.approx(0.5, abs=0.05)  # against the more frequent class
    continuous = truth(perfect, np.random.default_rng(4).uniform(size=(COUNT, 3)), continuous=True)
    assert sap(*continuous.split()) == pytest.approx(1, abs=0.01)
    assert infomec.infoe(continuous) == pytest.approx(1, abs=1e-12)


def test_a_factor_of_more_values_than_bins_is_known_as_far_as_the_bins_tell_it():
    factors = values((40, 40), 1600)
    assert mig(truth(perfect, factors)) == pytest.approx(np.log(20) / np.log(40), abs=1e-12)


def test_noise_is_at_chance(of_noise):
    """Of the latents' information what is estimated is above 0, by less the more images there are."""
    for name in ("factorvae_metric", "betavae_metric"):
        assert of_noise[name] == pytest.approx(1 / 3, abs=0.08), name
    assert of_noise["dci_informativeness"] == pytest.approx(np.mean(1 / np.array(SIZES)), abs=0.05)
    assert of_noise["explicitness"] == pytest.approx(0.5, abs=0.04)
    for name, limit in {"mig": 0.01, "sap": 0.06, "infoe": 0.01, "dci_disentanglement": 0.06}.items():
        assert 0 <= of_noise[name] < limit, name


def test_a_rotated_code_is_worse_in_all_but_what_is_linear(of_perfect, of_rotated):
    same = {"explicitness", "infoe", "dci_informativeness", "dci_informativeness_train"}
    for name in of_perfect.keys() - same - {"sap", "modularity"}:
        assert of_rotated[name] < of_perfect[name] - 0.05, name
    assert of_rotated["modularity"] < 0.9  # of latents none of which is dead
    assert of_rotated["sap"] < of_perfect["sap"]
    assert of_rotated["infoe"] == pytest.approx(of_perfect["infoe"], abs=5e-3)
    assert of_rotated["explicitness"] == pytest.approx(of_perfect["explicitness"], abs=0.02)


def test_the_order_sign_and_scale_of_latents_do_not_matter():
    codes = blurred(values())
    moved = truth(codes[:, [2, 0, 3, 1]] * [-1, 1, -1, 1])
    before, after = scores(truth(codes)), scores(moved)
    assert after == pytest.approx(before, abs=1e-3)
    exact = ("factorvae_metric", "mig", "modularity", "irs")
    assert [after[name] for name in exact] == pytest.approx([before[name] for name in exact], abs=1e-9)

    scaled = truth(codes * [1, 4, 2, 8])
    for metric in (lambda found: factorvae_metric(found, **VOTES), mig, modularity, lambda x: explicitness(*x.split())):
        assert metric(scaled) == pytest.approx(metric(truth(codes)), abs=1e-6)


def test_the_factorvae_metric_is_its_definition():
    found = truth(lambda factors: np.column_stack([np.zeros(COUNT), rotated(factors)]))
    rng = generator()
    votes = [list(zip(*draw(found, count, rng), strict=True)) for count in (300, 150)]
    expected = references.factorvae(found.codes, *votes)
    assert 0.4 < expected < 1
    assert factorvae_metric(found, train=300, test=150) == expected


def test_a_latent_that_hardly_varies_has_no_vote():
    """However still it is: it would win every vote, as all of the rest are noise."""
    still = np.column_stack([0.049 * perfect(values())[:, 2], noise(2)])
    assert factorvae_metric(truth(still), **VOTES) < 0.45
    assert factorvae_metric(truth(np.column_stack([0.051 * perfect(values())[:, 2], noise(2)])), **VOTES) > 0.5
    assert factorvae_metric(truth(0.01 * noise(3))) == 0


def test_a_code_of_dead_latents_knows_nothing():
    nothing = scores(truth(np.zeros((COUNT, 4))))
    for name in ("factorvae_metric", "mig", "modularity", "sap", "irs", "infom", "infoc"):
        assert nothing[name] == 0, name
    assert dci.concentration(np.zeros((4, 3))) == 0
    assert nothing["explicitness"] == 0.5
    assert nothing["infoe"] == pytest.approx(0, abs=1e-4)


def test_the_images_of_a_vote_share_the_factor_and_are_drawn_alike():
    found = truth(noise(3))
    factor, images = draw(found, 3000, generator())
    assert np.bincount(factor) / 3000 == pytest.approx(np.full(3, 1 / 3), abs=0.03)
    for k, together in zip(factor, images, strict=True):
        assert len(set(found.classes[together, k])) == 1
    assert images.shape == (3000, SHARING)
    assert np.bincount(images.ravel(), minlength=COUNT).min() > 200  # 320 expected


def test_points_are_mean_distances_of_pairs_of_two_images():
    found = truth(blurred)
    rng, again = generator(), generator()
    points, factor = differences(found, 40, rng)
    assert (again.integers(3, size=40) == factor).all()
    for k in range(3):
        same = Factor(found.classes[:, k])
        first = same.shared(again, ((factor == k).sum(), PAIRS))
        second = same.other(first, again)
        assert (first != second).all()
        assert (found.classes[first, k] == found.classes[second, k]).all()
        for point, left, right in zip(points[factor == k], first, second, strict=True):
            distances = [np.abs(found.codes[a] - found.codes[b]) for a, b in zip(left, right, strict=True)]
            assert point == pytest.approx(sum(distances) / PAIRS, abs=1e-12)


def test_every_other_image_of_the_class_is_equally_likely_and_one_alone_is_never_drawn():
    factor = Factor(np.array([0, 1, 2, 1, 1, 0, 1]))
    rng = generator()
    others = factor.other(np.full(3000, 3), rng)
    assert {image: (others == image).mean().round(1) for image in set(others.tolist())} == {1: 0.3, 4: 0.3, 6: 0.3}
    assert 2 not in factor.shared(rng, 1000)
    assert set(factor.alike(np.array([0]), rng, 100).ravel()) == {0, 5}


def test_information_and_what_is_made_of_it_are_their_definitions():
    found = truth(blurred)
    mi = _ground_truth.mutual_information(discretise(found.codes), found.classes)
    assert mi == pytest.approx(np.array(references.information(found.codes, found.classes)), abs=1e-9)
    assert mig(found) == pytest.approx(references.mig(found.codes, found.classes), abs=1e-9)
    assert modularity(found) == pytest.approx(references.modularity(found.codes, found.classes), abs=1e-9)
    assert irs(found) == pytest.approx(references.irs(found.codes, found.classes), abs=1e-9)
    nmi = infomec.normalised_information(found)
    assert infomec.concentration(nmi) == pytest.approx(references.share_of_largest(nmi.tolist()), abs=1e-9)
    assert infomec.concentration(nmi.T) == pytest.approx(references.share_of_largest(nmi.T.tolist()), abs=1e-9)


def test_dci_is_the_entropy_of_the_importances():
    importance = np.array([[0.7, 0.2, 0], [0.1, 0.1, 1.0], [0, 0, 0], [0.2, 0.7, 0.0]])
    rows = [row for row in importance.tolist() if any(row)]
    assert dci.concentration(importance) == pytest.approx(references.concentration(rows), abs=1e-12)
    assert dci.concentration(importance.T) == pytest.approx(references.concentration(importance.T.tolist()), abs=1e-12)
    assert dci.concentration(np.eye(4)) == 1
    few = truth(blurred, values((2, 3), 90))
    moved = replace(few, codes=few.codes[:, [2, 0, 1]] * [-1, 2, 0.5])
    # of splits that are equally good a tree takes any
    assert dci.dci(*moved.split()) == pytest.approx(dci.dci(*few.split()), abs=0.05)
    assert dci.concentration(np.ones((4, 4))) == pytest.approx(0, abs=1e-12)


def test_sap_is_the_gap_of_correlations_and_of_accuracies():
    found = truth(blurred)
    train, test = found.split()
    squares = [[np.corrcoef(z, y)[0, 1] ** 2 for z in train.codes.T[:3]] for y in train.values.T]
    assert [correlations(train, k)[:3].tolist() for k in range(3)] == [pytest.approx(row, abs=1e-9) for row in squares]
    gaps = [np.diff(np.sort(accuracies(train, test, k))[-2:]).item() for k in range(3)]
    assert sap(train, test) == pytest.approx(np.mean(gaps), abs=1e-12)
    # a linear machine of one latent is a threshold: no better than the best, and about as good
    thresholds = [np.mean((test.codes[:, 0] > t) == test.classes[:, 0]) for t in np.sort(test.codes[:, 0])]
    assert max(thresholds) - 0.05 < accuracies(train, test, 0)[0] <= max(thresholds)


def test_explicitness_is_how_often_a_class_is_scored_above_the_others():
    from sklearn.linear_model import LogisticRegression

    train, test = truth(blurred, values(count=450)).split()
    mean, deviation = train.codes.mean(0), train.codes.std(0)
    areas = []
    for k in range(3):
        model = LogisticRegression(max_iter=1000).fit((train.codes - mean) / deviation, train.classes[:, k])
        told = model.predict_proba((test.codes - mean) / deviation)
        areas.append(np.mean([references.area(told[:, c], test.classes[:, k] == c) for c in range(SIZES[k])]))
    assert explicitness(train, test) == pytest.approx(np.mean(areas), abs=1e-9)


def test_infoe_of_two_groups_is_the_information_of_their_frequencies():
    """A binary latent and a logistic regression: all that there is to know, of it alone."""
    rng = np.random.default_rng(5)
    factors = rng.integers(2, size=(COUNT, 2)).astype(np.float64)
    flipped = np.abs(factors - (rng.uniform(size=factors.shape) < 0.2))
    found = truth(np.column_stack([flipped[:, 0], rng.integers(2, size=COUNT)]), factors)
    model = infomec.cross_entropy(found.codes[:, :1], found.classes[:, 0])
    left = references.mutual_information(flipped[:, 0].tolist(), factors[:, 0].tolist())
    assert _ground_truth.entropy(found.classes)[0] - model == pytest.approx(left, abs=1e-6)


def test_the_information_of_a_quantised_code_is_that_of_its_frequencies_and_of_another_its_neighbours():
    coarse = truth(lambda factors: np.round(blurred(factors) * 2) / 2)
    assert infomec.quantised(coarse.codes)
    assert not infomec.quantised(truth(blurred).codes)
    nmi = infomec.normalised_information(coarse)
    for d, k in np.ndindex(3, 3):
        column = coarse.classes[:, k].tolist()
        share = references.mutual_information(coarse.codes[:, d].tolist(), column)
        assert nmi[d, k] == pytest.approx(share / references.mutual_information(column, column), abs=1e-9)

    quiet = np.column_stack([blurred(values())[:, :3], 0.01 * noise(1)])
    assert infomec.normalised_information(truth(quiet)).shape == (3, 3)


def test_factors_that_do_not_vary_or_never_repeat_are_left_out():
    factors = np.column_stack([values(), np.full(COUNT, 7.0), np.arange(COUNT)])
    assert truth(noise(4), factors).classes.max(axis=0).tolist() == [1, 2, 3]
    binned = truth(noise(4), np.column_stack([factors[:, 4], factors[:, 4] ** 2]), continuous=True)
    assert np.bincount(binned.classes[:, 0]).tolist() == [COUNT / 20] * 20
    with pytest.raises(ConfigError, match=r"two latents and two factors that vary; there are 4 and 1 in the 600 "):
        truth(noise(4), factors[:, 2:4])


def test_images_are_scored_once_and_never_those_that_were_learnt_from():
    factors = np.column_stack([values(), np.arange(COUNT) < 1])  # the last is in one part alone
    found = truth(np.column_stack([np.arange(COUNT), noise(1)]), factors)
    train, test = found.split()
    assert [len(train.codes), len(test.codes)] == [400, 200]
    assert len({*train.codes[:, 0], *test.codes[:, 0]}) == COUNT
    assert [len(part.codes) for part in found.split(300, 100)] == [300, 100]
    assert found.classes.shape[1] == 4
    assert train.classes.shape[1] == test.classes.shape[1] == 3
    assert len(set(found.sample(300).codes[:, 0])) == 300
    assert found.sample() is found


def subject(code, *, factors=(), attributes=(), array=None):
    """As much of a Subject as the metrics look at."""
    mean = torch.from_numpy(code).float()
    manifest = SimpleNamespace(factors=factors, attributes=attributes, directory="data/some", splits={"valid"})
    manifest.array = lambda part, name: {"valid": array}[part][name]
    data = SimpleNamespace(manifest=manifest)
    return SimpleNamespace(data=data, count=len(mean), world=World(), codes=lambda: SimpleNamespace(mean=mean))


def test_factors_are_compared_where_there_are_any_and_else_the_attributes():
    table = values().astype(np.float32)
    labels = (table > 0).astype(np.uint8)
    some = {"array": {"factors": table, "labels": labels}, "attributes": ("a", "b", "c")}
    named = (Named(name="x", values=(0.0, 1.0)), Named(name="y", values=(0.0, 1.0, 2.0)), Named(name="z"))
    found = ground_truth(subject(noise(4), factors=named, **some))
    assert found.continuous.tolist() == [False, False, True]
    assert (found.values == table).all()
    found = ground_truth(subject(noise(4), **some))
    assert found.continuous.tolist() == [False] * 3
    assert (found.classes == labels).all()
    with pytest.raises(ConfigError, match=r"^evaluate\.names: .* data/some has neither: leave it out$"):
        _ground_truth.require(Config(names=("mig",)), subject(noise(4)).data.manifest, 4)


@pytest.mark.parametrize(("latents", "images", "varying"), [(1, None, 3), (4, 1, 0), (4, None, 1)])
def test_what_a_metric_lacks_is_said_at_the_start_of_a_run(latents, images, varying):
    labels = (values() > 0).astype(np.uint8)
    labels[:, varying:] = 0
    manifest = subject(noise(4), attributes=("a", "b", "c"), array={"labels": labels}).data.manifest
    with pytest.raises(ConfigError, match=r"needs two latents and two factors that vary; there are \d and \d in the"):
        _ground_truth.require(Config(names=("mig",), images=images), manifest, latents)


def test_every_metric_is_asked_at_the_start_of_a_run():
    bare = subject(noise(4)).data.manifest
    for name in ("factorvae_metric", "betavae_metric", "mig", "dci", "sap", "modularity", "irs", "infomec"):
        with pytest.raises(ConfigError, match="has neither: leave it out"):
            Config(names=(name,)).require(bare, 4)


def test_the_evaluators_give_a_finite_number_under_each_name(of_noise):
    labels = np.random.default_rng(6).integers(2, size=(80, 3))
    looked_at = subject(noise(4, 80), attributes=("a", "b", "c"), array={"labels": labels.astype(np.uint8)})
    names = ("factorvae_metric", "betavae_metric", "mig", "dci", "sap", "modularity", "irs", "infomec")
    found = [pair for name in names for pair in import_module(f"vaedist.evaluators.{name}").run(looked_at)]
    assert {name for name, _ in found} == of_noise.keys()
    for name, number in found:
        assert isinstance(number, float), name
        assert 0 <= number <= 1, name


def test_factors_divided_among_ranks_give_the_same_numbers():
    train, test = truth(blurred).split()
    given, found, barrier = {}, {}, threading.Barrier(2)

    class Pair(World):
        def everyone(self, value):
            given[self.rank] = value
            barrier.wait()
            return [given[0], given[1]]

    def work(rank):
        found[rank] = explicitness(train, test, Pair(rank, 2))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [set(given[0]), set(given[1])] == [{0, 2}, {1}]
    assert found[0] == found[1] == explicitness(train, test)


def test_runs_that_found_the_same_latents_in_another_order_agree():
    codes = noise(4)
    same = [codes, codes[:, [2, 0, 3, 1]] * [1, -2, 3, -1], codes @ np.linalg.qr(noise(4, 4))[0]]
    kls = [np.ones(4)] * 3
    found = udr(same[:2], kls[:2])
    assert found["spearman"] == pytest.approx(1, abs=0.1)
    assert found["lasso"] == pytest.approx(0.9, abs=1e-9)  # which shrinks by alpha: 0.9^2 / 0.9
    turned = udr(same, kls)
    assert (turned["lasso"] < 0.8).all()
    assert udr(same[:2], [np.zeros(4)] * 2)["lasso"].tolist() == [0, 0]


def test_udr_is_its_definition_of_the_latents_that_tell_something():
    from scipy.stats import spearmanr
    from sklearn.linear_model import Lasso

    codes = [noise(3), noise(3) + 0.5 * noise(3)[:, [1, 2, 0]], np.round(blurred(values())[:, :3], 1)]
    kls = [np.array([1, 0.02, 1]), np.array([1, 0.005, 1]), np.ones(3)]
    told = [z[:, kl > 0.01] for z, kl in zip(codes, kls, strict=True)]
    standard = [(z - z.mean(0)) / z.std(0) for z in told]
    found = udr(codes, kls)
    for i in range(3):
        pairs = {"lasso": [], "spearman": []}
        for j in {0, 1, 2} - {i}:
            ranks = np.array([[abs(spearmanr(a, b).statistic) for b in told[i].T] for a in told[j].T])
            pairs["spearman"].append(references.relative_strength(ranks))
            weights = [np.abs(Lasso(alpha=0.1).fit(standard[j], target).coef_) for target in standard[i].T]
            np.testing.assert_allclose(lasso(standard[j], standard[i]).T, weights, atol=1e-9)
        assert found["spearman"][i] == pytest.approx(np.median(pairs["spearman"]), abs=1e-9)

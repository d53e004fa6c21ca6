"""The analyses of a trained model: what their numbers are, and that a picture shows the pixels it is of."""

import io
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import cases
import numpy as np
import pytest
import torch
from launching import complaints, launch
from PIL import Image
from small import SHAPE, small

from vaedist import attributes, curves, evaluators, pictures
from vaedist.config import ConfigError
from vaedist.edit import classifier
from vaedist.edit.__main__ import edit, measured
from vaedist.evaluators import Subject
from vaedist.evaluators.interpolation import linear, spherical
from vaedist.objectives import Objective
from vaedist.train import main
from vaedist.world import World

COUNT, NAMES = 600, ("Bright", "Odd", "Always")


def manifest(names: tuple[str, ...] = NAMES) -> SimpleNamespace:
    """The first half of the images is bright, every second one odd."""
    ids = np.arange(COUNT)
    labels = np.stack([ids < COUNT // 2, ids % 2, np.ones(COUNT)], 1).astype(np.uint8)
    return SimpleNamespace(
        directory="set", attributes=names, array=lambda *_: labels, split=lambda _: SimpleNamespace(count=COUNT)
    )


def subject(objective: Objective, world: World = World(), shape: tuple[int, int, int] = SHAPE) -> Subject:  # noqa: B008
    """All of the model's surroundings in memory; the held-out images are the training images."""
    images = torch.randint(128, (COUNT, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[: COUNT // 2] += 128
    store = SimpleNamespace(count=COUNT, shape=shape, gather=lambda ids: images[torch.from_numpy(ids)])
    order = SimpleNamespace(take=lambda positions: positions * 7 % COUNT)
    found = manifest()
    data = SimpleNamespace(
        train=store, valid=store, manifest=found, window=None, array=found.array, order=lambda _: order
    )
    backend = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float64, autocast=nullcontext)
    names = [name for name in evaluators.Config().names if name != "quality"]  # which needs larger images
    return Subject(evaluators.Config(names=tuple(names)), objective, data, world, backend, step=1200)


def test_a_grid_holds_its_images_pixel_for_pixel_and_gaps_between_groups():
    tiles = np.random.default_rng(0).integers(0, 200, (4, 3, 20, 30, 3), dtype=np.uint8)
    labels = {"rows": ["a", "a longer label"] * 2, "columns": ["1", "2", "3"]}
    picture = pictures.grid(tiles, "a caption", **labels, group=2).copy()
    lower, right = np.array(picture.shape[:2]) - (4 * 22 + pictures.GAP, 3 * 32)
    assert right > 60
    for row in range(4):
        for column in range(3):
            y, x = lower + 22 * row + row // 2 * pictures.GAP, right + 32 * column
            assert np.array_equal(picture[y : y + 20, x : x + 30], tiles[row, column])
            picture[y : y + 20, x : x + 30] = 255
    assert (picture[lower:, right:] == 255).all()
    assert (picture < 128).any(2)[:lower].any()


def test_a_long_caption_is_wrapped_not_cut_and_an_animation_keeps_its_size():
    tiles = np.zeros((1, 2, 64, 64, 3), np.uint8)
    text = "step 1,200 · a caption that is far longer than the picture is wide"
    sizes = {pictures.grid(tiles, f"{text} {pictures.signed(value)}").shape for value in np.linspace(-3, 3, 13)}
    ((height, width, _),) = sizes
    assert width == 2 * 66 + 2
    assert height > pictures.grid(tiles, "short").shape[0]
    assert [pictures.number(value) for value in (-3, -1.2e-7, 0.125)] == ["−3", "0", "0.125"]


def test_an_animation_goes_there_and_back_in_one_palette():
    frames = pictures.there_and_back([np.full((9, 9, 3), shade, np.uint8) for shade in (0, 80, 160)])
    assert frames[:, 0, 0, 0].tolist() == [0, 80, 160, 80]
    image = Image.open(io.BytesIO(pictures.encoded(frames)))
    assert (image.n_frames, image.info["loop"]) == (4, 0)
    for number, frame in enumerate(frames):
        image.seek(number)
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - frame).max() <= 8


def test_a_direction_is_the_mean_code_with_an_attribute_minus_that_without():
    means = torch.randn(COUNT, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = attributes.direction(manifest(), means, "Odd")
    assert torch.allclose(found, means[1::2].mean(0) - means[::2].mean(0), rtol=0, atol=1e-14)
    z = attributes.edited(means[:5], found, torch.tensor(attributes.ALPHAS))
    assert torch.equal(z[:, 3], means[:5])
    assert torch.allclose(z[:, 6] - z[:, 0], 6 * found.expand(5, 4))


@pytest.mark.parametrize(
    ("names", "name", "line"),
    [
        (NAMES, "Bight", "no attribute 'Bight'; did you mean Bright (of Bright, Odd, Always)?"),
        (NAMES, "Always", "Always: all of the 600 training images have it: no direction"),
        ((), "Bright", "set: the set has no attributes"),
    ],
)
def test_an_attribute_without_a_direction_is_answered_with_one_line(names, name, line):
    with pytest.raises(ConfigError) as error:
        evaluators.Config(attributes=("Odd", name) if names else (name,)).require(manifest(names), 4)
    assert str(error.value) == f"evaluate.attributes: {line}"


def test_the_attributes_shown_are_the_nearest_to_half_of_the_images():
    assert attributes.commonest(manifest(), 4) == ("Bright", "Odd")
    assert attributes.commonest(manifest(), 1) == ("Bright",)
    assert attributes.commonest(manifest(()), 4) == ()


def test_an_arc_between_two_codes_keeps_their_length_and_meets_the_line_at_its_ends():
    a, b = torch.tensor([3.0, 0, 4]).double(), torch.tensor([0, 5.0, 0]).double()
    t = torch.linspace(0, 1, 9).double()
    arc, line = spherical(a, b, t), linear(a, b, t)
    assert torch.allclose(arc.norm(dim=1), torch.full((9,), 5.0).double())
    assert line.norm(dim=1).min() < 4
    assert torch.allclose(arc[[0, -1]], line[[0, -1]])
    assert torch.equal(spherical(a, 2 * a, t), linear(a, 2 * a, t))


def test_success_is_of_images_that_lacked_the_attribute_and_drift_is_of_the_others():
    """Two images without the attribute, of which edits of alpha 2 and more turn one; two with, turned by -1."""
    probabilities = np.full((4, 8, 2), 0.25)
    probabilities[2:, :, 0] = 0.75
    probabilities[0, 6:, 0] = 0.9
    probabilities[2:, 1:4, 0] = 0.1
    probabilities[1, 7, 1] = 0.65
    found = measured(probabilities, ("Smiling", "Male"), "Smiling")
    assert found["added"] == {"images": 2, "share": {"0": 0, "1": 0, "2": 0.5, "3": 0.5}}
    assert found["removed"] == {"images": 2, "share": {"0": 0, "-1": 1, "-2": 1, "-3": 1}}
    assert found["drift"].keys() == {"Male"}
    assert found["drift"]["Male"]["change"] == pytest.approx(dict.fromkeys(map(str, range(-3, 3)), 0.0) | {"3": 0.1})
    assert found["drift"]["Male"]["flipped"]["3"] == 0.25
    assert measured(probabilities[:2], ("Smiling",), "Smiling")["removed"] == {"images": 0, "share": {}}


def test_a_classifier_is_compared_with_the_commoner_answer():
    having, training = np.array([1, 0, 0, 0], bool), np.array([1, 0, 0], bool)
    assert classifier.skill(np.array([1, 1, 0, 0], bool), having, training) == {
        "accuracy": 0.75, "balanced_accuracy": pytest.approx((1 + 2 / 3) / 2), "majority": 0.75
    }  # fmt: skip
    assert classifier.skill(having[1:], having[1:], training)["balanced_accuracy"] is None


def test_the_classifier_learns_and_is_the_same_bit_for_bit_on_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(classifier, "STEPS", 60)
    looked, threads, found = subject(small("vae"), shape=(3, 16, 16)), torch.get_num_threads(), []
    for number in (1, 3):
        torch.set_num_threads(number)
        found.append(classifier.train(looked))
        assert torch.get_num_threads() == number
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(found[0].parameters(), found[1].parameters(), strict=True))
    images, _ = looked.images(np.arange(COUNT))
    said = found[0](images.float())[:, 0] > 0
    assert classifier.skill(said.numpy(), np.arange(COUNT) < COUNT // 2, np.arange(COUNT) < 5)["accuracy"] > 0.95


class Apart(World):
    """One of several ranks, which leaves the sum to the test."""

    def sum(self, value):
        return value


@pytest.mark.parametrize("size", [2, 4])  # of three chunks
def test_ranks_put_together_what_one_computes_bit_for_bit(size):
    whole = subject(small("vae")).codes("train")
    ranks = [subject(small("vae"), Apart(rank, size)).codes("train") for rank in range(size)]
    for name, *parts in zip(("mu", "logvar", "z"), *ranks, strict=True):
        assert torch.equal(sum(parts), getattr(whole, name)), name


@pytest.mark.parametrize("name", ["vae", "qlae"])
def test_every_evaluator_draws_whatever_the_posterior_is(name):
    numbers, drawn = evaluators.run(subject(small(name)))
    assert numbers.keys() == {"recon", "kl", "elbo"}
    assert {name for name, picture in drawn.items() if picture.ndim == 4} == {
        "traversals_animation", "attributes_animation"
    }  # fmt: skip
    assert all(picture.dtype == np.uint8 and picture.shape[-1] == 3 for picture in drawn.values())
    assert drawn.keys() >= {"attributes", "interpolation", "posterior", "samples", "samples_aggregate"}


def test_a_quantised_decoder_sees_no_code_that_it_has_not_learned():
    objective = small("qlae")
    looked, z = subject(objective), torch.randn(7, 5, dtype=torch.float64)
    on_the_codebook = objective.codebook(z)
    assert not torch.equal(on_the_codebook, z)
    assert torch.equal(looked.expected(z), looked.expected(on_the_codebook))
    own = looked.codes().mean
    assert torch.equal(objective.nearest(own), own)


def test_sets_that_are_read_in_windows_are_not_read_whole_for_a_picture():
    looked = subject(small("vae"))
    far = replace(looked, data=SimpleNamespace(**vars(looked.data) | {"window": 2}))
    far.data.train.gather = None
    far.data.valid = SimpleNamespace(**vars(looked.data.valid) | {"gather": subject(small("vae")).data.valid.gather})
    assert "attributes" not in evaluators.run(far)[1]


def test_curves_are_of_training_and_held_out_terms_and_of_their_sum():
    rows = [{"step": n, "seen": 64 * n, "train/recon": 9.0, "train/kl": 1.0} for n in (1, 2)]
    rows[1] |= {"eval/recon": 8.0, "eval/kl": 2.0}
    assert [curves.value(row, "train", "elbo") for row in rows] == [10, 10]
    assert [curves.value(row, "eval", "recon") for row in rows] == [None, 8]
    with_points, without = curves.draw(rows, "run"), curves.draw(rows[:1], "run")
    assert with_points.shape == without.shape
    assert not np.array_equal(with_points, without)
    assert np.array_equal(with_points, curves.draw(rows, "run"))
    assert not np.array_equal(with_points, curves.draw(rows, "$5_{ and $9"))  # no formula


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("edited") / "run"
    assert main(cases.words("conv64", data, run, train_steps=1, evaluate_names="[]")) == 0
    return run


def test_an_edit_leaves_a_strip_an_animation_and_its_figures(trained, data, monkeypatch, capsys):
    monkeypatch.setattr(classifier, "STEPS", 2)
    words = [f"recipe={trained}/recipe.yaml", f"run={trained}"]
    assert main(words, partial(edit, ["Smiling"], [0, 12])) == 0
    found = trained / "edits" / "step-00000001"
    assert sorted(path.name for path in found.iterdir()) == ["Smiling.gif", "Smiling.json", "Smiling.png"]
    figures = json.loads((found / "Smiling.json").read_text())
    assert (figures["attribute"], figures["step"], figures["images"]) == ("Smiling", 1, 13)
    assert figures["added"]["images"] + figures["removed"]["images"] == 13
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"{trained}: edited at step 1; see {found}"
    assert f"Smiling: the classifier is right on {figures['classifier']['Smiling']['accuracy']:.0%} of 13" in said[-3]
    strip = np.asarray(Image.open(found / "Smiling.png"))
    images = data_of(trained).valid.gather(np.array([0, 12])).permute(0, 2, 3, 1).numpy()
    lower, right = strip.shape[0] - 2 * 66, strip.shape[1] - 8 * 66
    for row, image in enumerate(images):
        assert np.array_equal(strip[lower + 66 * row : lower + 66 * row + 64, right : right + 64], image)
    assert main(words, partial(edit, ["Smiling"], [])) == 0
    assert np.asarray(Image.open(found / "Smiling.png")).shape[0] // 66 == 6
    capsys.readouterr()
    for names, ids, line in (
        (["Smilling"], [0], "vaedist: no attribute 'Smilling'; did you mean Smiling (of Smiling)?"),
        (["Smiling"], [13], "vaedist: --images: no held-out image 13; there are 0 to 12"),
    ):
        assert main(words, partial(edit, names, ids)) == 1
        assert complaints(capsys.readouterr().err) == [line]


def data_of(run):
    from vaedist.recipe import load

    config = load([f"recipe={run}/recipe.yaml"])[0].data
    return config.open(config.find(print), print)


@pytest.mark.slow
def test_two_processes_measure_the_same_edit_as_one(trained, tmp_path):
    found = []
    for processes in (None, 2):
        run = tmp_path / str(processes)
        shutil.copytree(trained, run)
        script = tmp_path / "edit.py"
        script.write_text(
            "import sys\n"
            "from vaedist.edit import __main__ as edit\n"
            "edit.classifier.STEPS = 20\n"
            "edit.main(sys.argv[1:])\n"
        )
        done = launch(run, "Smiling", processes=processes, script=script)
        assert done.returncode == 0, done.stderr
        found.append(
            [(run / "edits/step-00000001" / f"Smiling.{kind}").read_bytes() for kind in ("json", "png", "gif")]
        )
    assert found[0] == found[1]

"""[accelerate launch -m | python -m] vaedist.edit RUN ATTRIBUTE ... [--images N,N,...] [key.path=value ...]

Adds attributes to held-out faces and takes them away, and measures how often a classifier sees that.
"""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from shards.files import replacing
from vaedist import attributes
from vaedist.attributes import ALPHAS
from vaedist.backend import Backend
from vaedist.config import ConfigError
from vaedist.console import Console
from vaedist.edit import classifier
from vaedist.edit.classifier import Figures
from vaedist.evaluate import observed, start_on
from vaedist.evaluators import Subject
from vaedist.evaluators.attributes import animation, strip
from vaedist.pictures import write_pictures
from vaedist.recipe import Recipe
from vaedist.stop import Stop
from vaedist.words import is_setting

if TYPE_CHECKING:
    from vaedist.data.order import Ids

SHOWN = 4  # attributes that drift
FACES = 6  # held-out images that the pictures show unless others are asked for


def edit(names: Sequence[str], ids: Sequence[int], recipe: Recipe, backend: Backend, stop: Stop) -> None:
    """Every rank calls it; raises one of the trainer's USER_ERRORS. ids: held-out images to show; none: the first ones.

    Writes RUN/edits/step-00001000/: NAME.png, NAME.gif and NAME.json of each attribute.
    """
    console = Console(main=backend.main)
    subject, _ = observed(recipe, backend, console)
    refuse(subject, names, ids)
    console.say("training the classifier that judges the edits")
    judge = classifier.train(subject)
    directory = recipe.run / "edits" / f"step-{subject.step:08d}"
    for name in names:
        with torch.no_grad(), backend.autocast():
            direction = attributes.direction(subject.data.manifest, subject.codes("train").mean, name)
            found = figures(subject, name, judged(subject, judge, direction))
            pictures = drawn(subject, name, direction, np.array(ids or range(min(FACES, subject.count))))
        if backend.main:
            for picture in pictures:
                write_pictures(directory, {name: picture})
            with replacing(directory / f"{name}.json") as file:
                file.write(f"{json.dumps(found, indent=1, allow_nan=False)}\n".encode())
        for line in summary(name, found):
            console.say(line)
    console.say(f"{recipe.run}: edited at step {subject.step}; see {directory}")


def refuse(subject: Subject, names: Sequence[str], ids: Sequence[int]) -> None:
    """Raises ConfigError where the set has not what is asked for."""
    for name in names:
        attributes.column(subject.data.manifest, name)
        if Path(name).name != name:
            raise ConfigError(f"{name}: this attribute cannot name the files of its edit: pack the set without the /")
    for number in ids:
        if number not in range(subject.count):
            raise ConfigError(f"--images: no held-out image {number}; there are 0 to {subject.count - 1}")
    if subject.data.window is not None:
        raise ConfigError(
            "a direction is a mean over all training images, of which a run with data.window has few at one time: "
            "edit a run without"
        )


def judged(subject: Subject, judge: nn.Module, direction: Tensor) -> np.ndarray:
    """The probabilities of all attributes, of every held-out image that is looked at and of its edits.

    [images, 1 + alphas, attributes], the original first; computed by all ranks, the same bits on any number of them.
    """
    means, alphas = subject.codes().mean, torch.tensor(ALPHAS)

    def some(ids: "Ids") -> list[Tensor]:
        originals, _ = subject.images(ids)
        z = attributes.edited(means[ids], direction, alphas)
        edits = subject.expected(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        images = torch.cat([originals[:, None], edits], 1)
        with torch.autocast(images.device.type, enabled=False):
            return [judge(images.flatten(0, 1).float()).sigmoid().unflatten(0, images.shape[:2])]

    return subject.rows(subject.count, some)[0].double().cpu().numpy()


def figures(subject: Subject, name: str, probabilities: np.ndarray) -> Figures:
    """What NAME.json says."""
    manifest, training = subject.data.manifest, attributes.labels(subject.data.manifest)
    having = np.asarray(subject.data.array("valid", "labels")[: subject.count], dtype=bool)
    said = probabilities[:, 0] > 0.5
    skills = {
        other: classifier.skill(said[:, k], having[:, k], training[:, k]) for k, other in enumerate(manifest.attributes)
    }
    return {"attribute": name, "step": subject.step, "images": subject.count, "classifier": skills} | measured(
        probabilities, manifest.attributes, name
    )


def measured(probabilities: np.ndarray, known: Sequence[str], name: str) -> Figures:
    """Success and drift of an edit from what `judged` gives; an image has an attribute whose probability is above 0.5.

    added: of the originals without the attribute, the share whose edit has it, by alpha; removed: the reverse. drift,
    of each other attribute: by alpha the mean absolute change of its probability since alpha = 0, the reconstruction,
    and the share of images that changed sides.
    """
    column, zero = known.index(name), ALPHAS.index(0)
    edits, said = probabilities[:, 1:], probabilities > 0.5
    before, after = said[:, 0, column], said[:, 1:]
    change = np.abs(edits - edits[:, [zero]]).mean(0)
    flipped = (after != after[:, [zero]]).mean(0)

    def turned(images: np.ndarray, into: bool, alphas: Sequence[int]) -> Figures:
        share = {alpha: (after[images, ALPHAS.index(alpha), column] == into).mean() for alpha in alphas if images.any()}
        return {"images": int(images.sum()), "share": {str(alpha): float(value) for alpha, value in share.items()}}

    def by_alpha(values: np.ndarray) -> dict[str, float]:
        return dict(zip(map(str, ALPHAS), values.tolist(), strict=True))

    return {
        "added": turned(~before, True, ALPHAS[zero:]),
        "removed": turned(before, False, ALPHAS[zero::-1]),
        "drift": {
            other: {"change": by_alpha(change[:, k]), "flipped": by_alpha(flipped[:, k])}
            for k, other in enumerate(known)
            if k != column
        },
    }


def drawn(subject: Subject, name: str, direction: Tensor, ids: np.ndarray) -> list[np.ndarray]:
    """The strip and the animation of some held-out images."""
    originals, _ = subject.images(ids)
    means, labels = subject.codes().mean[ids], [f"image {number}" for number in ids]
    z = attributes.edited(means, direction, torch.tensor(ALPHAS))
    what = f"{name}: z + α (mean z with − mean z without)"
    return [
        strip(subject, originals, z, what, labels),
        animation(subject, means, [direction], name, columns=labels),
    ]


def summary(name: str, found: Figures) -> list[str]:
    """What a person reads of the figures."""
    skill = found["classifier"][name]
    balanced = "" if skill["balanced_accuracy"] is None else f", {skill['balanced_accuracy']:.0%} balanced"
    lines = [
        f"{name}: the classifier is right on {skill['accuracy']:.0%} of {found['images']} held-out images{balanced}; "
        f"the commoner answer on {skill['majority']:.0%}"
    ]
    for verb, what in (("added", "without"), ("removed", "with")):
        shares = [
            f"{share:.0%} at α = {alpha}" if alpha != "0" else f"{share:.0%} reconstructed"
            for alpha, share in found[verb]["share"].items()
        ]
        if shares:
            lines.append(f"{name}: {verb}, of {found[verb]['images']} images {what} it: {', '.join(shares)}")
    last = str(ALPHAS[-1])
    drift = sorted(found["drift"].items(), key=lambda item: -item[1]["change"][last])[:SHOWN]
    changes = [f"{other} {by['change'][last]:.2f} ({by['flipped'][last]:.0%} flipped)" for other, by in drift]
    if changes:
        lines.append(f"{name}: drift at {last}, the largest: {', '.join(changes)}")
    return lines


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m vaedist.edit", description="Adds attributes to held-out faces.")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("words", nargs="+", metavar="ATTRIBUTE", help="or key.path=value")
    parser.add_argument("--images", metavar="N,N,...", help=f"held-out images to show; the first {FACES} if not given")
    told = parser.parse_intermixed_args(arguments)
    names = [word for word in told.words if not is_setting(word)]
    words = [word for word in told.words if is_setting(word)]
    try:
        ids = [int(number) for number in told.images.split(",")] if told.images else []
    except ValueError:
        parser.error(f"--images {told.images}: numbers with commas are wanted")
    if not names:
        parser.error("ATTRIBUTE is missing")
    start_on(told.run, ["evaluate.names=[]", *words], partial(edit, names, ids))  # no evaluator is run


if __name__ == "__main__":
    main(sys.argv[1:])

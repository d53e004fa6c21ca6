"""The training and validation curves of a run, drawn from its metrics.jsonl: python -m vaedist.evaluate RUN"""

from collections.abc import Sequence
from pathlib import Path

from vaedist import pictures, rows
from vaedist.rows import Row

TERMS = {"recon": "reconstruction", "kl": "KL", "elbo": "−ELBO"}  # nats per image


def write(run: Path) -> None:
    """RUN/curves.png."""
    pictures.write_pictures(run, {"curves": draw(rows.read(run / "metrics.jsonl"), run.name)})


def draw(found: Sequence[Row], name: str) -> pictures.Picture:
    """Each term over the images seen, in training and on the held-out images."""
    figure, axes = pictures.panels(f"{name} · nats per image", len(TERMS), size=(3.2, 2.4))
    for axis, (term, title) in zip(axes, TERMS.items(), strict=True):
        for part, colour, style in zip(("train", "eval"), pictures.COLOURS, ("-", "o-"), strict=True):
            points = [(row["seen"], at) for row in found if (at := value(row, part, term)) is not None]
            if points:
                label = {"train": "training", "eval": "held out"}[part]
                axis.plot(*zip(*points, strict=True), style, color=colour, label=label, linewidth=1.2, markersize=3)
        axis.set_title(title, fontsize=9, color=pictures.INK)
        axis.set_xlabel("images seen", fontsize=8, color=pictures.FAINT)
    axes[0].legend(fontsize=8, frameon=False)
    return pictures.drawn(figure)


def value(row: Row, part: str, term: str) -> float | None:
    """−ELBO = recon + kl, whatever the loss of the objective."""
    names = ("recon", "kl") if term == "elbo" else (term,)
    found = [row[f"{part}/{name}"] for name in names if f"{part}/{name}" in row]
    return sum(found) if len(found) == len(names) else None

"""How much each latent says: the mean standard deviation of its posterior, and its KL, over the held-out images."""

from collections.abc import Iterator

from vaedist import pictures
from vaedist.evaluators import Subject
from vaedist.pictures import Picture

LATENTS = 64  # shown at most


def run(subject: Subject) -> Iterator[tuple[str, Picture]]:
    q = subject.codes()
    kl, sigma = q.kl().double().mean(0), q.std.double().mean(0)
    order = kl.argsort(descending=True, stable=True)[:LATENTS].tolist()
    caption = subject.caption("latents, ordered by KL: means over the held-out images")
    figure, axes = pictures.panels(caption, 2, size=(max(5.5, 0.3 * len(order)), 1.8), down=True)
    for axis, name, values, colour in zip(axes, ("σ", "KL (nats)"), (sigma, kl), pictures.COLOURS, strict=True):
        axis.bar(range(len(order)), values[order].tolist(), color=colour, width=0.7)
        axis.set_ylabel(name, fontsize=9, color=pictures.INK)
        axis.set_xticks(range(len(order)), [f"z{latent}" for latent in order])
    axes[0].axhline(1, color=pictures.FAINT, linewidth=0.8, linestyle="--")
    axes[0].text(len(order) - 0.5, 1.02, "prior", fontsize=8, color=pictures.FAINT, ha="right")
    axes[0].set_ylim(0, 1.15)
    yield "posterior", pictures.drawn(figure)

"""What a set was packed from, found again."""

from collections.abc import Callable
from pathlib import Path

from shards import celeba, faces
from shards.manifest import Manifest, ShardError
from shards.source import Source

# Manifest.source["generator"] -> the source with the other arguments in Manifest.source
DRAWN: dict[str, Callable[[dict[str, str]], Source]] = {
    "faces": lambda told: faces.source(int(told["count"]), int(told["seed"])),
}


def find(found: Manifest, src: str | None) -> Source:
    """What a set was packed from; `src` is not needed where the images are drawn. ShardError if that is not it."""
    if "generator" in found.source:
        source = DRAWN[found.source["generator"]](found.source)
    elif "tars" in found.source:
        raise ShardError(f"{found.directory}: its tars come from elsewhere; take them from a copy: --from URL")
    elif src is None:
        raise ShardError(f"{found.directory}: name what it was packed from, or a copy of it: --from SRC_OR_URL")
    else:
        source = celeba.read(Path(src), allow_missing=True)
    told = {key: value for key, value in found.source.items() if key != "images"}
    if differing := {key for key, _ in told.items() ^ source.digests.items()}:
        raise not_the_source(source.place, f"its {min(differing)} is another")
    return source


def not_the_source(place: str, why: str) -> ShardError:
    return ShardError(f"{place}: not what the set was packed from ({why}); nothing is replaced")

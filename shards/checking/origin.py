"""What a set was packed from, found again."""

from collections.abc import Callable
from pathlib import Path

from shards import manifest
from shards.manifest import Manifest, ShardError
from shards.sources import Source, celeba, faces, folder, ground_truth

# Manifest.source["generator"] -> the source with the other arguments in Manifest.source
DRAWN: dict[str, Callable[[dict[str, str]], Source]] = {
    "faces": lambda told: faces.source(int(told["count"]), int(told["seed"])),
    "dsprites": lambda told: ground_truth.source("dsprites", count=int(told["count"])),
    "shapes3d": lambda told: ground_truth.source("shapes3d", count=int(told["count"])),
}


def find(found: Manifest, src: str | None) -> Source:
    """What a set was packed from; `src` is not needed where the images are drawn. ShardError if that is not it."""
    if (generator := found.source.get("generator")) is not None:
        if generator not in DRAWN:
            raise ShardError(f"{found.directory}: drawn by {generator!r}; this version has {', '.join(DRAWN)}")
        source = DRAWN[generator](found.source)
    elif "tars" in found.source:
        raise ShardError(f"{found.directory}: its tars come from elsewhere; take them from a copy: --from URL")
    elif src is None:
        raise ShardError(f"{found.directory}: name what it was packed from, or a copy of it: --from SRC_OR_URL")
    else:
        source = _read(found, Path(src))
    told = {key: value for key, value in found.source.items() if key != "images"}
    if differing := {key for key, _ in told.items() ^ source.digests.items()}:
        raise not_the_source(source.place, f"its {min(differing)} is another")
    return source


def _read(found: Manifest, src: Path) -> Source:
    """The reader of the kind of source that a set was packed from, on `src`."""
    if "labels" not in found.source:
        return celeba.read(src, allow_missing=True)
    told = found.source["labels"]
    if told in ("folders", "none"):
        return folder.read(src, classes=told == "folders")
    for path in (*src.glob("*.csv"), *src.resolve().parent.glob("*.csv")):
        if manifest.describe(path).sha256 == told:
            return folder.read(src, labels=path, allow_missing=True)
    raise ShardError(f"{src}: the table of its labels, a .csv with the sha256 {told}, is neither in it nor beside it")


def not_the_source(place: str, why: str) -> ShardError:
    """For whoever finds that a source is another."""
    return ShardError(f"{place}: not what the set was packed from ({why}); nothing is replaced")

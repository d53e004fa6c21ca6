"""Where the tars of somebody else lie: in the directory of the set, elsewhere on the disk, or behind a URL."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.manifest import ShardError
from shards.remote import fetch


@dataclass(frozen=True, kw_only=True)
class Place:
    """A tar. Where it lies in the directory of the set, its name tells enough; else `url` does, as in Shard."""

    split: str
    location: str  # a path or a URL
    name: str  # its file name
    url: str | None
    bytes: int | None  # None: a URL, not known yet


def find(split: str, texts: Sequence[str], dst: Path) -> list[Place]:
    """The tars of a split from paths or URLs, with braces as in {000..012}; ShardError for one that cannot be there."""
    return [_place(split, text, dst) for braced in texts for text in _expanded(braced)]


def distinct_names(places: Sequence[Place]) -> list[str]:
    """A name for each that no other has: the name of the file where that is so. ShardError for a tar given twice."""
    locations = [place.location for place in places]
    if len(set(locations)) < len(places):
        again = next(location for i, location in enumerate(locations) if location in locations[:i])
        raise ShardError(f"{again}: given twice; every sample belongs into one split, once")
    files = Counter(place.name for place in places)
    names = []
    for i, place in enumerate(places):
        free = place.url is None or files[place.name] == 1
        names.append(place.name if free else f"{i:05d}-{place.name}")
    return names


def _expanded(text: str) -> list[str]:
    if text.startswith("pipe:") or not any(mark in text for mark in ("{", "::")):
        return [text]
    from webdataset.shardlists import expand_urls  # imports torch: seconds

    try:
        expanded: list[str] = expand_urls(text)
    except ValueError as error:
        raise ShardError(f"{text}: {' '.join(str(error).split())}; braces are as in {{000..012}}") from None
    return expanded


def _place(split: str, text: str, dst: Path) -> Place:
    if text.startswith("pipe:"):
        raise ShardError(f"{text}: a command cannot be kept in a file that others read; give a URL or a path")
    if fetch.is_remote(text):
        name = text.partition("?")[0].rpartition("/")[2]
        return Place(split=split, location=text, name=name or "tar", url=text, bytes=None)
    path = Path(text).resolve()
    if path.is_dir():
        raise ShardError(f"{text}: a folder; give the tars in it, as {text.rstrip('/')}/*.tar")
    if not path.is_file():
        raise ShardError(f"{text}: there is no such file")
    url = None if path.parent == dst.resolve() else str(path)
    return Place(split=split, location=str(path), name=path.name, url=url, bytes=path.stat().st_size)

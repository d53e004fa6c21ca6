"""Where the files of a set are on this node: beside its manifest, or fetched from a URL when they are needed."""

import re
from collections.abc import Callable
from pathlib import Path

from shards import manifest
from shards.files import sync_directory
from shards.lock import exclusive
from shards.manifest import Manifest, Shard, ShardError, check_size
from shards.remote.cache import Cache
from shards.remote.fetch import download, is_remote, join, refuse_pipe

PLAIN = re.compile(r"\w[\w.+=@-]*", re.ASCII)
CACHE = Path("~/.cache/vaedist")  # fetched shards and decoded images, unless a user names another folder


class Library:
    """A set at `location`, a directory or a URL; index and labels are here at once, shards when they are asked for.

    location: a URL may be http(s), s3, gs, hf, `file:///DIRECTORY` for a shared disk from which shards are fetched
        like from anywhere else, or `pipe:COMMAND` with {name} in the place of a file's name.
    limit: bytes of fetched shards that `cache` may hold. pipe: run the commands that the manifest itself names.
    """

    def __init__(
        self,
        location: str,
        cache: Path,
        *,
        limit: int | None = None,
        pipe: bool = False,
        announce: Callable[[str], None] = print,
    ) -> None:
        self.location, self._pipe, self._announce = location, pipe, announce
        self._folder, self._limit = cache.expanduser() / "shards", limit
        self.remote = is_remote(location)
        self.manifest = _mirror(location, cache.expanduser(), announce) if self.remote else manifest.read(location)
        self._cache: Cache | None = None

    def path(self, split: str, number: int) -> Path:
        """A shard on this disk, fetched if need be; what is fetched stays at least until its `release`."""
        shard = self._shard(split, number)
        url = self._url(shard)
        if url is None:
            path = self.manifest.shard_path(split, number)
            check_size(path, shard.bytes)
            return path
        return self._fetched.get(url, shard)

    def release(self, split: str, number: int) -> None:
        """Undo one `path`: the shard may make room for others."""
        shard = self._shard(split, number)
        if self._url(shard) is not None:
            self._fetched.release(shard)

    def prefetch(self, split: str, numbers: list[int]) -> None:
        """Begin to fetch these shards in this order; one `path` for each is to follow."""
        shards = [self._shard(split, number) for number in numbers]
        items = [(url, shard) for shard in shards if (url := self._url(shard)) is not None]
        if items:
            self._fetched.prefetch(items)

    def cancel(self, split: str, number: int) -> None:
        """Undo the `prefetch` of a shard for which no `path` will come."""
        shard = self._shard(split, number)
        if self._url(shard) is not None:
            self._fetched.cancel(shard)

    def is_fetched(self, split: str) -> bool:
        """Whether the shards of a split come from elsewhere."""
        return any(self._url(shard) is not None for shard in self.manifest.split(split).shards)

    def require_room(self, at_once: int, cure: str) -> None:
        """ShardError if the limit of the cache is below the bytes of fetched shards that are needed at one time."""
        fetched = any(self.is_fetched(split) for split in self.manifest.splits)
        if fetched and self._limit is not None and at_once > self._limit:
            need = f"{at_once / 1e9:,.1f} GB of fetched shards are needed at one time"
            raise ShardError(f"{self.location}: {need}, the limit is {self._limit / 1e9:,.1f} GB; {cure}")

    def where(self, split: str, number: int) -> str:
        """What to call a shard in a message."""
        shard = self._shard(split, number)
        return self._url(shard) or str(self.manifest.shard_path(split, number))

    def close(self) -> None:
        """Ends prefetching and lets go of all fetched shards."""
        if self._cache is not None:
            self._cache.close()

    def _shard(self, split: str, number: int) -> Shard:
        return self.manifest.split(split).shards[number]

    def _url(self, shard: Shard) -> str | None:
        if shard.url is not None and is_remote(shard.url):
            if not self._pipe:
                refuse_pipe(shard.url, f"{self.manifest.directory / manifest.NAME}")
            return shard.url
        return join(self.location, shard.name) if self.remote else None

    @property
    def _fetched(self) -> Cache:
        if self._cache is None:  # nobody makes a folder for a set that lies on the disk
            self._cache = Cache(self._folder, self._limit, self._announce)
        return self._cache


def _mirror(location: str, cache: Path, announce: Callable[[str], None]) -> Manifest:
    """The manifest at a URL, beside copies of its arrays in the cache; it is asked for anew each time."""
    sets = cache / "sets"
    with exclusive(sets / ".lock", announce):
        new = sets / "new"
        new.mkdir(exist_ok=True)
        download(join(location, manifest.NAME), new / manifest.NAME, size=None, sha256=None)
        found = manifest.read(new)
        _refuse_foreign_names(location, found)
        home = sets / found.digest[:32]
        home.mkdir(exist_ok=True)
        if not (home / manifest.NAME).exists():
            for split in found.splits.values():
                for array in split.arrays.values():
                    download(join(location, array.name), home / array.name, size=array.bytes, sha256=array.sha256)
            (new / manifest.NAME).replace(home / manifest.NAME)  # last: its presence means that the arrays are here
            sync_directory(home)
        return manifest.read(home)


def _refuse_foreign_names(location: str, found: Manifest) -> None:
    """ShardError where a manifest from elsewhere names what lies on a disk, or what a command might misread."""
    for file in (file for split in found.splits.values() for file in (*split.shards, *split.arrays.values())):
        if isinstance(file, Shard) and file.url is not None:
            if not is_remote(file.url) or file.url.lower().startswith("file:"):
                raise ShardError(f"{location}: its manifest names the file {file.url} of whoever made it; pack it anew")
        elif not PLAIN.fullmatch(file.name):
            raise ShardError(f"{location}: its manifest names a file {file.name!r}; such a name is not fetched")

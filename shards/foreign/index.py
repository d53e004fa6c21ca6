"""Making the tars of somebody else a set that can be trained on: scanned once, left where they are, described here."""

import itertools
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from shards import manifest, parallel
from shards.foreign import contents, places
from shards.foreign.contents import Scan
from shards.foreign.described import describe
from shards.foreign.places import Place
from shards.foreign.tape import Tape, file_chunks
from shards.manifest import Manifest, ShardError
from shards.packing.plan import MEGABYTE
from shards.remote import fetch, protocols

WORTH_A_PROCESS = 2**28  # bytes


def index(
    tars: Sequence[str],
    dst: Path,
    *,
    valid: Sequence[str] = (),
    image: str | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> Manifest:
    """Describe WebDataset tars in `dst`, so that it can be trained on. Nothing is extracted or copied.

    tars, valid: see `places.find`; without `valid`, some samples are held out, see `described.HELD_OUT`.
    image: the suffix of the member that is the image, where samples have several.
    ShardError, naming tar, byte and key, if a tar is damaged, hostile, compressed or without an image in every sample.
    """
    start, dst = time.monotonic(), Path(dst)
    if (dst / manifest.NAME).exists():
        raise ShardError(f"{dst}: describes a set already; remove its {manifest.NAME} or choose another directory")
    found = [*places.find("train", tars, dst), *places.find("valid", valid, dst)]
    names = places.distinct_names(found)
    wanted = None if image is None else image.lstrip(".").lower()
    scans = _scan_all(found, wanted, workers, quiet)
    result, remark = describe(dst, found, names, scans, wanted)
    if not quiet:
        _summarise(result, scans, remark, time.monotonic() - start)
    return result


def scan(location: str, wanted: str | None) -> Scan:
    """`contents.scan` of a path or a URL; what fails on the way from a URL is tried again."""
    if not fetch.is_remote(location):
        path = Path(location)
        return contents.scan(Tape(location, file_chunks(path), path.stat().st_size), wanted)
    for number in itertools.count(1):
        try:
            with closing(protocols.chunks(location)) as chunks:
                return contents.scan(Tape(protocols.shown(location), chunks), wanted)
        except protocols.BrokenError as error:
            if error.refused or number == fetch.TRIES:
                cure = "check the address and your rights, then start again"
                raise ShardError(
                    f"{protocols.shown(location)}: {error}; gave up after {number} tries; {cure}"
                ) from None
        time.sleep(fetch.BACKOFF * 2 ** (number - 1))
    raise AssertionError


def _scan_all(found: list[Place], wanted: str | None, workers: int | None, quiet: bool) -> list[Scan]:
    total = sum(place.bytes or WORTH_A_PROCESS for place in found)
    processes = min(parallel.cores() if workers is None else workers, total // WORTH_A_PROCESS + 1)
    results = parallel.each(_scan_job, [(place.location, wanted) for place in found], processes)
    return list(parallel.shown(results, [1] * len(found), "scanned", quiet, unit="tars"))


def _scan_job(job: tuple[str, str | None]) -> Scan:
    return scan(*job)


def _summarise(result: Manifest, scans: list[Scan], remark: str, seconds: float) -> None:
    samples, size = sum(len(scan.index) for scan in scans), sum(scan.bytes for scan in scans) / MEGABYTE
    counts = ", ".join(f"{name} {split.count:,}" for name, split in result.splits.items())
    speed = f"{samples / seconds:,.0f} samples/s, {size / seconds:,.1f} MB/s"
    print(remark)
    print(f"indexed {samples:,} samples ({counts}), {size:,.1f} MB in {len(scans)} tars: {speed}")
    print(f"{result.directory}: {result.size_text} {result.encoding}; manifest {result.digest}")

"""Reading a tar with the webdataset package, as anybody would, and holding what it gives against index and tar."""

import gc
import json
import tarfile
import warnings
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

from shards.checking.tars import Samples, local
from shards.foreign.contents import Sample, chosen, samples
from shards.foreign.described import IMAGE
from shards.foreign.tape import Tape, file_chunks
from shards.manifest import ShardError


def stock_faults(job: Samples) -> list[str]:
    """How the samples that webdataset reads are not those of the index, in order: keys, members and bytes of images."""
    name = job.tar.shard.name
    try:
        with (
            warnings.catch_warnings(action="ignore", category=ResourceWarning),  # webdataset does not close its files
            local(job.tar) as path,
            path.open("rb") as stream,
        ):
            faults = [f"{name}: {fault}" for fault in _faults(job, path, stream)]
            gc.collect()
            return faults
    except (ShardError, ValueError, tarfile.TarError) as error:  # the last two are webdataset's
        return [f"{name}: {' '.join(str(error).split())}"]


def _faults(job: Samples, path: Path, stream: IO[bytes]) -> Iterator[str]:
    source = job.manifest.source
    wanted = source.get(IMAGE)
    tape = Tape(str(path), file_chunks(path), path.stat().st_size)
    for key, row, own, read in zip_longest(job.keys, job.index, samples(tape, wanted), _read(path)):
        if read is None:
            yield f"webdataset does not read sample {key or own.key}"
        elif key is None or own is None:
            yield f"webdataset reads a sample {read['__key__']} that is not in the index"
        elif key != read["__key__"]:
            yield f"webdataset reads {read['__key__']} where the index has {key}"
        else:
            picture = chosen(tape, own, wanted)
            stream.seek(min(int(row["offset"]), job.tar.shard.bytes))
            data = stream.read(int(row["length"]))
            yield from (f"sample {key}: {fault}" for fault in _differences(own, read, picture.suffix, data))
            if not job.foreign and ("json" not in read or json.loads(read["json"])["image_id"] != row["image"]):
                yield f"sample {key}: webdataset reads no json of this image"


def _read(path: Path) -> Iterator[dict[str, Any]]:
    import webdataset  # imports torch: seconds

    yield from webdataset.WebDataset([str(path)], shardshuffle=False)


def _differences(own: Sample, read: dict[str, Any], suffix: str, data: bytes) -> Iterator[str]:
    """suffix: of the image; data: its bytes where the index says that they are."""
    members = [name for name in read if not name.startswith("__")]
    if members != own.suffixes:
        yield f"webdataset reads {', '.join(members)} where the tar has {', '.join(own.suffixes)}"
    elif read[suffix] != data:
        yield "webdataset reads another image than the index says"

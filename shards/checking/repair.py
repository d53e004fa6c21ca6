"""Making the damaged and missing files of a set again, each exactly as the manifest describes it."""

import hashlib
import shutil
from pathlib import Path

from shards import manifest
from shards.checking import origin
from shards.checking.rebuild import write_arrays, write_tars
from shards.checking.tars import tars
from shards.checking.verify import bad_files
from shards.files import replacing, sync_directory
from shards.foreign.tape import file_chunks
from shards.manifest import File, Manifest, ShardError
from shards.packing.destination import DRAFT
from shards.remote.fetch import download, is_remote, join, refuse_pipe

FOLDER = ".repair"  # in the set: files that are not checked yet


def repair(
    directory: Path, src: str | None = None, *, workers: int | None = None, quiet: bool = False
) -> dict[str, str]:
    """Replace what is damaged or missing, each file at once; by name, what was wrong with it.

    src: what the set was packed from, which drawn sets do not need; or a copy of the set, a folder or a URL, from which
    files are taken by name. Without it, tars that have a URL of their own come from there, and arrays are made from the
    tars. A set whose manifest is damaged can only be restored from a copy. ShardError if that does not give the very
    bytes that the manifest names; then nothing is replaced, except by files from a copy that are right.
    """
    copy = src if src is not None and _is_copy(src) else None
    if directory.is_dir():
        _sweep(directory)
    found = _read(directory, copy)
    damaged = bad_files(found, workers=workers, quiet=quiet)
    files = {file.name: file for split in found.splits.values() for file in (*split.arrays.values(), *split.shards)}
    _refuse_outside(found, damaged)
    if copy is not None:
        for name in damaged:
            _take(copy, files[name], directory / name)
        return damaged
    urls = {tar.shard.name: tar.shard.url for tar in tars(found) if tar.shard.url is not None}
    for name in damaged.keys() & urls.keys():
        refuse_pipe(urls[name], manifest.NAME)
        download(urls[name], directory / name, size=files[name].bytes, sha256=files[name].sha256)
    left = [name for name in damaged if name not in urls]
    if left:
        _make(found, left, files, src, workers, quiet)
    return damaged


def _sweep(directory: Path) -> None:
    """Removes what a killed repair has left."""
    shutil.rmtree(directory / FOLDER, ignore_errors=True)
    for path in directory.iterdir():
        if DRAFT.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _is_copy(src: str) -> bool:
    return is_remote(src) or (Path(src) / manifest.NAME).is_file()


def _read(directory: Path, copy: str | None) -> Manifest:
    """The manifest of a set, from a copy of it if it is damaged or missing."""
    try:
        return manifest.read(directory)
    except ShardError as error:
        if copy is None:
            cure = "it cannot be made again; `--from URL` takes it from a copy of the set"
            raise ShardError(f"{str(error).partition(';')[0]}; {cure}") from None
    directory.mkdir(parents=True, exist_ok=True)
    folder = directory / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        path = folder / manifest.NAME
        if is_remote(copy):
            download(join(copy, manifest.NAME), path, size=None, sha256=None)
        else:
            shutil.copyfile(Path(copy) / manifest.NAME, path)
        manifest.read(folder)
        path.replace(directory / manifest.NAME)
        sync_directory(directory)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest.read(directory)


def _refuse_outside(found: Manifest, damaged: dict[str, str]) -> None:
    """ShardError for a damaged tar that does not lie in the directory of the set."""
    for tar in tars(found):
        if tar.shard.name in damaged and (tar.url is not None or tar.path.parent != found.directory):
            cure = "mend it there, or remove the set and index it again"
            raise ShardError(f"{damaged[tar.shard.name]}; {tar.url or tar.path} lies outside the set: {cure}")


def _take(copy: str, file: File, path: Path) -> None:
    """A file by its name from a copy of the set."""
    if is_remote(copy):
        download(join(copy, file.name), path, size=file.bytes, sha256=file.sha256)
        return
    digest = hashlib.sha256()
    with replacing(path) as stream:
        for chunk in file_chunks(Path(copy) / file.name):
            digest.update(chunk)
            stream.write(chunk)
        if digest.hexdigest() != file.sha256:
            raise ShardError(f"{Path(copy) / file.name}: not the file that the manifest names; it is not taken")


def _make(
    found: Manifest, names: list[str], files: dict[str, File], src: str | None, workers: int | None, quiet: bool
) -> None:
    """Make these files again, all of them before the first takes its place."""
    folder = found.directory / FOLDER
    shards = {tar.shard.name for tar in tars(found)}
    try:
        folder.mkdir(exist_ok=True)
        if shards.intersection(names):
            source = origin.find(found, src)
            write_tars(found, shards.intersection(names), source, folder, workers=workers, quiet=quiet)
        if not shards.issuperset(names):
            write_arrays(found, set(names) - shards, folder)
        for name in names:
            if manifest.describe(folder / name) != File(name=name, bytes=files[name].bytes, sha256=files[name].sha256):
                raise ShardError(f"{name}: what can be made from the tars is another; take it from a copy: --from URL")
        for name in names:
            (folder / name).replace(found.directory / name)
        sync_directory(found.directory)
    finally:
        shutil.rmtree(folder, ignore_errors=True)

"""The files in a tar of unknown origin: nothing is extracted, and no header is believed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from shards.foreign.tape import Tape
from shards.tar import BLOCK

LONGEST = 2**16  # bytes of an extended header: those of honest tars have hundreds
LONGEST_NAME = 1000  # bytes; every row of the array `keys` is as long as the longest key
FILES, DIRECTORY = (b"0", b"\0", b"7"), b"5"
EXTENSIONS = {b"x": "pax", b"g": "global pax", b"L": "long name", b"K": "long link"}
REFUSED = {b"1": "a link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe", b"S": "sparse"}
PACKED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}
OCTAL = re.compile(rb" *([0-7]*) *(?:\0.*)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar."""

    name: str  # bytes that are not utf-8 as surrogates
    at: int  # byte of its first header
    offset: int  # byte of its contents
    size: int  # bytes


def members(tape: Tape) -> Iterator[Member]:
    """The regular files of a tar (ustar, pax or GNU) in order, at most read while each is current; then the end of it.

    ShardError, naming tar, byte and member, for a damaged or truncated tar, for one that is compressed, and for what
    has no place in a data set: links, devices, sparse files, absolute names, names with `..` and impossible sizes.
    """
    last = "before its first member"
    while True:
        at = tape.position
        header = _header(tape, at, last)
        if header is None:
            if any(any(piece) for piece in tape.pieces(1 << 62)):
                tape.fail(at, f"something follows the end of the tar {last}; were two tars joined? index them apart")
            return
        kind, name, size = header
        offset = tape.position
        if kind in FILES:
            end = offset + size
            if tape.size is not None and end > tape.size:
                tape.fail(at, f"{name!r} claims {size} bytes, but the tar ends at byte {tape.size}")
            yield Member(name, at, offset, size)
            padded = offset + -(-size // BLOCK) * BLOCK
            for _ in tape.pieces(padded - tape.position):
                pass
            if tape.position < padded:
                tape.fail(at, f"truncated: {name!r} has {size} bytes, but the tar ends at byte {tape.position}")
        last = f"after {name!r}"


def _header(tape: Tape, at: int, last: str) -> tuple[bytes, str, int] | None:
    """Type, name and size of the next member, whose headers begin at byte `at`; None at the end mark."""
    told: dict[bytes, bytes] = {}
    while True:
        block = tape.read(BLOCK)
        if not any(block) and len(block) == BLOCK and not told:
            return None
        if len(block) < BLOCK:
            why = "in a header" if block or told else "without the mark of its end"
            tape.fail(tape.position, f"truncated: the tar ends {why} {last}")
        kind = block[156:157]
        if not _sound(block):
            tape.fail(tape.position - BLOCK, _no_header(block) if at == 0 else f"a damaged tar header {last}")
        name = told.get(b"path") or _name(block)
        size = _size(tape, block, at, name)
        if kind == b"\0" and name.endswith(b"/"):
            kind = DIRECTORY  # as tars had it before 1988
        if kind not in EXTENSIONS:
            text = _checked_name(tape, at, name, kind)
            own = told.get(b"size", b"")
            if own and not own.isdigit():
                tape.fail(at, f"{text!r} claims a size of {own[:20]!r}")
            return kind, text, int(own[:20]) if own else size
        if size > LONGEST:
            tape.fail(at, f"a {EXTENSIONS[kind]} header of {size} bytes {last}; more than {LONGEST} are refused")
        data = tape.read(-(-size // BLOCK) * BLOCK)[:size]
        _extend(tape, told, kind, data, at)


def _extend(tape: Tape, told: dict[bytes, bytes], kind: bytes, data: bytes, at: int) -> None:
    """Adds to `told` what an extended header says about the member that follows."""
    if kind == b"L":
        told[b"path"] = data.rstrip(b"\0")
    elif kind in b"xg":
        try:
            records = _records(data)
        except ValueError:
            tape.fail(at, "a damaged pax header")
        if any(key.startswith(b"GNU.sparse") for key in records):
            tape.fail(at, "a sparse member; make the tar without --sparse")
        if kind == b"g" and records.keys() & {b"path", b"size"}:
            tape.fail(at, "a global pax header that names or sizes every member")
        if kind == b"x":
            told.update(records)


def _records(data: bytes) -> dict[bytes, bytes]:
    """The records `length key=value\\n` of a pax header; ValueError if they are none."""
    records, at = {}, 0
    while at < len(data):
        blank = data.index(b" ", at, at + 8)
        end = at + int(data[at:blank])
        key, equals, value = data[blank + 1 : end - 1].partition(b"=")
        if end <= blank or data[end - 1 : end] != b"\n" or not equals:
            raise ValueError
        records[key], at = value, end
    return records


def _sound(block: bytes) -> bool:
    """Whether a header has the checksum it tells; some old programs summed signed characters."""
    match = OCTAL.fullmatch(block[148:156])
    if not match or not match[1]:
        return False
    told, total = int(match[1], 8), sum(block) - sum(block[148:156]) + 8 * ord(" ")
    return told == total or told == total - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def _no_header(block: bytes) -> str:
    """What a file that does not begin with a tar header is instead."""
    for magic, command in PACKED.items():
        if block.startswith(magic):
            return f"compressed, so that no image could be read without all before it; unpack it: {command}"
    return "a web page, not a tar" if block.lstrip().startswith(b"<") else "not a tar, or its first header is damaged"


def _size(tape: Tape, block: bytes, at: int, name: bytes) -> int:
    field = block[124:136]
    if field[0] == 0x80:  # base 256
        return int.from_bytes(field[1:], "big")
    match = OCTAL.fullmatch(field)
    if not match:
        tape.fail(at, f"{name[:100]!r} claims a size of {field!r}")
    return int(match[1] or b"0", 8)


def _name(block: bytes) -> bytes:
    name, prefix = block[:100].split(b"\0", 1)[0], block[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if prefix and block[156] not in b"LKxg" else name


def _checked_name(tape: Tape, at: int, name: bytes, kind: bytes) -> str:
    """The name as text, if it and the type belong into a data set."""
    text = name.decode("utf-8", "surrogateescape")
    shown = text if len(text) < 200 else f"{text[:200]}..."
    if kind not in FILES and kind != DIRECTORY:
        tape.fail(at, f"{shown!r} is {REFUSED.get(kind, f'of type {kind!r}')}; a data set consists of plain files")
    if not name or len(name) > LONGEST_NAME or any(byte < 32 or byte == 127 for byte in name):
        tape.fail(at, f"{shown!r} is no name for an image: empty, with control characters, or over {LONGEST_NAME} long")
    if name.startswith(b"/") or b".." in name.split(b"/"):
        tape.fail(at, f"{shown!r} leads out of the folder it would be unpacked in; such a tar is not to be trusted")
    return text

"""What identifies images: their names, sizes and bytes; never their place, date or owner.

    hash_files(root, names, key=...)      # 16 hex digits, the same for a copy in another folder

Reading every byte of a large data set takes minutes, so each file's hash is kept in the user's
cache, `$XDG_CACHE_HOME/ur_jax/images` (or `~/.cache/...`), one file per folder, and taken from
there while the file's size, time of modification, time of change and inode stay what they were. The
cache may be deleted at any time; where it is damaged or cannot be written, files are hashed anew.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ur_jax.data.reading import retried
from ur_jax.runs.files import atomic_path

_STAMP = np.dtype([("size", "<i8"), ("modified", "<i8"), ("changed", "<i8"), ("inode", "<u8")])
_LAYOUT = b"ur_jax image hashes 1\n"  # then the SHA-256 of the rest, an .npz
_DIGEST = 16  # bytes of each file's SHA-256
_CHUNK = 256  # files per task
_THREADS = min(32, 8 * (os.cpu_count() or 1))  # more than cores: of a network's storage they wait
_SAY_SECONDS = 10.0
_KEEP_SECONDS = 60.0
# A file changed this recently might be changed again within one tick of its file system's clock,
# of 2 s at worst, and look the same: it is hashed anew the next time.
_SETTLED_NS = 2_000_000_000


class _Hashes(NamedTuple):
    """What is known of N files: `names` (bytes), (N,) stamps, (N, 16) uint8 digests."""

    names: list[bytes]
    stamps: np.ndarray
    digests: np.ndarray


def hash_files(root: str | os.PathLike[str], names: Sequence[str], *, key: str = "") -> str:
    """Hashes files: their names, sizes and bytes, in the order given.

    Args:
      root: the folder.
      names: paths within it.
      key: which files of the folder these are, where several listings of it are in use; each has
        a cache of its own.

    Returns:
      16 hex digits of a SHA-256.

    Raises:
      StorageError: for a file that cannot be read; it is named.
    """
    hashes, digest = _hashes(root, names, key), hashlib.sha256()
    for name, size, content in zip(
        hashes.names, hashes.stamps["size"].tolist(), hashes.digests, strict=True
    ):
        digest.update(name + b"\0" + size.to_bytes(8, "little") + content.tobytes())
    return digest.hexdigest()[:16]


def file_digests(
    root: str | os.PathLike[str], names: Sequence[str], *, key: str = ""
) -> np.ndarray:
    """The first 16 bytes of each file's SHA-256, (N, 16) uint8; arguments as of `hash_files`."""
    return _hashes(root, names, key).digests


def content_digest(content: bytes) -> bytes:
    """What `file_digests` has of a file with this content."""
    return hashlib.sha256(content).digest()[:_DIGEST]


def _hashes(root: str | os.PathLike[str], names: Sequence[str], key: str) -> _Hashes:
    """Of files, from the cache where that knows them."""
    folder = os.path.realpath(root)
    cache = _cache_folder() / f"{_short_hash(os.fsencode(folder), key.encode())}.hashes"
    hashes, is_known = _recall(folder, [os.fsencode(name) for name in names], _read(cache))
    if not is_known.all():
        _complete(folder, hashes, is_known, cache)
    return hashes


def _recall(folder: str, names: list[bytes], kept: _Hashes) -> tuple[_Hashes, np.ndarray]:
    """What the cache knows of files that still look as they did, and which ones those are."""
    known = np.zeros(len(names), bool)
    stamps, digests = np.zeros(len(names), _STAMP), np.zeros((len(names), _DIGEST), np.uint8)
    hashes = _Hashes(names, stamps, digests)
    if not kept.names:
        return hashes, known
    rows = np.arange(len(names))
    if kept.names != names:
        row_of = {name: row for row, name in enumerate(kept.names)}
        rows = np.array([row_of.get(name, -1) for name in names], np.int64)
    chunks = [names[i : i + _CHUNK] for i in range(0, len(names), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        stamps[:] = np.concatenate(list(pool.map(lambda c: _stamp_chunk(folder, c), chunks)))
    known = (rows >= 0) & (stamps["size"] >= 0) & (kept.stamps[rows] == stamps)
    digests[known] = kept.digests[rows[known]]
    return hashes, known


def _complete(folder: str, hashes: _Hashes, is_known: np.ndarray, cache: Path) -> None:
    """Hashes the files that are not known, and keeps what is found, also if it is interrupted."""
    missing = np.flatnonzero(~is_known)
    is_settled = is_known.copy()
    began = said = kept = time.monotonic()
    stop = threading.Event()  # else whoever interrupts waits for files that are being read
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            chunks = [missing[i : i + _CHUNK] for i in range(0, len(missing), _CHUNK)]
            work = lambda rows: _hash_chunk(folder, [hashes.names[row] for row in rows], stop)
            try:
                done = 0
                for rows, found in zip(chunks, pool.map(work, chunks), strict=True):
                    stamps, digests, settled = found
                    hashes.stamps[rows], hashes.digests[rows] = stamps, digests
                    is_known[rows], is_settled[rows] = True, settled
                    done, now = done + len(rows), time.monotonic()
                    if now - said > _SAY_SECONDS:
                        said = now
                        _say(folder, done, len(missing), now - began)
                    if now - kept > _KEEP_SECONDS:
                        kept = now
                        _write(cache, hashes, is_settled)
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        _write(cache, hashes, is_settled)


def _hash_chunk(
    folder: str, names: list[bytes], stop: threading.Event
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stamps, digests, and whether a file has been at rest for long enough to be recalled."""
    stamps, digests = np.zeros(len(names), _STAMP), np.zeros((len(names), _DIGEST), np.uint8)
    now = time.time_ns()
    for row, name in enumerate(names):
        if stop.is_set():
            break
        path = os.path.join(os.fsencode(folder), name)
        stamp, digest = retried(lambda path=path: _hash_one(path), repr(os.fsdecode(path)))
        stamps[row], digests[row] = stamp, np.frombuffer(digest, np.uint8)
    changed = np.maximum(stamps["modified"], stamps["changed"])
    return stamps, digests, changed < now - _SETTLED_NS


def _hash_one(path: bytes) -> tuple[tuple[int, ...], bytes]:
    """The stamp of a file, taken before it is read, and its digest."""
    with open(path, "rb", buffering=0) as file:
        stamp = _stamp(os.fstat(file.fileno()))
        return stamp, hashlib.file_digest(file, "sha256").digest()[:_DIGEST]


def _stamp_chunk(folder: str, names: list[bytes]) -> np.ndarray:
    """The stamps of files; a size of -1 where one cannot be looked at."""
    root, stamps = os.fsencode(folder), []
    for name in names:
        try:
            stamps.append(_stamp(os.stat(os.path.join(root, name))))
        except OSError:  # hashing it will say so
            stamps.append((-1, 0, 0, 0))
    return np.array(stamps, _STAMP)


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    """What changes when a file does."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _cache_folder() -> Path:
    """Where hashes are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "ur_jax", "images")


def _read(path: Path) -> _Hashes:
    """Reads what is kept; nothing of a file that is damaged, of another layout, or not there."""
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    mark, body = content[: len(_LAYOUT) + 32], content[len(_LAYOUT) + 32 :]
    if mark != _LAYOUT + hashlib.sha256(body).digest():
        return _Hashes([], np.zeros(0, _STAMP), np.zeros((0, _DIGEST), np.uint8))
    with np.load(io.BytesIO(body), allow_pickle=False) as kept:
        return _Hashes(kept["names"].tobytes().split(b"\0"), kept["stamps"], kept["digests"])


def _write(path: Path, hashes: _Hashes, rows: np.ndarray) -> None:
    """Keeps the rows of a mask, atomically: several processes may do so at once."""
    names = [hashes.names[row] for row in np.flatnonzero(rows)]
    if not names:
        return
    body, blob = io.BytesIO(), np.frombuffer(b"\0".join(names), np.uint8)
    np.savez(body, names=blob, stamps=hashes.stamps[rows], digests=hashes.digests[rows])
    try:
        with atomic_path(path) as temporary:
            mark = _LAYOUT + hashlib.sha256(body.getbuffer()).digest()
            temporary.write_bytes(mark + body.getbuffer())
    except OSError as error:
        warnings.warn(
            f"The hashes of images cannot be kept in {path.parent} ({error.strerror or error}) and "
            "are computed anew in every run; set XDG_CACHE_HOME to a folder that can be written.",
            stacklevel=2,
        )


def _say(folder: str, done: int, total: int, seconds: float) -> None:
    """Tells on standard error how far a long hashing is: it would look like standing still."""
    left = seconds / done * (total - done)
    print(
        f"Reading {folder} once, to know its images again: {done:,} of {total:,} files, "
        f"{left:.0f} s left",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def _short_hash(*parts: bytes) -> str:
    """16 hex digits of the SHA-256 of some bytes."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]

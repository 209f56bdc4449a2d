"""Images in a folder, which is listed in one order on every machine."""

from __future__ import annotations

import errno
import functools
import io
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ur_jax.data.identity import file_digests, hash_files
from ur_jax.data.pixels import decode
from ur_jax.data.reading import StorageError, retried
from ur_jax.data.sources import SOURCES, Example, ImageSource
from ur_jax.errors import UserError, shown

# The files that torchvision's ImageFolder lists, so that the paper's subsets are ours.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

OTHER_SUFFIXES = (
    ".gif", ".jfif", ".jp2", ".j2k", ".jxl", ".heic", ".heif", ".avif", ".tga", ".psd", ".svg",
    ".dng", ".cr2", ".nef", ".arw", ".exr", ".hdr", ".dcm", ".npy",
)  # fmt: skip
"""Pictures of other kinds, which are not listed: a folder of them is told so."""

SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
"""What archives, file systems and servers put beside one's own folders."""


@SOURCES.register("folder")
class FolderSource(ImageSource):
    """Every image file under a folder, at any depth; first-level sub-folders are the classes.

    Sorted by class, then folder, then file name. An image outside any sub-folder has label -1. Left
    out, with a warning that names them: hidden entries (whose name begins with a dot), folders of
    the system's (`SYSTEM_FOLDERS`), links to a folder that they lie in, and what is no file. Bytes
    of a name that are not UTF-8 are written as `\\xff`.
    """

    def __init__(self, place: str | os.PathLike[str]):
        """Lists a folder.

        Raises:
          UserError: if it is not there, or without images.
          StorageError: for a folder in it that cannot be listed.
        """
        if not isinstance(place, (str, os.PathLike)):
            raise UserError(f"Expected the path of a folder, got {shown(place)}.")
        self.spec = f"folder:{printable(os.fspath(place))}"
        if not os.fspath(place):
            raise UserError("Malformed image spec 'folder:': expected folder:PATH, a folder.")
        self._root = Path(place).expanduser()
        if not self._root.is_dir():
            raise UserError(
                f"{self.spec!r}: expected an existing folder, found "
                f"{'a file' if self._root.exists() else 'nothing'} at "
                f"{str(self._root.absolute())!r}; "
                "give the folder that holds the images or their class folders."
            )
        listing = _list(self.spec, os.fspath(self._root))
        others = ", ".join(f"{number} {suffix}" for suffix, number in listing.others.most_common())
        if others and listing.names:
            warnings.warn(
                f"{self.spec!r}: left out pictures of kinds that are not read: {others}; convert "
                "them, to PNG for instance, if they belong to the images.",
                stacklevel=3,
            )
        if listing.left_out:
            examples = ", ".join(sorted(map(printable, listing.left_out))[:5])
            warnings.warn(
                f"{self.spec!r}: left out {len(listing.left_out)} hidden, system or looping "
                f"entries and what is in them: {examples}{', ...' * (len(listing.left_out) > 5)}.",
                stacklevel=3,
            )
        if not listing.names:
            raise UserError(
                f"{self.spec!r}: expected image files ({', '.join(IMAGE_SUFFIXES)}) under "
                f"{str(self._root.absolute())!r}, found none{others and f', but {others}'}; "
                f"{'convert them' if others else 'check the path'}."
            )
        self._names = listing.names
        classes = sorted({_first_level(folder) for folder in listing.folders} - {""})
        self._labels = {name: label for label, name in enumerate(classes)}
        self.class_names = tuple(map(printable, classes))
        self._refuse_ambiguous()

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return printable(self._names[index])

    def __getitem__(self, index: int) -> Example:
        # All of the file first: an error in decoding is then one of its content.
        with open(os.path.join(self._root, self._names[index]), "rb") as file:
            content = io.BytesIO(file.read())
        return Example(decode(content), self.label(index), self.name(index))

    def label(self, index: int) -> int:
        folder = self._names[index].rpartition("/")[0]
        return self._labels.get(_first_level(folder), -1)

    @functools.cached_property
    def content_hash(self) -> str:
        """16 hex digits over the names, sizes and bytes of all files, see `identity.hash_files`."""
        return hash_files(self._root, self._names)

    def fingerprints(self, indices: np.ndarray) -> list[bytes]:
        """Of the files' bytes, which are known once the `content_hash` is."""
        return [row.tobytes() for row in file_digests(self._root, self._names)[indices]]

    def _refuse_ambiguous(self) -> None:
        """Raises UserError where a name that is not UTF-8 is printed as another one is."""
        odd = [name for name in self._names if printable(name) != name]
        if not odd:
            return
        known = set(self._names)
        for name in odd:
            if printable(name) in known:
                raise UserError(
                    f"{self.spec!r}: two files are both shown as {printable(name)!r}, one of them "
                    "by a name that is not UTF-8; rename it."
                )


def printable(name: str) -> str:
    """A name of the file system as text that can be written anywhere: other bytes as `\\xff`."""
    if name.isascii():
        return name
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class _Listing(NamedTuple):
    """The image files of a folder in order, the folders that they lie in, what is left out; how
    many pictures of other kinds there are, by suffix."""

    names: list[str]
    folders: list[str]
    left_out: list[str]
    others: Counter[str]


def _list(spec: str, root: str) -> _Listing:
    """Lists the image files under a folder."""
    files_of: dict[str, list[str]] = {}
    left_out: list[str] = []
    others: Counter[str] = Counter()
    # Folders to list, with the places of those on the way to them and of themselves.
    pending: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(root),))]
    while pending:
        folder, above = pending.pop()
        prefix = f"{folder}/" if folder else ""
        path = os.path.join(root, folder)
        entries = retried(lambda path=path: list(os.scandir(path)), f"the folder {path!r}")
        files = []
        for entry in entries:
            name = entry.name
            is_image = name.lower().endswith(IMAGE_SUFFIXES)
            kind = _kind(spec, entry)
            if name.startswith(".") or name in SYSTEM_FOLDERS:
                if is_image or kind == "folder":
                    left_out.append(prefix + name)
            elif kind == "folder":
                is_link = entry.is_symlink()
                real = os.path.realpath(entry.path) if is_link else os.path.join(above[-1], name)
                if real in above:
                    left_out.append(prefix + name)
                else:
                    pending.append((prefix + name, (*above, real)))
            elif is_image and kind == "file":
                files.append(name)
            elif kind == "loop" or is_image:
                left_out.append(prefix + name)
            elif name.lower().endswith(OTHER_SUFFIXES):
                others[os.path.splitext(name)[1].lower()] += 1
        if files:
            files_of[folder] = sorted(files)
    folders = sorted(files_of, key=lambda folder: (_first_level(folder), folder))
    names = [
        f"{folder}/{file}" if folder else file for folder in folders for file in files_of[folder]
    ]
    return _Listing(names, folders, left_out, others)


def _kind(spec: str, entry: os.DirEntry[str]) -> str:
    """ "file" (also a link to nothing: its storage may be away), "folder", "loop" or "other"."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() or entry.is_symlink() else "other"
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return "loop"
        raise StorageError(
            f"{spec!r}: cannot look at {entry.path!r}: {error.strerror}; make it readable or take "
            "it out."
        ) from error


def _first_level(folder: str) -> str:
    """The first part of a folder's path, "" of the topmost one."""
    return folder.partition("/")[0]

"""Labels compared by name: the classes of some images, found among the classes of others.

Positions mean nothing across data sets: a folder with three of ten classes has labels 0, 1 and 2,
whatever the ten are called. Whoever compares two lists of classes does it here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from ur_jax.data.cached import CachedImages
from ur_jax.data.sources import ImageSource
from ur_jax.errors import UserError, unknown_name

ClassMap = Mapping[str, str] | Sequence[str]
"""Names that differ: {theirs: ours}, or "theirs=ours" each, as a command line has them."""


def check_classes(source: ImageSource, least: int = 2) -> None:
    """Raises UserError unless the images of a source have classes, at least so many."""
    if len(source.class_names) < least:
        many = f"at least {least} classes" if least > 1 else "a class or more"
        raise UserError(
            f"Expected labelled images of {many}, got {source.spec!r} with "
            f"{list(source.class_names)}; give a folder with a sub-folder per class, or a labelled "
            "data set."
        )


def check_labelled(source: ImageSource, indices: np.ndarray) -> None:
    """Raises UserError if an image has no label, naming the first one.

    A source whose labels come with its images is not asked, since it would read them all: of such
    a source, `labels_of` finds them where they are read.
    """
    origin = source.source if isinstance(source, CachedImages) else source
    if type(origin).label is ImageSource.label:
        return
    missing = [int(index) for index in indices if source.label(int(index)) < 0]
    if missing:
        raise _unlabelled(source, source.name(missing[0]), len(missing))


def labels_of(
    source: ImageSource, labels: np.ndarray, mask: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """Labels (B,) of a batch, 0 where `mask` is False.

    Raises:
      UserError: for an image without a label.
    """
    missing = np.flatnonzero(mask & (labels < 0))
    if missing.size:
        raise _unlabelled(source, names[int(missing[0])], len(missing))
    return np.where(mask, labels, 0)


def parse_map(class_map: ClassMap) -> dict[str, str]:
    """{theirs: ours} of names that differ.

    Raises:
      UserError: for a text that is not "theirs=ours", or a class that is mapped twice.
    """
    if isinstance(class_map, Mapping):
        return dict(class_map)
    found: dict[str, str] = {}
    for text in class_map:
        theirs, equals, ours = text.partition("=")
        if not (theirs and equals and ours):
            raise UserError(f"Expected a class map as THEIRS=OURS, got {text!r}.")
        if found.get(theirs, ours) != ours:
            raise UserError(
                f"Expected one class for {theirs!r}, got {found[theirs]!r} and {ours!r}."
            )
        found[theirs] = ours
    return found


def find_class(kind: str, name: str, known: Sequence[str]) -> int:
    """The position of a class by its name, whatever its case unless that tells two apart.

    Args:
      kind: what it is a class of, for the error: "class of the images".
      name: the name.
      known: all names.

    Raises:
      UserError: for an unknown name, or one that several classes have.
    """
    for same in (lambda other: other == name, lambda other: other.casefold() == name.casefold()):
        places = [place for place, other in enumerate(known) if same(other)]
        if len(places) > 1:
            raise UserError(
                f"Expected one {kind} called {name!r}, got {len(places)} of {len(known)}; rename "
                "them."
            )
        if places:
            return places[0]
    raise unknown_name(kind, name, known)


def match_classes(
    theirs: Sequence[str], ours: Sequence[str], class_map: ClassMap = (), *, kind: str = "class"
) -> np.ndarray:
    """Where each of their classes is among ours.

    Args:
      theirs: names of the images' labels 0, 1, ...
      ours: names of the classes that they are compared with, such as a probe's.
      class_map: names that differ, theirs to ours. Several of theirs may be one of ours.
      kind: what ours are, for errors: "class of the probe".

    Returns:
      (len(theirs),) int32: label of theirs -> label of ours.

    Raises:
      UserError: for a class that is not among ours, or a class map that names none of theirs.
    """
    renamed = parse_map(class_map)
    for name in renamed:
        if name not in theirs:
            raise unknown_name("class of the images in the class map", name, theirs)
    unknown = [name for name in theirs if not _is_known(renamed.get(name, name), ours)]
    if unknown:
        more = f" (and {len(unknown) - 1} more of {len(theirs)})" if len(unknown) > 1 else ""
        error = unknown_name(kind, renamed.get(unknown[0], unknown[0]), ours)
        raise UserError(
            f"The images have classes that are not there{more}. {error} Leave them out, or say "
            "which class is meant by a class map THEIRS=OURS."
        )
    places = [find_class(kind, renamed.get(name, name), ours) for name in theirs]
    return np.array(places, np.int32)


def match_probe(
    source: ImageSource, probe_classes: Sequence[str], num_classes: int, class_map: ClassMap = ()
) -> np.ndarray:
    """Where the classes of some images are among a probe's; (len(source.class_names),) int32.

    A probe that was saved without the names of its classes is compared by position, with a
    warning, if it has as many classes as the images.

    Args:
      source: labelled images.
      probe_classes: the names of the probe's classes; empty if they are not known.
      num_classes: how many the probe has.
      class_map: names that differ, the images' to the probe's.

    Raises:
      UserError: as `match_classes`; for another number of classes where no names are known.
    """
    if probe_classes:
        return match_classes(
            source.class_names, probe_classes, class_map, kind="class of the probe"
        )
    if len(source.class_names) != num_classes or class_map:
        raise UserError(
            f"The probe does not know the names of its {num_classes} classes, and the images have "
            f"{len(source.class_names)}, so labels cannot be compared; save it with its "
            "class_names (`probes.checkpoint.save_probe`)."
        )
    warnings.warn(
        f"The probe does not know the names of its {num_classes} classes: they are taken to be "
        f"those of {source.spec}, in that order.",
        stacklevel=2,
    )
    return np.arange(num_classes, dtype=np.int32)


def _is_known(name: str, ours: Sequence[str]) -> bool:
    """Whether a class is among ours, whatever its case."""
    return any(name.casefold() == other.casefold() for other in ours)


def _unlabelled(source: ImageSource, name: str, count: int) -> UserError:
    """The error for images without a label."""
    more = f" and {count - 1} others" if count > 1 else ""
    return UserError(
        f"Expected a label with every image of {source.spec!r}, got none with {name}{more}; put it "
        "in the sub-folder of its class, or leave it out."
    )

"""Classes compared by name: subsets, other orders, other cases, names that differ."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ur_jax import data
from ur_jax.data import labels
from ur_jax.data.sources import Example, ImageSource


class Listed(ImageSource):
    """Images of given labels; reading one is counted."""

    spec = "listed"

    def __init__(self, class_names, given):
        self.class_names, self.given, self.read = class_names, given, 0

    def __len__(self):
        return len(self.given)

    def name(self, index):
        return f"image {index}"

    def __getitem__(self, index):
        self.read += 1
        return Example(Image.new("RGB", (4, 4)), self.given[index], self.name(index))


@pytest.mark.parametrize(
    "theirs, class_map, expected",
    [
        (("cat", "dog", "truck"), (), [0, 2, 4]),
        (("truck", "Dog"), (), [4, 2]),
        (("kitty", "dog"), ("kitty=cat",), [0, 2]),
        (("n02123045", "n02123159"), ("n02123045=cat", "n02123159=cat"), [0, 0]),
        (("cat", "dog"), {"cat": "dog", "dog": "cat"}, [2, 0]),
        (("a=b", "cat"), {"a=b": "dog"}, [2, 0]),
        ((), (), []),
    ],
)
def test_classes_are_found_by_name(theirs, class_map, expected):
    ours = ("cat", "deer", "dog", "frog", "truck")
    found = labels.match_classes(theirs, ours, class_map)
    assert found.dtype == np.int32 and found.tolist() == expected


@pytest.mark.parametrize(
    "theirs, ours, class_map, message",
    [
        (("dg",), ("cat", "dog"), (), "Unknown class of the probe 'dg'; did you mean 'dog'"),
        (("x", "y", "dog"), ("cat", "dog"), (), "1 more of 3"),
        (("cat",), ("cat", "dog"), ("cta=dog",), "in the class map 'cta'; did you mean 'cat'"),
        (("cat",), ("cat", "dog"), ("cat=dgo",), "'dgo'; did you mean 'dog'"),
        (("cat",), ("cat", "dog"), ("cat",), "as THEIRS=OURS, got 'cat'"),
        (("cat",), ("cat", "dog"), ("cat=",), "as THEIRS=OURS, got 'cat='"),
        (("cat",), ("cat", "dog"), ("cat=dog", "cat=cat"), "one class for 'cat', got 'dog' and"),
        (("crane",), ("crane", "crane"), (), "one class of the probe called 'crane', got 2 of 2"),
        (("CAT",), ("cat", "Cat"), (), "one class of the probe called 'CAT', got 2 of 2"),
    ],
)
def test_what_cannot_be_told_is_refused(theirs, ours, class_map, message):
    with pytest.raises(ValueError, match=message):
        labels.match_classes(theirs, ours, class_map, kind="class of the probe")


def test_case_only_matters_where_it_tells_two_apart():
    assert labels.match_classes(("Cat", "cat"), ("cat", "Cat")).tolist() == [1, 0]


def test_a_probe_without_names_is_compared_by_position_in_words_or_not_at_all():
    source = Listed(("a", "b", "c"), [0, 1, 2])
    with pytest.warns(UserWarning, match="does not know the names of its 3 classes"):
        assert labels.match_probe(source, (), 3).tolist() == [0, 1, 2]
    for number, class_map in ((10, ()), (3, ("a=b",))):
        with pytest.raises(ValueError, match=f"names of its {number} classes, and.* have 3"):
            labels.match_probe(source, (), number, class_map)
    assert labels.match_probe(source, ("c", "b", "a"), 3).tolist() == [2, 1, 0]


def test_images_without_a_label_are_named(tmp_path):
    for name in ("a/0.png", "b/0.png", "0.png", "1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    folder = data.open_images(f"folder:{tmp_path}")
    with pytest.raises(ValueError, match="none with 0.png and 1 others"):
        labels.check_labelled(folder, np.arange(4))
    labels.check_labelled(folder, np.arange(2, 4))
    # Where a label is known by reading alone, nothing is read beforehand.
    slow = Listed(("a", "b"), [0, -1])
    labels.check_labelled(slow, np.arange(2))
    assert slow.read == 0
    mask, names = np.array([True, True]), ["image 0", "image 1"]
    with pytest.raises(ValueError, match="none with image 1;"):
        labels.labels_of(slow, np.array([0, -1]), mask, names)
    found = labels.labels_of(slow, np.array([1, -1]), np.array([True, False]), names)
    assert found.tolist() == [1, 0]
    with pytest.raises(ValueError, match="at least 2 classes, got 'listed' with .'a'"):
        labels.check_classes(Listed(("a",), [0]))

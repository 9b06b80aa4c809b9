"""What a data set is: labelled images, and an entry of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from disinhib.checks import COUNT, FLAG, OPTIONAL_TEXT, SEED, SHARE, TEXT, Option
from disinhib.errors import InputError

FILE = (TEXT[0], "a file: dataset.path=FILE")


class DataError(InputError):
    """A data set that cannot be had; the message is one line: what, given, what to do."""


class Split(NamedTuple):
    """Images and their labels; both arrays are read-only."""

    images: np.ndarray  # uint8 or float32 [n, features], flattened
    labels: np.ndarray  # int32 [n], in 0 .. classes - 1


def split(images: np.ndarray, labels: np.ndarray) -> Split:
    """Images `[n, ...]` of whole numbers from 0 to 255 and labels `[n]` as a Split. (Of other
    numbers, `arrays.loaded` makes a whole data set.)"""
    result = Split(images.reshape(len(images), -1).astype(np.uint8), labels.astype(np.int32))
    for array in result:
        array.setflags(write=False)
    return result


class Loaded(NamedTuple):
    """What a data set's `load` gives. (A pair of the first two will do.)"""

    training: Split  # in the order of the file
    test: Split
    validation: Split | None = None  # None: it is cut from the training file
    scale: float | None = None  # images * scale lies in [0, 1]; None: the entry says `brightest`
    classes: int | None = None  # None: the entry says it
    words: str = ""  # what was done to it, in one line, if a user must know


@dataclass(frozen=True)
class Dataset:
    """An entry of DATASETS.

    `load(path)` gives a Loaded, or the training file, in its order, and the test set; `path` is the
    option `dataset.path`. It raises DataError for whatever is wrong with them. Without `features`
    and `classes`, these are what is found in the file at `path`, which must then be given.
    """

    load: Callable[[str | None], Loaded | tuple[Split, Split]]
    features: int | None = None  # of an image, flattened
    classes: int | None = None
    brightest: int = 255  # the stored value that stands for 1
    words: str = ""
    valid_split: float = 0.1  # published

    @property
    def options(self) -> tuple[Option, ...]:
        """Of the group `dataset`, with this data set's defaults."""
        path = Option("path", None, OPTIONAL_TEXT, "where its files are; null: see `load`")
        return (
            path if self.features else path._replace(check=FILE),
            Option("dim_input", self.features, COUNT, "values of an image, flattened"),
            Option("dim_output", self.classes, COUNT, "classes"),
            Option("valid_split", self.valid_split, SHARE, "share of the training file, held out"),
            Option("valid_seed", None, SEED, "draws that share; null: it is the file's first"),
            Option("OL_eval_subset_split", 0.1, SHARE, "share that OL_eval_on_train evaluates"),
            Option("soft_targets", True, FLAG, "else one-hot targets"),
            Option("soft_target_val", 0.99, SHARE, "a soft target's value on the right class"),
        )

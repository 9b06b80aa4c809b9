"""What a data set is: labelled images, and an entry of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from disinhib.checks import COUNT, FLAG, OPTIONAL_TEXT, SHARE, Option
from disinhib.errors import InputError


class DataError(InputError):
    """A data set that cannot be had; the message is one line: what, given, what to do."""


class Split(NamedTuple):
    """Images and their labels; both arrays are read-only."""

    images: np.ndarray  # uint8 [n, features], flattened
    labels: np.ndarray  # int32 [n], in 0 .. classes - 1


def split(images: np.ndarray, labels: np.ndarray) -> Split:
    """Images `[n, ...]` of numbers from 0 to 255 and labels `[n]` as a Split."""
    result = Split(images.reshape(len(images), -1).astype(np.uint8), labels.astype(np.int32))
    for array in result:
        array.setflags(write=False)
    return result


@dataclass(frozen=True)
class Dataset:
    """An entry of DATASETS.

    `load(path)` gives the training file, in its order, and the test set; `path` is the option
    `dataset.path`. It raises DataError for whatever is wrong with them.
    """

    load: Callable[[str | None], tuple[Split, Split]]
    features: int  # of an image, flattened
    classes: int
    brightest: int  # the stored value that stands for 1
    words: str
    valid_split: float = 0.1  # published

    @property
    def options(self) -> tuple[Option, ...]:
        """Of the group `dataset`, with this data set's defaults."""
        return (
            Option("path", None, OPTIONAL_TEXT, "a folder that holds its files; null: see `load`"),
            Option("dim_input", self.features, COUNT, "values of an image, flattened"),
            Option("dim_output", self.classes, COUNT, "classes"),
            Option(
                "valid_split", self.valid_split, SHARE, "first share of the training file, held out"
            ),
            Option("OL_eval_subset_split", 0.1, SHARE, "share that OL_eval_on_train evaluates"),
            Option("soft_targets", True, FLAG, "else one-hot targets"),
            Option("soft_target_val", 0.99, SHARE, "a soft target's value on the right class"),
        )

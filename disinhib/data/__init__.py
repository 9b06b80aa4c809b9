"""Labelled images as splits that cannot overlap.

A new data set is a file here and its entry in DATASETS.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from disinhib.data.arrays import ARRAYS
from disinhib.data.base import DataError, Dataset, Loaded, Split
from disinhib.data.digits import DIGITS
from disinhib.data.grey import CIFAR10, SVHN
from disinhib.data.idx import FASHION_MNIST, KMNIST, MNIST
from disinhib.errors import nearest

__all__ = [
    "DATASETS",
    "DataError",
    "Dataset",
    "Loaded",
    "Split",
    "Splits",
    "load",
    "sizes",
    "version",
    "words",
]


class Splits(NamedTuple):
    """The three disjoint parts of a data set, and how to read them."""

    train: Split
    validation: Split
    test: Split
    scale: float  # images * scale lies in [0, 1]
    classes: int
    words: str  # what was done to the data, and where validation comes from, if a user must know


DATASETS: dict[str, Dataset] = {
    "digits": DIGITS,
    "mnist": MNIST,
    "fmnist": FASHION_MNIST,
    "kmnist": KMNIST,
    "svhn-grey": SVHN,
    "cifar10-grey": CIFAR10,
    "arrays": ARRAYS,
}


def sizes(name: str, path: str) -> tuple[int, int]:
    """(inputs, classes) of a data set whose entry does not say them. Raises DataError."""
    found = _loaded(name, path)
    assert found.classes is not None
    return found.training.images.shape[1], found.classes


def words(name: str, path: str | None) -> str:
    """What was done to a data set whose numbers are the user's own, in one line; else nothing."""
    return "" if DATASETS[name].features else _loaded(name, path).words


def version(path: str | None) -> tuple[int, int] | None:
    """Of a file, what changes with its content: for whoever keeps what was loaded. (Of a folder
    None: the files in it are known by their SHA-256.)"""
    file = Path(os.path.expanduser(path)) if path is not None else None
    if file is None or not file.is_file():
        return None
    status = file.stat()
    return status.st_mtime_ns, status.st_size


def _loaded(name: str, path: str | None) -> Loaded:
    found = DATASETS[name].load(path)
    return found if isinstance(found, Loaded) else Loaded(*found)


def load(
    name: str, path: str | None = None, valid_split: float = 0.1, valid_seed: int | None = None
) -> Splits:
    """The data set `name` of DATASETS as train, validation and test.

    Validation is the first int(valid_split * n) images of the training file, or as many drawn by
    `valid_seed`, and train is the rest, so the two are disjoint. (The published code takes tfds'
    train[:10%]: the same share, of a file that tfds has shuffled.) A file may have a validation set
    of its own. `path` is the entry's: of IDX files, the folder that holds them.

    Raises:
        DataError: unknown name, valid_split outside (0, 1) or too small for one image, a valid_seed
            where validation is the file's own, and what the entry's `load` raises: a `path` that
            lacks the files, a damaged file, no mirror that answers.
    """
    if name not in DATASETS:
        hint = nearest(str(name).lower(), DATASETS)
        raise DataError(f"dataset must be one of {', '.join(DATASETS)} (got {name!r}){hint}")
    if not 0 < valid_split < 1:
        raise DataError(f"dataset.valid_split must lie inside (0, 1) (got {valid_split!r})")
    dataset, loaded = DATASETS[name], _loaded(name, path)
    training, own, scale = loaded.training, loaded.validation, loaded.scale
    scale = 1 / dataset.brightest if scale is None else scale
    classes = dataset.classes if loaded.classes is None else loaded.classes
    assert classes is not None
    if own is not None:
        if valid_seed is not None:
            raise DataError(
                "dataset.valid_seed must be null, and repeat_splits of a study false, where"
                f" validation is the data set's own (got {valid_seed})"
            )
        words = loaded.words or "validation is the data set's own"
        return Splits(training, own, loaded.test, scale, classes, words)
    held_out = int(valid_split * len(training.labels))
    if held_out == 0:  # the other side cannot be empty, valid_split being less than 1
        raise DataError(
            f"dataset.valid_split must hold out at least one of the {len(training.labels)} images"
            f" (got {valid_split!r})"
        )
    if valid_seed is not None:
        order = np.random.default_rng(valid_seed).permutation(len(training.labels))
        training = Split(*(array[order] for array in training))
        for array in training:
            array.setflags(write=False)
    drawn = [] if valid_seed is None else [f"validation is drawn by the seed {valid_seed}"]
    return Splits(
        train=Split(*(array[held_out:] for array in training)),
        validation=Split(*(array[:held_out] for array in training)),
        test=loaded.test,
        scale=scale,
        classes=classes,
        words="; ".join([*filter(None, [loaded.words]), *drawn]),
    )

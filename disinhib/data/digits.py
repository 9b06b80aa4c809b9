"""The test part of the UCI Optical Recognition of Handwritten Digits, as scikit-learn ships it."""

from __future__ import annotations

import numpy as np

from disinhib.data.base import DataError, Dataset, Split, split

TEST = 360  # the last images are the test set


def load(path: str | None) -> tuple[Split, Split]:
    if path is not None:
        raise DataError(f"dataset.path must be null for digits, which is built in (got {path!r})")
    from sklearn.datasets import load_digits  # here, because it takes seconds to import

    images, labels = map(np.asarray, load_digits(return_X_y=True))
    n = len(labels) - TEST
    return split(images[:n], labels[:n]), split(images[n:], labels[n:])


DIGITS = Dataset(
    load,
    features=8 * 8,
    classes=10,
    brightest=16,
    words="scikit-learn's 8x8 digits, built in: 1437 training-file and 360 test images",
    valid_split=0.2,
)

"""Colour images, in grey: SVHN's cropped digits and CIFAR-10, from the files of their authors.

SVHN: Netzer, Wang, Coates, Bissacco, Wu & Ng 2011. CIFAR-10: Krizhevsky 2009. Their files are
looked for as those of `idx`, but are too large to be downloaded unasked. CIFAR-10 is its binary
version: the one for Python is a pickle, which runs code when it is read.

The SHA-256 of the files are those that TensorFlow Datasets checks its downloads by
(url_checksums/svhn_cropped.txt and cifar10.txt there).
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from disinhib.data.base import DataError, Dataset, Split, split
from disinhib.data.idx import SYSTEM, cache

# Of red, green and blue, in thousandths: the luma of ITU-R BT.601, as most libraries make grey.
LUMA = np.array([299, 587, 114], np.uint32)
SIDE = 32  # pixels


@dataclass(frozen=True)
class Files:
    """The load of a data set: `read` of its files' contents, known by their SHA-256.

    They lie in `path` if it is given, else in $DISINHIB_DATA, the user cache or
    /usr/share/datasets; in each of these, or in its folder `folder`.
    """

    folder: str
    sha256: Mapping[str, str]
    source: str  # where their authors have put them
    read: Callable[[Mapping[str, bytes]], tuple[Split, Split]]

    def __call__(self, path: str | None) -> tuple[Split, Split]:
        return self.read({file: self._content(file, path) for file in self.sha256})

    def _content(self, file: str, path: str | None) -> bytes:
        own = os.environ.get("DISINHIB_DATA")
        places = [path] if path else [*([own] if own else []), cache(), SYSTEM]
        roots = [Path(os.path.expanduser(place)) for place in places]
        found = [root / name / file for root in roots for name in ("", self.folder)]
        there = next((place for place in found if place.is_file()), None)
        if there is None:
            searched = ", ".join(map(str, roots))
            raise DataError(
                f"dataset.path: {file} lies in none of {searched}, nor in {self.folder}/ there:"
                f" download it from {self.source} and give its folder"
            )
        try:
            content = there.read_bytes()
        except OSError as error:
            raise DataError(f"{there} cannot be read ({error.strerror})") from error
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 != self.sha256[file]:
            expected = f"has the SHA-256 {sha256}, expected {self.sha256[file]}"
            raise DataError(f"{there} {expected}: download it from {self.source} again")
        return content


def grey(colours: np.ndarray) -> np.ndarray:
    """Images `[n, 3, ...]` of uint8 in grey, `[n, ...]`."""
    weighed = np.einsum("c,nc...->n...", LUMA, colours, dtype=np.uint32)
    return ((weighed + 500) // 1000).astype(np.uint8)


def _svhn(contents: Mapping[str, bytes]) -> tuple[Split, Split]:
    """Of MATLAB files with X `[row, column, colour, n]` and y `[n, 1]`, where 10 is the digit 0."""
    from scipy.io import loadmat  # here, because the core also trains without it

    parts = []
    for content in contents.values():
        arrays = loadmat(io.BytesIO(content), variable_names=("X", "y"))
        parts.append(split(grey(np.transpose(arrays["X"], (3, 2, 0, 1))), arrays["y"][:, 0] % 10))
    train, test = parts
    return train, test


def _cifar10(contents: Mapping[str, bytes]) -> tuple[Split, Split]:
    """Of an archive whose files are images, each a byte for its class, then its red, its green and
    its blue pixels."""
    (content,) = contents.values()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        files = {Path(member.name).name: member for member in archive if member.isfile()}
        read = lambda name: archive.extractfile(files[name]).read()  # pyright: ignore
        training = b"".join(read(f"data_batch_{i}.bin") for i in range(1, 6))
        test = read("test_batch.bin")
    images = lambda part: np.frombuffer(part, np.uint8).reshape(-1, 1 + 3 * SIDE**2)
    as_split = lambda rows: split(grey(rows[:, 1:].reshape(-1, 3, SIDE**2)), rows[:, 0])
    return as_split(images(training)), as_split(images(test))


SVHN = Dataset(
    load=Files(
        "svhn",
        {
            "train_32x32.mat": "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
            "test_32x32.mat": "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        },
        "http://ufldl.stanford.edu/housenumbers",
        _svhn,
    ),
    features=SIDE**2,
    classes=10,
    brightest=255,
    words="SVHN's cropped digits in grey: 73257 training-file and 26032 test images of 32x32",
)
CIFAR10 = Dataset(
    load=Files(
        "cifar10",
        {
            "cifar-10-binary.tar.gz": (
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
            )
        },
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        _cifar10,
    ),
    features=SIDE**2,
    classes=10,
    brightest=255,
    words="CIFAR-10 in grey: 50000 training-file and 10000 test images of 32x32",
)

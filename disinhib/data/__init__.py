"""Labelled images as splits that cannot overlap: digits (built in), MNIST, Fashion-MNIST.

Sources: digits, the test part of the UCI Optical Recognition of Handwritten Digits, as scikit-learn
ships it; MNIST (LeCun, Bottou, Bengio & Haffner 1998); Fashion-MNIST (Xiao, Rasul & Vollgraf 2017,
arXiv:1708.07747).
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch

from disinhib.errors import InputError, nearest

log = logging.getLogger(__name__)

# The four files of an IDX data set; each may also carry the suffix .gz.
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
SYSTEM = Path("/usr/share/datasets")  # where Debian's packages dataset-* put theirs
DIGITS_TEST = 360  # the last images of digits are its test set


class DataError(InputError):
    """A data set that cannot be had; the message is one line: what, given, what to do."""


class Split(NamedTuple):
    """Images and their labels; both arrays are read-only."""

    images: np.ndarray  # uint8 [n, features], flattened
    labels: np.ndarray  # int32 [n], in 0 .. classes - 1


class Splits(NamedTuple):
    """The three disjoint parts of a data set, and how to read them."""

    train: Split
    validation: Split
    test: Split
    scale: float  # images * scale lies in [0, 1]
    classes: int


@dataclass(frozen=True)
class Dataset:
    """What the table knows of a data set."""

    folder: str  # canonical name, also of its sub-folder wherever files are looked for
    brightest: int  # the stored value that stands for 1
    sha256: tuple[str, ...] = ()  # of FILES, decompressed; none for a built-in data set
    mirrors: tuple[str, ...] = ()  # tried in this order
    classes: int = 10


DATASETS = {
    "digits": Dataset("digits", brightest=16),
    "mnist": Dataset(
        "mnist",
        brightest=255,
        sha256=(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        mirrors=(
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
    ),
    "fmnist": Dataset(
        "fashion-mnist",
        brightest=255,
        sha256=(
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
        mirrors=(
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ),
    ),
}


def load(name: str, path: str | None = None, valid_split: float = 0.1) -> Splits:
    """The data set `name` of DATASETS as train, validation and test.

    Validation is the first int(valid_split * n) images of the training file and train is the rest,
    so the two are disjoint. (The published code takes tfds' train[:10%]: the same share, of a file
    that tfds has shuffled.) IDX files are looked for in `path` and nowhere else if it is given,
    else in $DISINHIB_DATA, the user cache and /usr/share/datasets, and then downloaded into the
    cache; `path` and $DISINHIB_DATA may hold the files or a sub-folder of the canonical name.

    Raises:
        DataError: unknown name, valid_split outside (0, 1) or too small for one image, a `path`
            that lacks the files, a damaged file, or no mirror that answers.
    """
    if name not in DATASETS:
        hint = nearest(str(name).lower(), DATASETS)
        raise DataError(f"dataset must be one of {', '.join(DATASETS)} (got {name!r}){hint}")
    if not 0 < valid_split < 1:
        raise DataError(f"dataset.valid_split must lie inside (0, 1) (got {valid_split!r})")
    dataset = DATASETS[name]
    if dataset.sha256:
        training, test = _idx_files(dataset, path)
    elif path is None:
        training, test = _digits()
    else:
        raise DataError(f"dataset.path must be null for {name}, which is built in (got {path!r})")
    held_out = int(valid_split * len(training.labels))
    if held_out == 0:  # the other side cannot be empty, valid_split being less than 1
        raise DataError(
            f"dataset.valid_split must hold out at least one of the {len(training.labels)} images"
            f" (got {valid_split!r})"
        )
    return Splits(
        train=Split(*(array[held_out:] for array in training)),
        validation=Split(*(array[:held_out] for array in training)),
        test=test,
        scale=1 / dataset.brightest,
        classes=dataset.classes,
    )


def parse_idx(content: bytes, ndim: int, source: str = "content") -> np.ndarray:
    """The uint8 array, read-only and with `ndim` axes, of a decompressed IDX file.

    Format: two zero bytes, the type (8 for uint8), the number of axes, each axis' length as a
    big-endian uint32, then the values in C order and nothing after them.

    Raises:
        DataError: another type or number of axes, or too few or too many bytes; names `source`.
    """
    start = 4 + 4 * ndim
    if content[:4] != bytes((0, 0, 8, ndim)) or len(content) < start:
        raise DataError(
            f"{source} must begin with the {start} bytes of an IDX header for uint8 with {ndim}"
            f" axes, 000008{ndim:02x}... (got {content[:start].hex() or 'nothing'})"
        )
    shape = struct.unpack_from(f">{ndim}I", content, 4)
    if len(content) - start != math.prod(shape):
        raise DataError(
            f"{source} must hold {math.prod(shape)} values for its IDX shape {shape}"
            f" (got {len(content) - start})"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    split = Split(images.reshape(len(images), -1).astype(np.uint8), labels.astype(np.int32))
    for array in split:
        array.setflags(write=False)
    return split


def _digits() -> tuple[Split, Split]:
    from sklearn.datasets import load_digits  # here, because it takes seconds to import

    images, labels = map(np.asarray, load_digits(return_X_y=True))
    n = len(labels) - DIGITS_TEST
    return _split(images[:n], labels[:n]), _split(images[n:], labels[n:])


def _idx_files(dataset: Dataset, path: str | None) -> tuple[Split, Split]:
    train_images, train_labels, test_images, test_labels = (
        parse_idx(_content(dataset, file, sha256, path), 3 if "images" in file else 1, file)
        for file, sha256 in zip(FILES, dataset.sha256, strict=True)
    )
    return _split(train_images, train_labels), _split(test_images, test_labels)


def _content(dataset: Dataset, file: str, sha256: str, path: str | None) -> bytes:
    """Decompressed bytes of the first such file on the search path, else of its download."""
    places = _places(dataset, path)
    for candidate in (place / f"{file}{suffix}" for place in places for suffix in ("", ".gz")):
        if os.path.isfile(candidate):  # unlike Path.is_file, False in a folder we may not enter
            return _read(candidate, sha256)
    if path is not None:
        raise DataError(
            f"dataset.path must hold {file} or {file}.gz, itself or in {dataset.folder}/ (got"
            f" {path!r}); leave it null to search $DISINHIB_DATA and the cache and to download"
        )
    return _download(dataset, file, sha256)


def _places(dataset: Dataset, path: str | None) -> list[Path]:
    root = os.environ.get("DISINHIB_DATA") if path is None else path
    # The sub-folder first: the files of both data sets have the same names.
    given = [Path(root, dataset.folder).expanduser(), Path(root).expanduser()] if root else []
    return given if path is not None else [*given, _cache(dataset), SYSTEM / dataset.folder]


def _cache(dataset: Dataset) -> Path:
    return Path(pooch.os_cache("disinhib"), dataset.folder)


def _read(file: Path, sha256: str) -> bytes:
    """Decompressed bytes of a file, gzipped or not, whatever its name says."""
    try:
        stored = file.read_bytes()
        content = gzip.decompress(stored) if stored.startswith(b"\x1f\x8b") else stored
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read ({error}): replace or remove it") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        owner = next((f" (that is {n}'s)" for n, d in DATASETS.items() if found in d.sha256), "")
        raise DataError(
            f"{file} has the SHA-256 {found}{owner} when decompressed, expected {sha256}:"
            " replace or remove it"
        )
    return content


def _download(dataset: Dataset, file: str, sha256: str) -> bytes:
    """Decompressed bytes of the first mirror's file that has this hash, kept in the user cache."""
    from filelock import FileLock

    from disinhib.data.download import BROKEN, fetch

    folder = _cache(dataset)
    target, reasons = folder / f"{file}.gz", []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{file}.lock"):  # the trials of a study may start all at once
            if target.exists():
                return _read(target, sha256)
            for mirror in dataset.mirrors:
                # A part is one mirror's own: another may have compressed differently.
                part = folder / f"{file}.{hashlib.sha256(mirror.encode()).hexdigest()[:8]}.part"
                try:
                    fetch(f"{mirror}{file}.gz", part)
                    content = _read(part, sha256)
                except DataError as error:
                    log.warning("%s%s.gz: %s", mirror, file, error)
                    part.unlink(missing_ok=True)
                    reasons.append(f"{mirror}: wrong content")
                except BROKEN as error:
                    log.warning("%s%s.gz: %s", mirror, file, error)
                    status = getattr(getattr(error, "response", None), "status_code", "")
                    reasons.append(f"{mirror}: {type(error).__name__} {status}".rstrip())
                else:
                    part.replace(target)
                    return content
    except OSError as error:
        raise DataError(f"{folder} cannot be written ({error}): set dataset.path") from error
    raise DataError(
        f"{file}.gz was found nowhere and could not be downloaded ({'; '.join(reasons)}): put the"
        f" files of {dataset.folder} into {folder}, or set dataset.path or $DISINHIB_DATA"
    )

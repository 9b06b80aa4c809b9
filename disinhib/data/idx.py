"""Data sets of four IDX files, as MNIST's: found on this machine, else downloaded, and verified.

MNIST: LeCun, Bottou, Bengio & Haffner 1998. Fashion-MNIST: Xiao, Rasul & Vollgraf 2017
(arXiv:1708.07747).
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import math
import os
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pooch

from disinhib.data.base import DataError, Dataset, Split, split

log = logging.getLogger(__name__)

# Each may also carry the suffix .gz.
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
SYSTEM = Path("/usr/share/datasets")  # where Debian's packages dataset-* put theirs

_OWNERS: dict[str, str] = {}  # of which data set a hash is


@dataclass(frozen=True)
class IdxFiles:
    """The load of a data set: FILES, known by their hashes.

    They are looked for in `path` and nowhere else if it is given, else in $DISINHIB_DATA, the user
    cache and /usr/share/datasets, and then downloaded into the cache; `path` and $DISINHIB_DATA may
    hold the files or a sub-folder of the canonical name.

    Raises ValueError without a SHA-256 of each file: no file would be known to be the right one.
    """

    folder: str  # canonical name, also of its sub-folder wherever files are looked for
    sha256: tuple[str, ...]  # of FILES, decompressed
    mirrors: tuple[str, ...] = ()  # tried in this order

    def __post_init__(self) -> None:
        if len(self.sha256) != len(FILES) or not all(
            re.fullmatch("[0-9a-f]{64}", digest) for digest in self.sha256
        ):
            raise ValueError(
                f"{self.folder}: needs the SHA-256 of each of {', '.join(FILES)}, got {self.sha256}"
            )
        _OWNERS.update(dict.fromkeys(self.sha256, self.folder))

    def __call__(self, path: str | None) -> tuple[Split, Split]:
        train_images, train_labels, test_images, test_labels = (
            parse_idx(_content(self, file, sha256, path), 3 if "images" in file else 1, file)
            for file, sha256 in zip(FILES, self.sha256, strict=True)
        )
        return split(train_images, train_labels), split(test_images, test_labels)


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


def _content(files: IdxFiles, file: str, sha256: str, path: str | None) -> bytes:
    """Decompressed bytes of the first such file on the search path, else of its download."""
    places = _places(files, path)
    for candidate in (place / f"{file}{suffix}" for place in places for suffix in ("", ".gz")):
        if os.path.isfile(candidate):  # unlike Path.is_file, False in a folder we may not enter
            return _read(candidate, sha256)
    if path is not None:
        raise DataError(
            f"dataset.path must hold {file} or {file}.gz, itself or in {files.folder}/ (got"
            f" {path!r}); leave it null to search $DISINHIB_DATA and the cache and to download"
        )
    return _download(files, file, sha256)


def _places(files: IdxFiles, path: str | None) -> list[Path]:
    root = os.environ.get("DISINHIB_DATA") if path is None else path
    # The sub-folder first: the files of both data sets have the same names.
    given = [Path(root, files.folder).expanduser(), Path(root).expanduser()] if root else []
    return given if path is not None else [*given, _cache(files), SYSTEM / files.folder]


def _cache(files: IdxFiles) -> Path:
    return Path(pooch.os_cache("disinhib"), files.folder)


def _read(file: Path, sha256: str) -> bytes:
    """Decompressed bytes of a file, gzipped or not, whatever its name says."""
    try:
        stored = file.read_bytes()
        content = gzip.decompress(stored) if stored.startswith(b"\x1f\x8b") else stored
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read ({error}): replace or remove it") from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        owner = f" (that is {_OWNERS[found]}'s)" if found in _OWNERS else ""
        raise DataError(
            f"{file} has the SHA-256 {found}{owner} when decompressed, expected {sha256}:"
            " replace or remove it"
        )
    return content


def _download(files: IdxFiles, file: str, sha256: str) -> bytes:
    """Decompressed bytes of the first mirror's file that has this hash, kept in the user cache."""
    from filelock import FileLock

    from disinhib.data.download import BROKEN, fetch

    folder = _cache(files)
    target, reasons = folder / f"{file}.gz", []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{file}.lock"):  # the trials of a study may start all at once
            if target.exists():
                return _read(target, sha256)
            for mirror in files.mirrors:
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
        f" files of {files.folder} into {folder}, or set dataset.path or $DISINHIB_DATA"
    )


MNIST = Dataset(
    load=IdxFiles(
        "mnist",
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
    features=28 * 28,
    classes=10,
    brightest=255,
    words="MNIST: 60000 training-file and 10000 test images of 28x28",
)
FASHION_MNIST = Dataset(
    load=IdxFiles(
        "fashion-mnist",
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
    features=28 * 28,
    classes=10,
    brightest=255,
    words="Fashion-MNIST: 60000 training-file and 10000 test images of 28x28",
)

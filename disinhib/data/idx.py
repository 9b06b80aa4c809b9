"""Data sets of four IDX files, as MNIST's: found on this machine, else downloaded, and verified.

MNIST: LeCun, Bottou, Bengio & Haffner 1998. Fashion-MNIST: Xiao, Rasul & Vollgraf 2017
(arXiv:1708.07747). Kuzushiji-MNIST: Clanuwat et al. 2018 (arXiv:1812.01718).
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import math
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from disinhib.data.base import DataError, Dataset, Split, split

log = logging.getLogger(__name__)

# The four files as their authors, torchvision and Debian call them, and as Kaggle does. Each may
# have one of ENDINGS, and may lie in a folder that has one of its names (`_candidates`).
NAMES = {
    "train-images-idx3-ubyte": "train-images.idx3-ubyte",
    "train-labels-idx1-ubyte": "train-labels.idx1-ubyte",
    "t10k-images-idx3-ubyte": "t10k-images.idx3-ubyte",
    "t10k-labels-idx1-ubyte": "t10k-labels.idx1-ubyte",
}
ENDINGS = ("", ".gz", ".GZ")
FILES = tuple(NAMES)
SYSTEM = Path("/usr/share/datasets")  # where Debian's packages dataset-* put theirs

ARCHIVE = re.compile(r"\.(zip|7z|rar|tgz|tar(\.\w+)?)$", re.IGNORECASE)
ALIKE = re.compile("mnist|ubyte|idx|train|t10k", re.IGNORECASE)  # names that a message gives first

_OWNERS: dict[str, tuple[str, str]] = {}  # of which data set and file a hash is


class AnotherSets(DataError):
    """A file with the right name that is another data set's."""


@dataclass(frozen=True)
class IdxFiles:
    """The load of a data set: FILES, known by their hashes.

    They are looked for in `path` and nowhere else if it is given, else in $DISINHIB_DATA, the user
    cache and /usr/share/datasets, and then downloaded into the cache. In each of these places, of
    the files with a right name (NAMES) in a right folder (`folders`), the first with the right hash
    is taken. A place where all are wrong is refused; but unless it is `path`, another data set's
    files are passed over.

    Raises ValueError without a SHA-256 of each file: no file would be known to be the right one.
    """

    folder: str  # canonical name, also of its sub-folder wherever files are looked for
    sha256: tuple[str, ...]  # of FILES, decompressed, or as they are published
    mirrors: tuple[str, ...] = ()  # tried in this order
    others: tuple[str, ...] = ()  # further names of its sub-folder

    def __post_init__(self) -> None:
        if len(self.sha256) != len(FILES) or not all(
            re.fullmatch("[0-9a-f]{64}", digest) for digest in self.sha256
        ):
            raise ValueError(
                f"{self.folder}: needs the SHA-256 of each of {', '.join(FILES)}, got {self.sha256}"
            )
        for file, digest in zip(FILES, self.sha256, strict=True):
            _OWNERS[digest] = self.folder, file

    @property
    def folders(self) -> tuple[str, ...]:
        """Where the files may lie in a place, its own sub-folders first: `raw` is torchvision's."""
        return (self.folder, *self.others, "", "raw")

    def __call__(self, path: str | None) -> tuple[Split, Split]:
        train_images, train_labels, test_images, test_labels = (
            parse_idx(content, 3 if "images" in file else 1, file)
            for file, content in zip(FILES, _contents(self, path), strict=True)
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


def _contents(files: IdxFiles, path: str | None) -> list[bytes]:
    """Decompressed bytes of each of FILES, found on this machine or downloaded."""
    places = _places(files, path)
    # Whoever has no permission to enter the cache (in a container, say) can do without it.
    searched = [place for place in places if os.access(place, os.X_OK)]
    contents = [
        _found(files, searched, file, sha256, alone=path is not None)
        for file, sha256 in zip(FILES, files.sha256, strict=True)
    ]
    missing = [file for file, content in zip(FILES, contents, strict=True) if content is None]
    if missing and path is not None:
        words = "all four files" if len(missing) == len(FILES) else ", ".join(missing)
        problem = f"missing {words}; {_listing(files, places[0])}"
        raise _refusal(files, "dataset.path", path, problem)
    return [
        _download(files, file, sha256, places) if content is None else content
        for file, sha256, content in zip(FILES, files.sha256, contents, strict=True)
    ]


def _places(files: IdxFiles, path: str | None) -> list[Path]:
    """The folders to search, in this order."""
    if path is not None:
        return [_given(files, "dataset.path", path)]
    root = os.environ.get("DISINHIB_DATA")
    given = [_given(files, "$DISINHIB_DATA", root)] if root else []
    return [*given, cache(), SYSTEM]


def cache() -> Path:
    import pooch  # here, because the core also trains without files

    return Path(pooch.os_cache("disinhib"))


def _given(files: IdxFiles, option: str, given: str) -> Path:
    """The folder that `option` names. Raises DataError if there is none or it cannot be entered."""
    folder = os.path.expanduser(given)  # unlike Path's, leaves ~nobody as it is
    try:
        mode = os.stat(folder).st_mode
    except (OSError, ValueError) as error:  # ValueError: a null byte
        problem = _reason(folder, error)
    else:
        if stat.S_ISDIR(mode) and os.access(folder, os.X_OK):
            return Path(folder)
        if stat.S_ISDIR(mode):
            problem = "which may not be entered (no permission)"
        elif ARCHIVE.search(folder):
            problem = "which is an archive: unpack it"
        else:
            problem = f"which is a file: give its folder, {_text(Path(folder).parent)}"
    raise _refusal(files, option, given, problem)


def _refusal(files: IdxFiles, option: str, given: str, problem: str) -> DataError:
    before = "" if option == "$DISINHIB_DATA" else "$DISINHIB_DATA, "
    folders = ", ".join(f"{folder}/" for folder in files.folders if folder)
    return DataError(
        f"{option}: given {given!r}, {problem}; allowed is a folder that holds {', '.join(FILES)}"
        f" of {files.folder} (plain or .gz, Kaggle's names too), itself or in {folders}; without"
        f" it, {before}{_text(cache())} and {SYSTEM} are searched, then the mirrors"
    )


def _listing(files: IdxFiles, place: Path) -> str:
    """The first few names in a place and in the data set's folders there; what to unpack."""
    names = []
    for folder in files.folders:
        try:
            entries = [entry for entry in (place / folder).iterdir() if entry.name[0] != "."]
        except PermissionError:
            names.append(f"{folder or '.'}/ (no permission to list it)")
        except OSError:
            continue
        else:
            names += [_text(entry.relative_to(place)) + _kind(entry) for entry in entries]
    names.sort(key=lambda name: (not ALIKE.search(name), not ARCHIVE.search(name), name))
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    archives = [f"; unpack {name} if it holds them" for name in names if ARCHIVE.search(name)]
    return f"found {', '.join(names[:5]) or 'nothing'}{more}{''.join(archives[:1])}"


def _kind(entry: Path) -> str:
    return "/" if os.path.isdir(entry) else "" if os.path.exists(entry) else " (a dangling link)"


def _found(
    files: IdxFiles, places: Sequence[Path], file: str, sha256: str, alone: bool
) -> bytes | None:
    """Decompressed bytes of `file` from the first of `places` that has it, or None.

    Raises DataError for a place with such a file but no right one; if all are another data set's,
    only if the place stands `alone`.
    """
    for place in places:
        wrong: list[DataError] = []
        for candidate in filter(_exists, _candidates(files, place, file)):
            try:
                content = _read(candidate, sha256)
            except DataError as error:
                wrong.append(error)
                continue
            for error in wrong:
                if not isinstance(error, AnotherSets):
                    log.warning("%s (%s is used instead)", error, _text(candidate))
            return content
        wrong.sort(key=lambda error: isinstance(error, AnotherSets))  # damage first
        if wrong and (alone or not isinstance(wrong[0], AnotherSets)):
            raise wrong[0]
    return None


def _candidates(files: IdxFiles, place: Path, file: str) -> Iterator[Path]:
    """All paths in `place` at which `file` may lie."""
    names = (file, NAMES[file])
    for folder, own, name, ending in product(files.folders, ("", *names), names, ENDINGS):
        yield place / folder / own / f"{name}{ending}"


def _exists(file: Path) -> bool:
    """Whether there is a file, a dangling link, or no permission to see what there is."""
    try:
        return stat.S_ISREG(os.stat(file).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return file.is_symlink()
    except OSError:
        return True


def _read(file: Path, sha256: str) -> bytes:
    """Decompressed bytes of a file, gzipped or not, whatever its name says.

    Raises DataError: it cannot be read, or has another hash; AnotherSets if that is known.
    """
    try:
        stored = file.read_bytes()
        content = gzip.decompress(stored) if stored.startswith(b"\x1f\x8b") else stored
    except PermissionError as error:
        denied = file if os.access(file.parent, os.X_OK) else file.parent
        raise DataError(f"{_text(denied)} may not be read (no permission): allow it") from error
    except (OSError, EOFError, zlib.error) as error:
        problem = f"cannot be read ({_reason(file, error)})"
        raise DataError(f"{_text(file)} {problem}: replace or remove it") from error
    if not content:
        raise DataError(f"{_text(file)} is empty: replace or remove it")
    found = hashlib.sha256(content).hexdigest()
    if sha256 in (found, hashlib.sha256(stored).hexdigest()):
        return content
    if content.startswith(b"PK\3\4") or content[257:262] == b"ustar":
        raise DataError(f"{_text(file)} is an archive (zip or tar): unpack it")
    owner, name = _OWNERS.get(found, (None, None))
    known = f" (that is {owner}'s {name})" if owner else ""
    problem = f"has the SHA-256 {found}{known} when decompressed, expected {sha256}"
    wanted = _OWNERS[sha256][0]
    if owner in (None, wanted):
        raise DataError(f"{_text(file)} {problem}: replace or remove it")
    raise AnotherSets(f"{_text(file)} {problem}: replace it, or give a folder of {wanted}'s files")


def _reason(path: str | Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and os.path.islink(path):
        return f"a link to {_text(os.readlink(path))}, where nothing is"
    return str(getattr(error, "strerror", None) or error)


def _text(path: str | Path) -> str:
    """A path in one line, quoted if it holds what a terminal cannot show."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def _download(files: IdxFiles, file: str, sha256: str, places: Sequence[Path]) -> bytes:
    """Decompressed bytes of the first mirror's file that has this hash, kept in the user cache.

    Raises DataError, with the `places` that lack the file, if no mirror has it.
    """
    from filelock import FileLock

    from disinhib.data.download import BROKEN, fetch

    folder = cache() / files.folder
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
    looked = [
        _text(place) + ("" if place in (cache(), SYSTEM) else f" ({_listing(files, place)})")
        for place in places
    ]
    raise DataError(
        f"{file}.gz lies in none of {', '.join(looked)} and could not be downloaded"
        f" ({'; '.join(reasons)}): put {', '.join(FILES)} of {files.folder} into {folder}, or set"
        " dataset.path or $DISINHIB_DATA"
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
        others=("MNIST", "MNIST/raw"),
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
        others=("FashionMNIST", "FashionMNIST/raw"),
    ),
    features=28 * 28,
    classes=10,
    brightest=255,
    words="Fashion-MNIST: 60000 training-file and 10000 test images of 28x28",
)
# The hashes are those of the gzipped files, by which TensorFlow Datasets checks its downloads
# (url_checksums/kmnist.txt there): files that are decompressed already are refused.
KMNIST = Dataset(
    load=IdxFiles(
        "kmnist",
        sha256=(
            "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4",
            "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17",
            "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5",
            "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c",
        ),
        mirrors=("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        others=("KMNIST", "KMNIST/raw"),
    ),
    features=28 * 28,
    classes=10,
    brightest=255,
    words="Kuzushiji-MNIST: 60000 training-file and 10000 test images of 28x28",
)

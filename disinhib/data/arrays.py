"""A data set of one's own: arrays in an `.npz` file of NumPy, or a table in a `.csv` file.

Nothing is unpickled. What is done to the numbers is said in one line (`Loaded.words`), because the
network's inputs lie in [0, 1]:

- Of an `.npz`, one range holds for all values: 0, or the smallest value if that is negative,
  becomes 0, and the largest becomes 1. Fractions that lie in [0, 1] stay as they are.
- Of a `.csv`, whose columns have units of their own, the smallest value of each column becomes 0,
  and the largest 1.

The ranges are those of the training file. Splits that the file does not have are drawn from its
training samples, by a seed of their own.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from disinhib.data.base import DataError, Dataset, Loaded, Split

SPLIT_SEED = 0  # of the order in which samples are drawn for the splits that a file lacks
TEST_SHARE = 0.2  # of the samples, if the file has no test set
SHOWN_CLASSES = 12  # at most, in a message
# How a file may call its arrays, in any case: `x_train`, `train_images`, or `X` alone for training.
INPUTS = ("x", "images", "inputs", "data", "features")
LABELS = ("y", "labels", "targets", "target")
SPLITS = {
    "train": ("", "train", "training"),
    "validation": ("valid", "val", "validation", "dev"),
    "test": ("test",),
}
# RuntimeError: a file within is encrypted, or compressed in a way that Python does not know.
BROKEN = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
FORMS = (
    "X and y (or x_train and y_train, train_images and train_labels, ...), and those of valid and"
    " test, if there are any"
)


def load(path: str | None) -> Loaded:
    """The data set in the file at `path`. Raises DataError for what is wrong in it."""
    assert path is not None  # the option's check
    file = Path(os.path.expanduser(path))
    try:
        status = file.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"dataset.path: given {path}, cannot be read ({reason})") from error
    return _load(str(file), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)  # a driver asks for the same file again and again
def _load(path: str, changed: int, size: int) -> Loaded:
    file = Path(path)
    if file.suffix.lower() == ".npz":
        return loaded(_of_npz(file), path)
    if file.suffix.lower() == ".csv":
        return _of_csv(file)
    raise DataError(f"dataset.path: given {path}, allowed is a file .npz or .csv")


def _of_npz(file: Path) -> dict[str, np.ndarray]:
    """Every array in a file, by name."""
    arrays, name = {}, ""
    try:
        content = np.load(file, allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise ValueError("it holds one array, as an .npy does")
        with content:
            for name in content.files:
                arrays[name] = content[name]
    except BROKEN as error:
        if name and "allow_pickle" in str(error):
            raise DataError(
                f"dataset.path: {file}: {name} holds Python objects, which are not read (unpickling"
                " runs code): save numbers"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"dataset.path: {file}: is no .npz of NumPy ({reason})") from error
    return arrays


def loaded(arrays: Mapping[str, np.ndarray], source: str) -> Loaded:
    """The data set of arrays by name (FORMS): inputs `[n, ...]` of numbers, labels `[n]` of whole
    numbers from 0. `source` is for messages. Raises DataError."""
    chosen, left = _chosen(arrays, source)
    parts = {
        split: (_inputs(arrays[x], f"{source}: {x}"), _labels(arrays[y], f"{source}: {y}"))
        for split, (x, y) in chosen.items()
    }
    for split, (x, y) in chosen.items():
        images, labels = parts[split]
        if len(images) != len(labels):
            raise DataError(f"{source}: {x} has {len(images)} samples, but {y} {len(labels)}")
        shape = arrays[chosen["train"][0]].shape[1:]
        if arrays[x].shape[1:] != shape:
            raise DataError(f"{source}: a sample of {x} has the shape {arrays[x].shape[1:]}, in"
                            f" {chosen['train'][0]} {shape}")  # fmt: skip
    ignored = [f"ignored: {', '.join(left)}"] if left else []
    parts, cut = _with_test(parts, source)
    values = parts["train"][0]
    low, high = min(values.min().item(), 0), values.max().item()
    if high == low:
        raise DataError(f"{source}: {chosen['train'][0]} has one value only, {low:g}")
    whole = np.issubdtype(values.dtype, np.integer)
    if not whole and low >= 0 and high <= 1:
        scaled, scale, range_ = lambda x: x.astype(np.float32), 1.0, "inputs are in [0, 1] as given"
    else:
        range_ = f"inputs are scaled from {low:g} ... {high:g} to 0 ... 1"
        if whole and low == 0 and all(x.min() >= 0 and x.max() <= 255 for x, _ in parts.values()):
            scaled, scale = lambda x: x.astype(np.uint8), 1 / high
        else:
            scale = 1.0
            scaled = lambda x: ((x.astype(float) - low) / (high - low)).astype(np.float32)
    splits = {name: _split(scaled(x), y) for name, (x, y) in parts.items()}
    return _together(splits, scale, source, [range_, *cut, *ignored])


def _together(splits: Mapping[str, Split], scale: float, source: str, words: list[str]) -> Loaded:
    train = splits["train"]
    classes = _classes({name: split.labels for name, split in splits.items()}, source)
    named = {"training": train, **{name: s for name, s in splits.items() if s is not train}}
    sizes = ", ".join(f"{len(split.labels)} {name}" for name, split in named.items())
    what = f"{train.images.shape[1]} inputs, {classes} classes"
    ends = {
        name: (scale * split.images.min(), scale * split.images.max())
        for name, split in splits.items()
    }
    outside = [
        f"{name} inputs then reach {low:.3g} ... {high:.3g}"
        for name, (low, high) in ends.items()
        if low < 0 or high > 1
    ]
    return Loaded(
        train,
        splits["test"],
        splits.get("validation"),
        scale=scale,
        classes=classes,
        words=f"data {Path(source).name}: {what}, {sizes} samples; {'; '.join([*words, *outside])}",
    )


def _chosen(
    arrays: Mapping[str, np.ndarray], source: str
) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """(the names of the inputs and the labels of each split, the names of the other arrays)."""
    by_name: dict[str, list[str]] = {}
    for name in arrays:
        by_name.setdefault(name.lower(), []).append(name)

    def called(kinds: tuple[str, ...], split: str) -> str | None:
        forms = {
            form
            for kind in kinds
            for word in SPLITS[split]
            for form in ((f"{kind}_{word}", f"{word}_{kind}") if word else (kind,))
        }
        found = [name for form in sorted(forms) for name in by_name.get(form, ())]
        if len(found) > 1:
            raise DataError(f"{source}: {' and '.join(found)} could both be meant: leave one out")
        return found[0] if found else None

    pairs = {}
    for split in SPLITS:
        x, y = called(INPUTS, split), called(LABELS, split)
        if (x is None) != (y is None):
            lacking = "labels" if y is None else "inputs"
            raise DataError(f"{source}: {x or y} has no {lacking} beside it; needed are {FORMS}")
        if x is not None and y is not None:
            pairs[split] = x, y
    if "train" not in pairs:
        there = ", ".join(arrays) or "nothing"
        raise DataError(f"{source}: holds {there}, needed are {FORMS}")
    used = {name for pair in pairs.values() for name in pair}
    return pairs, [name for name in arrays if name not in used]


def _inputs(array: np.ndarray, source: str) -> np.ndarray:
    """Inputs `[n, features]`."""
    if array.dtype.kind not in "buif":
        raise DataError(f"{source} is of {array.dtype}, needed are whole or real numbers")
    if array.ndim < 2 or not array.size:
        raise DataError(f"{source} has the shape {array.shape}, needed is [samples, values ...]")
    if array.dtype.kind == "f" and (wrong := int((~np.isfinite(array)).sum())):
        first = int(np.argwhere(~np.isfinite(array))[0][0])
        numbers = "number that is" if wrong == 1 else "numbers that are"
        raise DataError(f"{source} has {wrong} {numbers} not finite (first in sample {first})")
    flat = array.reshape(len(array), -1)
    return flat.astype(np.uint8) if array.dtype.kind == "b" else flat


def _labels(array: np.ndarray, source: str) -> np.ndarray:
    """Labels `[n]`, whole numbers."""
    if array.dtype.kind not in "buif":
        raise DataError(f"{source} is of {array.dtype}, needed are whole numbers from 0")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or not array.size:
        hint = "; of one-hot labels, give y.argmax(axis=1)" if array.ndim == 2 else ""
        raise DataError(f"{source} has the shape {array.shape}, needed is [samples]{hint}")
    whole = array.astype(np.int64) if np.isfinite(array).all() else array
    if not np.array_equal(whole, array) or whole.dtype.kind == "f":
        raise DataError(f"{source} has labels that are no whole numbers")
    return whole


def _classes(labels: Mapping[str, np.ndarray], source: str) -> int:
    """How many classes there are. Raises DataError unless they are 0, 1, 2, ..., all trained."""
    there = {name: sorted({*of_split.tolist()}) for name, of_split in labels.items()}
    trained = there["train"]
    listed = ", ".join(map(str, trained[:SHOWN_CLASSES])) + " ..." * (len(trained) > SHOWN_CLASSES)
    if trained != [*range(len(trained))] or len(trained) < 2:
        raise DataError(f"{source}: the training labels are {listed}; needed are 0, 1, 2, ...")
    for name, own in there.items():
        if new := [label for label in own if label not in trained]:
            raise DataError(f"{source}: the {name} labels have {new[0]}, which is not trained")
    return len(trained)


def _with_test(parts: dict[str, tuple[Any, Any]], source: str) -> tuple[dict[str, Any], list[str]]:
    """The splits, with a test set; and what was drawn by chance, in words. A training set that
    validation will be cut from is shuffled, because files are often sorted by class."""
    if "test" in parts and "validation" in parts:
        return parts, []
    x, y = parts["train"]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(y))
    drawn = {} if "validation" in parts else {"validation": "dataset.valid_split of the rest"}
    if "test" in parts:
        return {**parts, "train": (x[order], y[order])}, [
            f"samples are shuffled by seed {SPLIT_SEED}, and validation is their first"
            " dataset.valid_split"
        ]
    held_out = int(TEST_SHARE * len(y))
    if held_out == 0:
        raise DataError(f"{source}: has {len(y)} samples, too few for a test set to be drawn")
    test, rest = order[:held_out], order[held_out:]
    cut = {**parts, "train": (x[rest], y[rest]), "test": (x[test], y[test])}
    words = f"the file has no test set: {held_out} samples ({TEST_SHARE:.0%}) are drawn for it"
    more = f", then {drawn['validation']} for validation" if drawn else ""
    return cut, [f"{words}{more}, by seed {SPLIT_SEED}"]


def _of_csv(file: Path) -> Loaded:
    """A table with a header: a class in the column `label` or `y`, else in the last, and numbers in
    the others."""
    import pandas as pd  # here, because it takes half a second to import

    source = str(file)
    try:
        table = pd.read_csv(file)
    except (OSError, ValueError) as error:  # of the parser, too
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"dataset.path: {file}: is no table ({reason})") from error
    if table.shape[1] < 2 or not len(table):
        raise DataError(f"{source}: has {table.shape[1]} columns and {len(table)} rows of data")
    names = [str(name) for name in table.columns]
    if nameless := [name for name in names if name.startswith("Unnamed:")]:
        raise DataError(
            f"{source}: {len(nameless)} of its columns have no name (pandas writes an index so;"
            " leave it out with index=False)"
        )
    if all(map(_is_number, names)) and names != [*map(str, range(len(names)))]:
        raise DataError(f"{source}: has no header: its first line is {', '.join(names[:5])} ...")
    named = [name for name in table.columns if str(name).lower() in ("label", "y")]
    if len(named) > 1:
        raise DataError(f"{source}: {' and '.join(named)} could both be the class: leave one out")
    column = named[0] if named else table.columns[-1]
    words = [f"the class is in the column {column}"]
    features = table.drop(columns=column)
    for name, kind in features.dtypes.items():
        if kind.kind not in "buif":
            raise DataError(f"{source}: the column {name} holds {kind}, needed are numbers")
    labels = pd.Series(table[column])
    if labels.isna().any():
        raise DataError(f"{source}: the column {column} lacks {int(labels.isna().sum())} labels")
    if labels.dtype.kind not in "buif":  # names of classes
        names = sorted({*map(str, labels)})
        labels = labels.map(lambda name: names.index(str(name)))
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(names[:SHOWN_CLASSES]))
        words.append(f"classes are {listed}{' ...' * (len(names) > SHOWN_CLASSES)}")
    inputs = _inputs(features.to_numpy(float), f"{source}: its columns")
    whole = _labels(labels.to_numpy(), f"{source}: the column {column}")
    parts, cut = _with_test({"train": (inputs, whole)}, source)
    low, high = (end(parts["train"][0], axis=0) for end in (np.min, np.max))
    span = np.where(high > low, high - low, 1.0)  # of a column with one value
    splits = {name: _split((x - low) / span, y) for name, (x, y) in parts.items()}
    words = [*words, "each column is scaled from its own range to 0 ... 1", *cut]
    return _together(splits, 1.0, source, words)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    kind = images.dtype if images.dtype == np.uint8 else np.float32
    result = Split(np.ascontiguousarray(images, kind), labels.astype(np.int32))
    for array in result:
        array.setflags(write=False)
    return result


ARRAYS = Dataset(
    load,
    words="arrays of your own: dataset.path is an .npz file (X, y), or a .csv table",
)

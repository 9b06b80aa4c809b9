"""Data sets: sizes, disjoint splits, strict IDX files, the search path, and resumed downloads."""

import gzip
import hashlib
import io
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pooch
import pytest
from hypothesis import given, settings, strategies as st

from disinhib import data, hydra_config
from disinhib.data import DATASETS, DataError, idx as idx_files, load
from disinhib.data.idx import FILES, IdxFiles, parse_idx
from disinhib.losses import LOSSES

ROOT = Path(__file__).resolve().parents[1]
GIVEN = os.environ.get("DISINHIB_DATA")
IDX_SETS = [name for name, dataset in DATASETS.items() if isinstance(dataset.load, IdxFiles)]


def files_of(name: str) -> IdxFiles:
    files = DATASETS[name].load
    assert isinstance(files, IdxFiles)
    return files


def with_files(name: str, **changes):
    """The entry `name` with other hashes or mirrors."""
    return replace(DATASETS[name], load=replace(files_of(name), **changes))


# --- What the tests stand on -------------------------------------------------------------------


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """No data set of this machine, and no mirror of the world, is within reach of a test."""
    monkeypatch.delenv("DISINHIB_DATA", raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.setattr(idx_files, "SYSTEM", tmp_path / "system")
    for name in IDX_SETS:
        monkeypatch.setitem(DATASETS, name, with_files(name, mirrors=()))


def whole(name: str) -> str:
    """The folder that holds the real files of `name`, or a skip."""
    folder = files_of(name).folder
    roots = [Path(GIVEN)] if GIVEN else []
    for root in [*roots, ROOT.parent / "shared" / "data"]:
        if (root / folder / f"{FILES[0]}.gz").exists() or (root / folder / FILES[0]).exists():
            return str(root)
    pytest.skip(f"the whole {folder} is neither in $DISINHIB_DATA nor in ../shared/data")


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def synthetic(seed: int = 0, n_train: int = 20, n_test: int = 6) -> dict[str, bytes]:
    """Four IDX files by name; the images are noise, so gzip hardly shortens them."""
    rng = np.random.default_rng(seed)
    return dict(
        zip(
            FILES,
            (
                idx(rng.integers(256, size=(n_train, 28, 28))),
                idx(rng.integers(10, size=n_train)),
                idx(rng.integers(256, size=(n_test, 28, 28))),
                idx(rng.integers(10, size=n_test)),
            ),
            strict=True,
        )
    )


def plant(monkeypatch, name: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """Makes `files` the right ones of the data set `name`."""
    sha256 = tuple(hashlib.sha256(content).hexdigest() for content in files.values())
    monkeypatch.setitem(DATASETS, name, with_files(name, sha256=sha256))
    return files


@pytest.fixture
def small(monkeypatch):
    """Small stand-ins for fmnist's files, their hashes in the table."""
    return plant(monkeypatch, "fmnist", synthetic())


@pytest.fixture
def mnists(monkeypatch):
    """The same for mnist's: the names are fmnist's, the content is not."""
    return plant(monkeypatch, "mnist", synthetic(seed=1))


def put(folder: Path, files: dict[str, bytes], layout: str = "{0}.gz") -> Path:
    """Writes each file to the path `layout` in `folder`: {0} is its name, {1} is Kaggle's. One that
    ends in .gz is compressed."""
    for name, content in files.items():
        file = folder / layout.format(name, name.replace("-idx", ".idx"))
        file.parent.mkdir(parents=True, exist_ok=True)
        gzipped = file.suffix.lower() == ".gz"
        file.write_bytes(gzip.compress(content, mtime=0) if gzipped else content)
    return folder


def give(monkeypatch, by: str, folder: Path | str) -> str | None:
    """Names `folder` by $DISINHIB_DATA or by a path, which it returns."""
    if by == "path":
        return str(folder)
    monkeypatch.setenv("DISINHIB_DATA", str(folder))


BY = pytest.mark.parametrize("by", ["path", "environment"])


def refusal(call, *args, **options) -> str:
    """The one line in which a call refuses its arguments."""
    with pytest.raises(DataError) as error:
        call(*args, **options)
    message = str(error.value)
    assert message.isprintable() and message == message.strip()
    return message


def are(splits, files: dict[str, bytes]) -> bool:
    """Whether `splits` are of `files`, in their order."""
    images = np.concatenate([splits.validation.images, splits.train.images])
    labels = np.concatenate([splits.validation.labels, splits.train.labels])
    arrays = images, labels, splits.test.images, splits.test.labels
    return all(
        array.astype(np.uint8).tobytes() == content[16 if array.ndim == 2 else 8 :]
        for array, content in zip(arrays, files.values(), strict=True)
    )


# --- Digits and the splits ---------------------------------------------------------------------


def test_digits_sizes_types_and_scale():
    splits = load("digits", valid_split=0.2)
    assert [len(split.labels) for split in splits[:3]] == [1150, 287, 360]
    for split in splits[:3]:
        assert split.images.shape == (len(split.labels), 64)
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32
        assert set(split.labels) == set(range(10))
        assert not split.images.flags.writeable and not split.labels.flags.writeable
    assert splits.scale == 1 / 16 and splits.classes == 10
    assert splits.train.images.max() * splits.scale == 1


def test_digits_are_scikit_learns_in_its_order():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    splits = load("digits")
    parts = splits.validation, splits.train, splits.test
    np.testing.assert_array_equal(np.concatenate([p.images for p in parts]), images)
    np.testing.assert_array_equal(np.concatenate([p.labels for p in parts]), labels)


@settings(max_examples=30)
@given(valid_split=st.floats(1 / 1437, 1, exclude_max=True) | st.just(np.nextafter(1, 0)))
def test_splits_are_disjoint_and_lose_nothing(valid_split):
    numbered = data.Split(np.arange(1437)[:, None], np.arange(1437))
    with pytest.MonkeyPatch.context() as patch:
        entry = replace(DATASETS["digits"], load=lambda path: (numbered, numbered))
        patch.setitem(DATASETS, "digits", entry)
        splits = load("digits", valid_split=valid_split)
    held_out = int(valid_split * 1437)
    for column in (0, 1):
        validation, train = splits.validation[column].ravel(), splits.train[column].ravel()
        np.testing.assert_array_equal(validation, np.arange(held_out))
        np.testing.assert_array_equal(train, np.arange(held_out, 1437))
        assert len(train) and len(validation)


@given(seed=st.integers(0, 2**31 - 1))
@settings(max_examples=10, deadline=None)
def test_a_seed_draws_validation_from_the_same_images(seed):
    first, drawn, again = (
        load("digits", valid_split=0.2, valid_seed=s) for s in (None, seed, seed)
    )
    images = lambda *splits: sorted(map(bytes, np.concatenate([s.images for s in splits])))
    assert images(drawn.train, drawn.validation) == images(first.train, first.validation)
    assert [len(split.labels) for split in drawn[:3]] == [len(split.labels) for split in first[:3]]
    assert images(drawn.validation) != images(first.validation)
    for split, other in zip(drawn[:3], again[:3], strict=True):
        np.testing.assert_array_equal(split.images, other.images)
        np.testing.assert_array_equal(split.labels, other.labels)
    np.testing.assert_array_equal(drawn.test.images, first.test.images)
    label = {bytes(i): n for split in first[:2] for i, n in zip(*split, strict=True)}
    assert all(label[bytes(i)] == n for i, n in zip(*drawn.validation, strict=True))


@pytest.mark.parametrize("valid_split", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", [name for name in DATASETS if DATASETS[name].features])
def test_valid_split_outside_its_range_is_refused(name, valid_split):
    message = refusal(load, name, valid_split=valid_split)
    assert "dataset.valid_split" in message and repr(valid_split) in message


def test_valid_split_that_holds_out_nothing_is_refused():
    message = refusal(load, "digits", valid_split=1e-9)
    assert re.search(r"dataset\.valid_split must hold out .* \(got 1e-09\)", message)


@pytest.mark.parametrize(
    ("given", "ending"),
    [
        ("fashion-mnist", "did you mean fmnist?"),
        ("MNIST", "did you mean mnist?"),
        ("digit", "did you mean digits?"),
        ("cifar", "(got 'cifar')"),
        ("", "(got '')"),
    ],
)
def test_unknown_name_gives_the_allowed_and_the_nearest(given, ending):
    message = refusal(load, given)
    assert message.startswith(f"dataset must be one of {', '.join(DATASETS)} (got ")
    assert repr(given) in message and message.endswith(ending)


def test_files_may_be_known_by_the_hash_of_their_gzipped_form(tmp_path, monkeypatch):
    """As KMNIST's: then only that form is taken."""
    files = {name: gzip.compress(content) for name, content in synthetic().items()}
    plant(monkeypatch, "kmnist", files)
    for name, content in files.items():
        (tmp_path / f"{name}.gz").write_bytes(content)
    assert len(load("kmnist", str(tmp_path)).test.labels) == 6
    (tmp_path / f"{FILES[0]}.gz").unlink()
    (tmp_path / FILES[0]).write_bytes(gzip.decompress(files[FILES[0]]))
    assert "has the SHA-256" in refusal(load, "kmnist", str(tmp_path))


def test_digits_take_no_path(tmp_path):
    assert "dataset.path must be null for digits" in refusal(load, "digits", str(tmp_path))


# --- The real files, where they are at hand -----------------------------------------------------


@BY
@pytest.mark.parametrize("name", IDX_SETS)
def test_whole_sets(name, by, monkeypatch):
    splits = load(name, give(monkeypatch, by, whole(name)))
    assert [split.images.shape for split in splits[:3]] == [
        (54000, 784),
        (6000, 784),
        (10000, 784),
    ]
    counts = np.bincount(np.concatenate([splits.train.labels, splits.validation.labels]))
    if name == "fmnist":  # balanced, as its authors say
        assert (counts == 6000).all()
    else:  # the class counts of MNIST's training file as they are widely published
        assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    for split in splits[:3]:
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int32
        assert split.images.max() * splits.scale == 1 and split.images.min() == 0


# --- IDX ---------------------------------------------------------------------------------------


@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=3), seed=st.integers(0, 99))
def test_idx_round_trip(shape, seed):
    array = np.random.default_rng(seed).integers(256, size=shape)
    parsed = parse_idx(idx(array), len(shape))
    assert parsed.dtype == np.uint8 and not parsed.flags.writeable
    np.testing.assert_array_equal(parsed, array)


LABELS = idx(np.arange(10))


@pytest.mark.parametrize(
    ("content", "ndim", "says"),
    [
        (b"", 1, "got nothing"),
        (b"\x00\x00", 1, "got 0000"),
        (LABELS[:7], 1, "must begin with the 8 bytes"),
        (LABELS, 3, "3 axes, 00000803"),
        (b"\x00\x00\x0d" + LABELS[3:], 1, "uint8"),  # 0d is float32
        (b"\x01" + LABELS[1:], 1, "must begin"),
        (LABELS[:-1], 1, r"must hold 10 values for its IDX shape \(10,\) \(got 9\)"),
        (LABELS + b"\x00", 1, r"\(got 11\)"),
        (struct.pack(">4B3I", 0, 0, 8, 3, *(2**32 - 1,) * 3), 3, r"\(got 0\)"),  # no overflow
    ],
)
def test_idx_is_parsed_strictly(content, ndim, says):
    assert re.search(f"^labels .*{says}", refusal(parse_idx, content, ndim, "labels"))


@pytest.mark.parametrize("layout", ["{0}.gz", "{0}"])
def test_files_are_read_gzipped_or_plain(layout, small, tmp_path):
    splits = load("fmnist", str(put(tmp_path / "a", small, layout)))
    images = np.frombuffer(small[FILES[0]], np.uint8, offset=16).reshape(20, 784)
    np.testing.assert_array_equal(splits.validation.images, images[:2])
    np.testing.assert_array_equal(splits.train.images, images[2:])
    labels = np.frombuffer(small[FILES[3]], np.uint8, offset=8)
    np.testing.assert_array_equal(splits.test.labels, labels)
    assert splits.scale == 1 / 255 and splits.classes == 10


def test_another_compression_is_the_same_file(small, tmp_path):
    folder = put(tmp_path / "a", small)
    # A mirror that recompressed, and one whose server decompressed on the way.
    (folder / f"{FILES[0]}.gz").write_bytes(gzip.compress(small[FILES[0]], 1, mtime=7))
    (folder / f"{FILES[1]}.gz").write_bytes(small[FILES[1]])
    assert are(load("fmnist", str(folder)), small)


# --- Damage ------------------------------------------------------------------------------------


def test_damaged_content_names_file_and_both_hashes(small, tmp_path):
    folder = put(tmp_path / "a", small)
    content = bytearray(small[FILES[2]])
    content[-1] ^= 1
    file = folder / f"{FILES[2]}.gz"
    file.write_bytes(gzip.compress(bytes(content)))
    message = refusal(load, "fmnist", str(folder))
    for part in (
        str(file),
        hashlib.sha256(content).hexdigest(),
        files_of("fmnist").sha256[2],
        "replace or remove it",
    ):
        assert part in message


@pytest.mark.parametrize(
    "damage",
    [
        lambda stored: stored[: len(stored) // 2],
        lambda stored: stored[:-1],
        lambda stored: stored[:5],
        lambda stored: stored[:40] + b"\xff" * 40 + stored[80:],
        lambda stored: stored + b"more",
    ],
    ids=["half", "last byte missing", "header cut", "bytes overwritten", "bytes appended"],
)
def test_damaged_gzip_names_the_file(damage, small, tmp_path):
    folder = put(tmp_path / "a", small)
    file = folder / f"{FILES[0]}.gz"
    file.write_bytes(damage(file.read_bytes()))
    assert f"{file} cannot be read" in refusal(load, "fmnist", str(folder))


def zipped(content: bytes) -> bytes:
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(FILES[0], content)
        return file.getvalue()


def tarred(content: bytes) -> bytes:
    with io.BytesIO() as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            member = tarfile.TarInfo(FILES[0])
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        return file.getvalue()


@BY
@pytest.mark.parametrize(
    ("stored", "says"),
    [
        (b"", "is empty: replace or remove it"),
        (gzip.compress(b""), "is empty: replace or remove it"),
        (zipped(b"images"), "is an archive (zip or tar): unpack it"),
        (gzip.compress(tarred(b"images")), "is an archive (zip or tar): unpack it"),
        (tarred(b"images"), "is an archive (zip or tar): unpack it"),
        (None, "cannot be read (a link to gone, where nothing is): replace or remove it"),
    ],
    ids=["empty", "empty gzip", "zip", "tar.gz", "tar", "dangling link"],
)
def test_what_is_no_file_of_images_says_what_it_is(stored, says, by, small, tmp_path, monkeypatch):
    file = put(tmp_path / "a", small) / f"{FILES[0]}.gz"
    file.unlink()
    if stored is None:
        file.symlink_to("gone")
    else:
        file.write_bytes(stored)
    path = give(monkeypatch, by, tmp_path / "a")
    assert refusal(load, "fmnist", path) == f"{file} {says}"


def test_files_with_each_others_names_are_recognised(small, tmp_path):
    first, second, *others = FILES
    swapped = {first: small[second], second: small[first], **{n: small[n] for n in others}}
    message = refusal(load, "fmnist", str(put(tmp_path / "a", swapped)))
    assert f"{first}.gz has" in message and f"(that is fashion-mnist's {second})" in message


# --- Several files of one name ------------------------------------------------------------------


def test_another_sets_file_is_recognised(small, mnists, tmp_path):
    message = refusal(load, "fmnist", str(put(tmp_path / "a", mnists)))
    assert f"{FILES[0]}.gz has" in message and f"(that is mnist's {FILES[0]})" in message
    assert message.endswith(": replace it, or give a folder of fashion-mnist's files")


@BY
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("FashionMNIST/raw/{0}", "{0}"),
        ("raw/{0}", "{0}"),
        ("{0}", "fashion-mnist/{0}"),
        ("{0}.gz", "{0}"),
        ("{1}", "{0}"),
    ],
)
def test_another_sets_file_hides_no_right_one(
    right, wrong, by, small, mnists, tmp_path, monkeypatch, caplog
):
    put(put(tmp_path / "a", small, right), mnists, wrong)
    assert are(load("fmnist", give(monkeypatch, by, tmp_path / "a")), small)
    assert caplog.messages == []


@pytest.mark.parametrize("beneath", ["", "{}", "{}/raw"])
def test_torchvisions_root_its_folder_and_raw(beneath, small, mnists, tmp_path):
    put(put(tmp_path, small, "FashionMNIST/raw/{0}"), mnists, "MNIST/raw/{0}")
    assert are(load("fmnist", str(tmp_path / beneath.format("FashionMNIST"))), small)
    assert are(load("mnist", str(tmp_path / beneath.format("MNIST"))), mnists)
    if beneath:
        message = refusal(load, "mnist", str(tmp_path / beneath.format("FashionMNIST")))
        assert "(that is fashion-mnist's" in message


@BY
def test_damaged_file_hides_no_right_one_in_the_same_place(
    by, small, tmp_path, monkeypatch, caplog
):
    damaged = put(tmp_path / "a", {FILES[0]: b"damaged"}, "fashion-mnist/{0}")
    put(damaged, small)
    assert are(load("fmnist", give(monkeypatch, by, tmp_path / "a")), small)
    (warning,) = caplog.messages
    assert warning.startswith(f"{damaged}/fashion-mnist/{FILES[0]} has the SHA-256")
    assert warning.endswith(f"({damaged}/{FILES[0]}.gz is used instead)")


@BY
def test_damaged_file_is_refused_where_there_is_no_right_one(
    by, small, mnists, tmp_path, monkeypatch
):
    """Not for another set's file beside it, nor for a right one in another place."""
    put(tmp_path / "a", mnists, "fashion-mnist/{0}")
    put(tmp_path / "a", {FILES[2]: b"damaged"})
    put(tmp_path / "a", {name: small[name] for name in FILES[:2]}, "raw/{0}")
    put(tmp_path / "system" / "fashion-mnist", small)
    message = refusal(load, "fmnist", give(monkeypatch, by, tmp_path / "a"))
    assert message.startswith(f"{tmp_path}/a/{FILES[2]}.gz has the SHA-256")


def test_environment_may_hold_another_set_only(small, mnists, tmp_path, monkeypatch):
    put(tmp_path / "a", mnists)
    monkeypatch.setenv("DISINHIB_DATA", str(tmp_path / "a"))
    message = refusal(load, "fmnist")
    assert f"{tmp_path}/a (found {sorted(FILES)[0]}.gz, " in message
    put(tmp_path / "system" / "fashion-mnist", small)
    assert are(load("fmnist"), small)


# --- Where files are looked for ----------------------------------------------------------------


@BY
@pytest.mark.parametrize(
    "layout",
    [
        *("{0}", "{0}.gz", "{0}.GZ"),
        *("{1}", "{1}.gz", "{1}.GZ"),
        *("{0}/{0}", "{0}/{0}.gz", "{0}/{1}", "{1}/{1}"),
        *("fashion-mnist/{0}.gz", "fashion-mnist/{1}", "fashion-mnist/{0}/{0}"),
        *("FashionMNIST/raw/{0}", "FashionMNIST/raw/{0}.gz", "FashionMNIST/{0}.gz"),
        *("raw/{0}", "raw/{0}.gz"),
    ],
)
def test_files_are_found_as_people_have_them(layout, by, small, tmp_path, monkeypatch, caplog):
    put(tmp_path / "a", small, layout)
    assert are(load("fmnist", give(monkeypatch, by, tmp_path / "a")), small)
    assert caplog.messages == []


@BY
@pytest.mark.parametrize("layout", ["{0}", "{0}/{0}"])
def test_links_are_followed(layout, by, small, tmp_path, monkeypatch):
    put(tmp_path / "a", small, layout)
    (tmp_path / "b").mkdir()
    for entry in (tmp_path / "a").iterdir():
        (tmp_path / "b" / entry.name).symlink_to(entry)
    (tmp_path / "c").symlink_to("b")
    assert are(load("fmnist", give(monkeypatch, by, tmp_path / "c")), small)


@BY
@pytest.mark.parametrize(
    "name", ["~/a", "a b", "dünn 数", "a=b", "100%", "a,b", "[a]*?", "tab\t", "line\nbreak", "-a"]
)
def test_any_path_will_do(name, by, small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    folder = put(tmp_path / name.removeprefix("~/"), small)
    monkeypatch.chdir(tmp_path)
    path = give(monkeypatch, by, name)
    assert are(load("fmnist", path), small)
    (folder / f"{FILES[0]}.gz").write_bytes(b"damaged")
    assert f"{FILES[0]}.gz" in refusal(load, "fmnist", path)


def test_search_order(small, tmp_path, monkeypatch):
    """Each place is used once those before it are empty: a damaged file shows which was read."""
    explicit, environment = tmp_path / "explicit", tmp_path / "environment"
    places = [
        environment / "fashion-mnist",
        environment,
        tmp_path / "cache" / "disinhib" / "fashion-mnist",
        tmp_path / "system" / "fashion-mnist",
    ]
    wrong = dict.fromkeys(small, b"wrong")
    monkeypatch.setenv("DISINHIB_DATA", str(environment))
    for folder in [explicit, *places]:
        put(folder, wrong)
    assert str(explicit) in refusal(load, "fmnist", str(explicit))
    for folder in places:
        assert f"{folder / FILES[0]}.gz has the SHA-256" in refusal(load, "fmnist")
        for name in FILES:
            (folder / f"{name}.gz").unlink()
    put(places[-1], small)
    assert are(load("fmnist"), small)


def test_files_may_lie_in_several_places(small, tmp_path, monkeypatch):
    monkeypatch.setenv("DISINHIB_DATA", str(tmp_path / "environment"))
    names = list(small)
    put(tmp_path / "environment", {n: small[n] for n in names[:2]})
    put(tmp_path / "system" / "fashion-mnist", {n: small[n] for n in names[2:]}, "{0}")
    assert are(load("fmnist"), small)


@BY
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("no-such-folder", "No such file or directory"),
        ("~no-such-user/a", "No such file or directory"),
        ("link", "a link to gone, where nothing is"),
        ("circle", "Too many levels of symbolic links"),
        ("notes.txt", "which is a file: give its folder, ."),
        ("notes.txt/a", "Not a directory"),
        (f"a/{FILES[0]}.gz", "which is a file: give its folder, a"),
        ("archive.zip", "which is an archive: unpack it"),
        ("mnist.TAR.GZ", "which is an archive: unpack it"),
        ("a" * 300, "File name too long"),
    ],
)
def test_what_is_no_folder_says_what_it_is(given, says, by, small, tmp_path, monkeypatch, server):
    """And nothing else is taken instead, nor downloaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("notes.txt", "archive.zip", "mnist.TAR.GZ"):
        (tmp_path / name).write_text("anything")
    put(tmp_path / "a", small)
    put(tmp_path / "system" / "fashion-mnist", small)
    server.mirror(small)
    message = refusal(load, "fmnist", give(monkeypatch, by, given))
    option = "dataset.path" if by == "path" else "$DISINHIB_DATA"
    assert message.startswith(f"{option}: given {given!r}, {says}; allowed is a folder that holds")
    assert all(name in message for name in FILES)
    assert server.log == []


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_paths_that_no_folder_can_have(path, small):
    message = refusal(load, "fmnist", path)
    assert message.startswith(f"dataset.path: given {path!r}, ") and FILES[0] in message


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "missing all four files; found nothing; allowed"),
        ([".DS_Store"], "missing all four files; found nothing; allowed"),
        (["mnist.npz", "a.csv"], "missing all four files; found mnist.npz, a.csv; allowed"),
        (["archive.zip"], "found archive.zip; unpack archive.zip if it holds them; allowed"),
        (["t.tar", "a.txt"], "found t.tar, a.txt; unpack t.tar if it holds them; allowed"),
        (
            [f"fashion-mnist/{FILES[0]}.tar.gz"],
            f"; unpack fashion-mnist/{FILES[0]}.tar.gz if it holds them; allowed",
        ),
        ([f"{FILES[0]}/a"], f"missing all four files; found {FILES[0]}/; allowed"),
        (["MNIST/raw/a", "FashionMNIST/b"], "found FashionMNIST/, FashionMNIST/b, MNIST/; allowed"),
        ([f"{n}.txt" for n in range(9)], "found 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 4 more;"),
        ([*map(str, range(9)), "train.csv"], "found train.csv, 0, 1, 2, 3 and 5 more;"),
        (["line\nbreak"], r"found 'line\nbreak'; allowed"),
    ],
)
def test_folder_without_the_files_says_what_it_holds(names, says, small, tmp_path, server):
    """Whatever lies elsewhere."""
    put(tmp_path / "system" / "fashion-mnist", small)
    server.mirror(small)
    folder = tmp_path / "a"
    folder.mkdir()
    for name in names:
        put(folder, {name: b"anything"}, "{0}")
    message = refusal(load, "fmnist", str(folder))
    assert message.startswith(f"dataset.path: given {str(folder)!r}, missing all four files; found")
    assert says in message
    cache, system = tmp_path / "cache" / "disinhib", tmp_path / "system"
    for part in (*FILES, "FashionMNIST/raw/", "$DISINHIB_DATA", str(cache), str(system)):
        assert part in message
    assert server.log == []


def test_missing_files_are_named(small, tmp_path):
    folder = put(tmp_path / "a", {name: small[name] for name in FILES[1:3]}, "{1}")
    (folder / "FashionMNIST").symlink_to("gone")
    message = refusal(load, "fmnist", str(folder))
    says = f", missing {FILES[0]}, {FILES[3]}; found FashionMNIST (a dangling link), t10k-images"
    assert says in message


def test_found_nowhere_tells_where_files_may_be_put(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "archive.zip").touch()
    monkeypatch.setenv("DISINHIB_DATA", str(tmp_path / "a"))
    message = refusal(load, "mnist")
    for part in (
        f"{tmp_path}/a (found archive.zip; unpack archive.zip if it holds them)",
        str(tmp_path / "system"),
        f"into {tmp_path}/cache/disinhib/mnist",
        *FILES,
        "dataset.path",
        "$DISINHIB_DATA",
    ):
        assert part in message


# --- Permissions --------------------------------------------------------------------------------


@pytest.fixture
def closed(small):
    """`closed(name, mode)` is a folder with small's files, and in it an entry of that mode, which
    binds even root: the rest of the test runs as nobody."""
    root = Path(tempfile.mkdtemp(prefix="closed-"))  # only its owner may enter tmp_path
    is_root = os.getuid() == 0

    def close(name: str, mode: int = 0, layout: str = "{0}") -> Path:
        root.chmod(0o755)
        put(root, small, layout)
        (root / "cache").mkdir()
        (root / name).chmod(mode)
        if is_root:
            os.setresuid(65534, 65534, 0)
        return root

    yield close
    if is_root:
        os.setresuid(0, 0, 0)
    root.chmod(0o700)
    for entry in root.iterdir():
        entry.chmod(0o700)
    shutil.rmtree(root)


@BY
def test_folder_that_may_not_be_entered(by, closed, monkeypatch):
    folder = closed("")
    message = refusal(load, "fmnist", give(monkeypatch, by, folder))
    assert f"given {str(folder)!r}, which may not be entered (no permission); allowed" in message
    message = refusal(load, "fmnist", give(monkeypatch, by, folder / "a"))
    assert f"given '{folder}/a', Permission denied; allowed" in message


@BY
@pytest.mark.parametrize(
    ("name", "layout"), [(FILES[0], "{0}"), ("fashion-mnist", "fashion-mnist/{0}")]
)
def test_what_may_not_be_read_is_named(name, layout, by, closed, monkeypatch):
    folder = closed(name, layout=layout)
    message = refusal(load, "fmnist", give(monkeypatch, by, folder))
    assert message == f"{folder / name} may not be read (no permission): allow it"


def test_folder_that_may_not_be_listed_can_be_used(closed, small):
    folder = closed("", 0o111)
    assert are(load("fmnist", str(folder)), small)
    message = refusal(load, "mnist", str(folder))
    assert "(that is fashion-mnist's" in message


def test_folder_that_may_not_be_listed_says_so(closed):
    message = refusal(load, "fmnist", str(closed("", 0o111, "elsewhere/{0}")))
    assert "missing all four files; found ./ (no permission to list it); allowed" in message


def test_closed_cache_hides_no_other_place(closed, small, monkeypatch):
    """As in a container whose home is another user's."""
    folder = closed("cache", layout="fashion-mnist/{0}")
    monkeypatch.setattr(pooch, "os_cache", lambda project: folder / "cache" / project)
    monkeypatch.setattr(idx_files, "SYSTEM", folder)
    assert are(load("fmnist"), small)


# --- Download: a real server on the loopback ----------------------------------------------------


URL = f"/0/{FILES[0]}.gz"  # the first file, at the first mirror


class Server(ThreadingHTTPServer):
    """Serves mirrors by their folder, logs (path, Range, bytes sent), and fails as it is told."""

    daemon_threads = True

    def __init__(self, patch: pytest.MonkeyPatch):
        super().__init__(("127.0.0.1", 0), Handler)
        self.patch, self.log, self.files = patch, [], {}
        self.cuts: list[float] = []  # share of the body after which the next answers break off
        self.ranges = True  # whether Range is understood
        self.lengths = True  # whether Content-Length is sent

    def mirror(self, *mirrors: dict[str, bytes] | None, compressed: bool = True) -> None:
        """Make these fmnist's mirrors, in this order; None is one that has no files."""
        for number, files in enumerate(mirrors):
            for name, content in (files or {}).items():
                stored = gzip.compress(content, mtime=0) if compressed else content
                self.files[f"/{number}/{name}.gz"] = stored
        urls = (f"http://127.0.0.1:{self.server_port}/{number}/" for number in range(len(mirrors)))
        entry = with_files("fmnist", mirrors=tuple(urls))
        self.patch.setitem(DATASETS, "fmnist", entry)

    @property
    def first(self) -> list[tuple[str, str | None, int]]:
        """The log's entries for the first file, of any mirror."""
        return [entry for entry in self.log if entry[0].endswith(f"/{FILES[0]}.gz")]


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self):
        stored, asked = self.server.files.get(self.path), self.headers["Range"]
        if stored is None:
            self.server.log.append((self.path, asked, 0))
            return self.send_error(404)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if start and not self.server.ranges:
            start, asked = 0, None
        if start >= len(stored):
            self.server.log.append((self.path, asked, 0))
            return self.send_error(416)
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(stored) - 1}/{len(stored)}")
        if self.server.lengths:
            self.send_header("Content-Length", str(len(stored) - start))
        self.end_headers()
        share = self.server.cuts.pop(0) if self.server.cuts else 1
        body = stored[start : start + int(share * (len(stored) - start))]
        self.server.log.append((self.path, self.headers["Range"], len(body)))
        self.wfile.write(body)

    def log_message(self, format, *args):
        """Silent: the server keeps its own log."""


@pytest.fixture
def server(monkeypatch):
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with Server(monkeypatch) as server:
        # A short poll, because the end of each test waits for it.
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache" / "disinhib" / "fashion-mnist"


@contextmanager
def port_that_refuses():
    """Bound but not listening, so that nobody else can answer there."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def parts(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.part"))


def test_download_once_into_the_cache(small, server, cache):
    server.mirror(small)
    first = load("fmnist")
    assert [path for path, _, _ in server.log] == [f"/0/{name}.gz" for name in FILES]
    assert all(asked is None for _, asked, _ in server.log)
    assert {f.name for f in cache.glob("*.gz")} == {f"{name}.gz" for name in FILES}
    assert parts(cache) == []
    second = load("fmnist")
    assert len(server.log) == 4  # nothing was asked for again
    np.testing.assert_array_equal(first.train.images, second.train.images)


def test_broken_connection_is_resumed_and_no_byte_sent_twice(small, server, cache):
    server.mirror(small)
    server.cuts = [0.4, 0.5]
    load("fmnist")
    stored = server.files[URL]
    first = int(0.4 * len(stored))
    second = int(0.5 * (len(stored) - first))
    assert server.first == [
        (URL, None, first),
        (URL, f"bytes={first}-", second),
        (URL, f"bytes={first + second}-", len(stored) - first - second),
    ]
    assert (cache / f"{FILES[0]}.gz").read_bytes() == stored
    assert parts(cache) == []


def test_the_next_process_resumes(small, server, cache):
    server.mirror(small)
    server.cuts = [0.4, 0]  # the second answer brings nothing: the mirror is given up
    refusal(load, "fmnist")
    stored = server.files[URL]
    first = int(0.4 * len(stored))
    (part,) = parts(cache)
    assert part.read_bytes() == stored[:first]
    assert list(cache.glob("*.gz")) == []  # nothing half-written under a final name
    load("fmnist")
    assert server.first[-1] == (URL, f"bytes={first}-", len(stored) - first)
    assert sum(sent for _, _, sent in server.first) == len(stored)


def test_part_that_is_whole_already_is_taken(small, server, cache):
    """A process killed between the last byte and the rename: the server answers 416."""
    server.mirror(small)
    server.cuts = [0.4, 0]
    refusal(load, "fmnist")
    (part,) = parts(cache)
    stored = server.files[URL]
    part.write_bytes(stored)
    load("fmnist")
    assert server.first[-1] == (URL, f"bytes={len(stored)}-", 0)
    assert (cache / f"{FILES[0]}.gz").read_bytes() == stored


def test_server_without_ranges_is_begun_anew(small, server, cache):
    server.mirror(small)
    server.ranges, server.cuts = False, [0.4]
    load("fmnist")
    stored = server.files[URL]
    assert [sent for _, _, sent in server.first] == [int(0.4 * len(stored)), len(stored)]
    assert (cache / f"{FILES[0]}.gz").read_bytes() == stored


def test_server_without_ranges_that_always_breaks_is_given_up(small, server):
    server.mirror(small)
    server.ranges, server.cuts = False, [0.4] * 9
    assert "could not be downloaded" in refusal(load, "fmnist")
    assert len(server.log) == 2  # the second try brought no more than the first


def test_silent_truncation_is_noticed_by_the_content(small, server, cache):
    """Without Content-Length only the file itself tells that it is short."""
    server.mirror(small, small)
    server.lengths, server.cuts = False, [0.4]
    load("fmnist")
    assert [path[:3] for path, _, _ in server.first] == ["/0/", "/1/"]
    assert parts(cache) == []


@pytest.mark.parametrize("first", [None, synthetic(seed=1)], ids=["nothing", "something else"])
def test_next_mirror_where_one_holds(first, small, server, cache):
    server.mirror(first, small)
    load("fmnist")
    assert [path[:3] for path, _, _ in server.first] == ["/0/", "/1/"]
    assert gzip.decompress((cache / f"{FILES[0]}.gz").read_bytes()) == small[FILES[0]]
    assert parts(cache) == []


def test_next_mirror_does_not_continue_the_part_of_another(small, server, cache):
    """Mirrors compress differently, so bytes of two must not be joined."""
    server.mirror(None, small)
    for name, content in small.items():
        server.files[f"/0/{name}.gz"] = gzip.compress(content, 1, mtime=7)
    server.cuts = [0.4, 0]
    load("fmnist")
    stored = server.files[f"/1/{FILES[0]}.gz"]
    assert server.first[-1] == (f"/1/{FILES[0]}.gz", None, len(stored))


def test_mirror_that_serves_plain_files(small, server):
    server.mirror(small, compressed=False)
    assert are(load("fmnist"), small)


def test_all_mirrors_fail(small, server, cache):
    server.mirror(None, synthetic(seed=1), None)
    with port_that_refuses() as port:
        mirrors = (*files_of("fmnist").mirrors[:2], f"http://127.0.0.1:{port}/")
        server.patch.setitem(DATASETS, "fmnist", with_files("fmnist", mirrors=mirrors))
        message = refusal(load, "fmnist")
    for part in (
        f"{mirrors[0]}: HTTPError 404",
        f"{mirrors[1]}: wrong content",
        f"{mirrors[2]}: ConnectionError",
        str(cache),
        "dataset.path",
        "$DISINHIB_DATA",
    ):
        assert part in message
    assert list(cache.glob("*.gz")) == [] and parts(cache) == []


def test_trials_that_start_together_download_once(small, server):
    server.mirror(small)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load("fmnist"), range(4)))
    assert sorted(path for path, _, _ in server.log) == sorted(f"/0/{name}.gz" for name in FILES)
    for splits in loaded:
        np.testing.assert_array_equal(splits.train.images, loaded[0].train.images)


def test_unwritable_cache_is_one_clear_line(small, server, tmp_path):
    server.mirror(small)
    (tmp_path / "cache").write_text("a file where the folder should be")
    message = refusal(load, "fmnist")
    assert "cannot be written" in message and "dataset.path" in message


# --- The configuration, and what importing costs ------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", DATASETS)
def test_shipped_configuration(name, loss):
    overrides = [f"dataset={name}", f"dataset/loss={loss}"]
    config = hydra_config.compose("train", overrides)[0]["dataset"]
    assert config["name"] == name and config["path"] is None and config["loss"]["name"] == loss
    assert config["dim_input"] == DATASETS[name].features
    assert config["dim_output"] == DATASETS[name].classes
    assert config["valid_split"] == (0.2 if name == "digits" else 0.1)
    assert config["OL_eval_subset_split"] == 0.1
    assert config["soft_targets"] is True and config["soft_target_val"] == 0.99


def test_an_entry_is_what_its_data_are():
    """Of the one that needs no file; `test_whole_sets` has the others."""
    splits = load("digits")
    for split in splits[:3]:
        assert split.images.shape[1] == DATASETS["digits"].features
        assert split.images.max() <= DATASETS["digits"].brightest
        assert set(split.labels) <= set(range(splits.classes))


@pytest.mark.parametrize(
    "sha256", [(), ("0" * 64,) * 3, ("0" * 63,) * 4, ("x" * 64,) * 4], ids=repr
)
def test_idx_files_without_a_hash_of_each_cannot_be(sha256):
    """They were taken for digits once."""
    with pytest.raises(ValueError, match="needs the SHA-256 of each of train-images"):
        IdxFiles("kmnist", sha256=sha256)


def test_import_stays_light():
    """What this module adds to what the package imports anyway."""
    heavy = {"ray", "mlflow", "optuna", "hydra", "jax", "sklearn", "requests"}
    code = (
        "import sys, disinhib; had = set(sys.modules); import disinhib.data;"
        f"print({heavy} & (set(sys.modules) - had))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"

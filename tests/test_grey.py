"""Colour images in grey, from small files of the published forms, their hashes in the table."""

import hashlib
import io
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from scipy.io import savemat

from disinhib.data import DATASETS, DataError, grey, load

RNG = np.random.default_rng(0)


def images(n):
    """`[n, 3, 32, 32]`."""
    return RNG.integers(0, 256, (n, 3, 32, 32)).astype(np.uint8)


def expected(colours):
    weights = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    exact = np.einsum("c,ncyx->nyx", weights, colours.astype(float))
    return exact.reshape(len(colours), -1)


@pytest.fixture
def plant(monkeypatch, tmp_path):
    def plant(name, files):
        entry = DATASETS[name]
        assert isinstance(entry.load, grey.Files)
        for file, content in files.items():
            (tmp_path / file).write_bytes(content)
        sha256 = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
        monkeypatch.setitem(DATASETS, name, replace(entry, load=replace(entry.load, sha256=sha256)))
        return str(tmp_path)

    return plant


def check(splits, train, test, labels):
    parts = (splits.validation, splits.train, splits.test)
    found = np.concatenate([part.images for part in parts]).astype(float)
    assert np.abs(found - expected(np.concatenate([train, test]))).max() < 0.501  # rounded
    assert np.concatenate([part.labels for part in parts]).tolist() == labels


def test_svhn(plant):
    train, test = images(10), images(3)

    def mat(colours, labels):
        file = io.BytesIO()
        savemat(file, {"X": colours.transpose(2, 3, 1, 0), "y": np.array(labels)[:, None]})
        return file.getvalue()

    files = {
        "train_32x32.mat": mat(train, [*range(1, 11)]),
        "test_32x32.mat": mat(test, [10, 1, 9]),
    }
    check(
        load("svhn-grey", plant("svhn-grey", files), 0.2), train, test, [*range(1, 10), 0, 0, 1, 9]
    )


def test_cifar10(plant):
    train, test = images(10), images(3)
    labels = [*range(10), 7, 7, 2]
    rows = [bytes([y]) + x.tobytes() for x, y in zip([*train, *test], labels, strict=True)]
    parts = {f"data_batch_{i + 1}.bin": rows[2 * i : 2 * i + 2] for i in range(5)}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in {**parts, "test_batch.bin": rows[10:]}.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(b"".join(content))
            archive.addfile(member, io.BytesIO(b"".join(content)))
    folder = plant("cifar10-grey", {"cifar-10-binary.tar.gz": packed.getvalue()})
    check(load("cifar10-grey", folder, 0.2), train, test, labels)


def test_files_that_are_missing_or_others_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"train_32x32.mat lies in none of .*: download it from"):
        load("svhn-grey", str(tmp_path))
    (tmp_path / "svhn").mkdir()
    (tmp_path / "svhn" / "train_32x32.mat").write_bytes(b"other")
    with pytest.raises(DataError, match="has the SHA-256 d9298a10d1b0735837dc4bd85dac641b0f3cef27"):
        load("svhn-grey", str(tmp_path))


def test_white_and_black_stay():
    ends = np.stack([np.zeros((3, 4)), np.full((3, 4), 255)]).astype(np.uint8)
    np.testing.assert_array_equal(grey.grey(ends), [[0] * 4, [255] * 4])

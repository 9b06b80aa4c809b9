"""A user's own arrays and tables: how they are read, and what is refused."""

import io

import numpy as np
import pytest

from disinhib import config, data, hydra_config, training
from disinhib.data import DataError, load, words
from disinhib.tuning import provenance

N = 40
Y = np.arange(N) % 4


@pytest.fixture
def save(tmp_path):
    def save(**arrays):
        np.savez(tmp_path / "mine.npz", **arrays)
        return str(tmp_path / "mine.npz")

    return save


@pytest.fixture
def table(tmp_path):
    def table(text):
        (tmp_path / "mine.csv").write_text(text, "utf-8")
        return str(tmp_path / "mine.csv")

    return table


def numbered(high: float = 200, kind: type = np.uint8, shape=(3, 2)):
    """Images that all differ; the first pixel of the last is `high`, of the first 0."""
    first = np.linspace(0, high, N).astype(kind)
    return np.broadcast_to(first[:, None, None], (N, *shape)).astype(kind)


def paired(split):
    """Whether each image of `numbered()` still has its label of Y."""
    (rows,) = np.nonzero(split.images[:, :1] == numbered()[:, 0, 0])[1:]
    return list(Y[rows]) == list(split.labels)


def refusal(path, **options):
    with pytest.raises(DataError) as refused:
        load("arrays", path, **options)
    message = str(refused.value)
    assert path in message and "\n" not in message
    return message


def inputs(split, splits):
    return split.images.astype(float) * splits.scale


@pytest.mark.parametrize(
    ("x", "y", "test"),
    [
        ("x_train", "y_train", ("x_test", "y_test")),  # as Keras' mnist.npz
        ("train_images", "train_labels", ("test_images", "test_labels")),  # as MedMNIST
        ("X", "y", ("X_test", "y_test")),
    ],
)
def test_splits_are_those_of_the_file(save, x, y, test):
    images = numbered()
    path = save(**{x: images, y: Y[:, None], test[0]: images[:8], test[1]: Y[:8]})
    splits = load("arrays", path, 0.25)
    sizes = [len(split.labels) for split in splits[:3]]
    assert sizes == [30, 10, 8] and splits.classes == 4
    np.testing.assert_array_equal(splits.test.images, images[:8].reshape(8, 6))
    together = np.concatenate([splits.train.images, splits.validation.images])[:, 0]
    assert sorted(together) == sorted(first := [*images[:, 0, 0]])  # disjoint, as all differ
    assert all(paired(split) for split in splits[:3])
    held = sorted(splits.validation.images[:, 0])
    assert held not in (first[:10], first[-10:])  # it is shuffled


def test_a_file_may_have_a_validation_set(save):
    images = numbered()
    held = {"X_valid": images[:5], "y_valid": Y[:5], "X_test": images[5:9], "y_test": Y[5:9]}
    splits = load("arrays", save(X=images[9:], y=Y[9:], **held), 0.9)
    np.testing.assert_array_equal(splits.train.images, images[9:].reshape(-1, 6))  # in its order
    np.testing.assert_array_equal(splits.train.labels, Y[9:])
    np.testing.assert_array_equal(splits.validation.labels, Y[:5])


def test_a_test_set_is_drawn_once_and_for_all(save):
    path = save(X=numbered(), y=Y)
    one, other = load("arrays", path), load("arrays", path, 0.3)
    assert len(one.test.labels) == 8
    np.testing.assert_array_equal(one.test.images, other.test.images)
    parts = [split.images[:, 0] for split in one[:3]]
    assert sorted(np.concatenate(parts)) == sorted(numbered()[:, 0, 0])
    assert all(paired(split) for split in one[:3])
    assert "no test set: 8 samples (20%) are drawn for it" in words("arrays", path)
    assert "by seed 0" in words("arrays", path)


@pytest.mark.parametrize(
    ("images", "low", "high", "kind", "said"),
    [
        (numbered(200), 0, 200, np.uint8, "scaled from 0 ... 200 to 0 ... 1"),
        (numbered(1000, np.int32), 0, 1000, np.float32, "scaled from 0 ... 1000 to"),
        (numbered(0.9, float), 0, 1, np.float32, "in [0, 1] as given"),
        (numbered(16, float), 0, 16, np.float32, "scaled from 0 ... 16 to"),
        (numbered(9, float) - 3, -3, 6, np.float32, "scaled from -3 ... 6 to"),
        (numbered(1) == 1, 0, 1, np.uint8, "scaled from 0 ... 1 to"),
    ],
)
def test_inputs_are_scaled_to_0_to_1_and_it_is_said(save, images, low, high, kind, said):
    path = save(X=images, y=Y, X_test=images, y_test=Y)
    splits = load("arrays", path)
    assert splits.test.images.dtype == kind
    expected = (images.reshape(N, -1).astype(float) - low) / (high - low)
    np.testing.assert_allclose(inputs(splits.test, splits), expected, atol=1e-7)  # of float32
    assert said in words("arrays", path)


def test_a_test_set_beyond_the_range_is_said(save):
    path = save(X=numbered(100), y=Y, X_test=numbered(200), y_test=Y)
    assert "test inputs then reach 0 ... 2" in words("arrays", path)


def test_other_arrays_are_ignored_and_named(save):
    path = save(X=numbered(), y=Y, feature_names=np.array(["a"]))
    assert "ignored: feature_names" in words("arrays", path)


def bad(array, index, value):
    changed = array.astype(float)
    changed[index] = value
    return changed


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"X": numbered()}, "X has no labels beside it"),
        ({"a": numbered(), "b": Y}, "holds a, b, needed are X and y"),
        ({"X": numbered(), "x": numbered(), "y": Y}, "could both be meant"),
        ({"X": numbered(), "y": Y[:-1]}, "X has 40 samples, but y 39"),
        ({"X": bad(numbered(), (3, 0, 0), np.nan), "y": Y}, "X has 1 number that is not finite"),
        ({"X": numbered().astype(str), "y": Y}, "X is of <U"),
        ({"X": numbered() * 1j, "y": Y}, "X is of complex128"),
        ({"X": Y, "y": Y}, "X has the shape (40,), needed is [samples, values ...]"),
        ({"X": np.zeros((N, 2)), "y": Y}, "X has one value only"),
        ({"X": numbered(), "y": 2 * Y}, "the training labels are 0, 2, 4, 6; needed are 0, 1, 2"),
        ({"X": numbered(), "y": Y + 1}, "the training labels are 1, 2, 3, 4; needed are 0"),
        ({"X": numbered(), "y": 0 * Y}, "the training labels are 0; needed are 0, 1"),
        ({"X": numbered(), "y": Y + 0.5}, "labels that are no whole numbers"),
        ({"X": numbered(), "y": np.eye(4)[Y]}, "give y.argmax(axis=1)"),
        ({"X": numbered(), "y": Y, "X_test": numbered(), "y_test": Y + 1}, "test labels have 4"),
        ({"X": numbered(), "y": Y, "X_test": numbered(shape=(2, 2)), "y_test": Y}, "has the shape"),
        ({"X": np.array([None, "x"], object), "y": Y}, "X holds Python objects"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_arrays_is_said_in_one_line(save, arrays, why):
    assert why in refusal(save(**arrays))


def saved(how, *arrays, **named):
    how(content := io.BytesIO(), *arrays, **named)
    return content.getvalue()


def damaged():
    """Cut, with compressed bytes that are none, and compressed in an unknown way: each is found out
    by another part of Python."""
    whole = saved(np.savez_compressed, X=numbered(), y=Y)
    data = 30 + len("X.npy") + int.from_bytes(whole[28:30], "little")  # after the first header
    unknown = bytearray(whole)
    unknown[8] = unknown[whole.index(b"PK\1\2") + 10] = 99  # the method, here and in the directory
    return whole[:-30], whole[:data] + b"\xff" * 8 + whole[data + 8 :], bytes(unknown)


def test_what_is_no_file_of_arrays_is_refused(tmp_path, table):
    file = tmp_path / "no.npz"
    for content in (b"nothing", *damaged(), saved(np.save, numbered())):
        file.write_bytes(content)
        assert "is no .npz" in refusal(str(file))
    assert "No such file" in refusal(str(tmp_path / "gone.npz"))
    (tmp_path / "mine.txt").write_text("1")
    assert "allowed is a file .npz or .csv" in refusal(str(tmp_path / "mine.txt"))


def rows(label="kind"):
    kinds = ("oak", "ash")
    lines = [f"{i},{100 * i % 7},7,{kinds[i % 2]}" for i in range(20)]
    return "\n".join([f"height,width,same,{label}", *lines])


def test_a_table_is_scaled_by_its_columns(table):
    path = table(rows())
    splits = load("arrays", path)
    assert splits.classes == 2 and splits.train.images.shape[1] == 3
    kept = np.concatenate([splits.train.images, splits.validation.images])
    np.testing.assert_allclose(kept.min(axis=0), 0)
    np.testing.assert_allclose(kept.max(axis=0), [1, 1, 0])
    said = words("arrays", path)
    assert "classes are 0 ash, 1 oak" in said and "the class is in the column kind" in said


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is no table"),
        ("a\n1", "1 columns"),
        ("a,y,label\n1,0,1", "y and label could both be the class"),
        ("a,y\nx,0\nz,1", "the column a holds"),
        ("a,y\n1,0\n,1\n2,0", "not finite"),
        ("a,y\n1,0\n2,\n3,1", "the column y lacks 1 labels"),
        ("a,y\n1,0\n2,1", "too few for a test set"),
        (",a,y\n0,1,0\n1,2,1", "1 of its columns have no name"),
        ("5,0,0.1\n3,0,0.2", "has no header: its first line is 5, 0, 0.1"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_in_one_line(table, text, why):
    assert why in refusal(table(text))


def test_sizes_come_from_the_file(save):
    given = ["dataset=arrays", f"dataset.path={save(X=numbered(), y=Y)}", "batchsize=5"]
    options, choices = hydra_config.compose("train", given)
    run = config.parse(options)
    assert run.architecture.sizes == (6, 256, 256, 256, 4)
    training.check_data(run)
    again, _ = hydra_config.compose("train", [*given, "dataset.dim_output=4"])
    assert again == options and "dim_input=6" in hydra_config.command(options, choices)
    other, _ = hydra_config.compose("train", [*given, "dataset.dim_output=5"])
    with pytest.raises(config.ConfigError, match=r"dim_output: given 5, allowed is 4 \(arrays\)"):
        training.check_data(config.parse(other))


def test_a_file_that_changes_is_read_again(save):
    given = ["dataset=arrays", f"dataset.path={save(X=numbered(), y=Y)}", "batchsize=5"]
    run = config.parse(hydra_config.compose("train", given)[0])
    source = (run.dataset, run.dataset_path, run.valid_split)
    seen = lambda: (training.prepare(run).train.images, provenance.decisive(source)["data"])
    images, recorded = seen()
    save(X=numbered()[::-1], y=Y)
    changed, recorded_now = seen()
    assert not np.array_equal(images, changed) and recorded != recorded_now


def test_a_validation_set_of_its_own_is_not_drawn(save):
    parts = {"x_train": numbered(), "y_train": Y, "x_valid": numbered(), "y_valid": Y}
    file = save(**parts, x_test=numbered(), y_test=Y)
    with pytest.raises(data.DataError, match=r"valid_seed must be null, .* \(got 3\)"):
        data.load("arrays", str(file), 0.1, 3)


def test_the_seed_that_draws_validation_is_told(save):
    file = str(save(x_train=numbered(), y_train=Y, x_test=numbered(), y_test=Y))
    assert data.load("arrays", file).words.endswith("validation is their first dataset.valid_split")
    assert data.load("arrays", file, 0.1, 3).words.endswith("; validation is drawn by the seed 3")


def test_a_path_is_needed():
    options, _ = hydra_config.compose("train", ["dataset=arrays"])
    with pytest.raises(config.ConfigError, match=r"dataset\.path: given null, allowed is a file"):
        config.parse(options)


def test_floats_are_trained_as_whole_numbers_are(save):
    """Eighths of 8, which float32 holds exactly, and their whole numbers: the same training."""
    x = np.random.default_rng(0).integers(0, 9, (N, 6))
    x[0, 0] = 8
    small = ["model.vf.nb_hidden=1", "model.vf.sizes_hidden=[4]", "epochs=2", "batchsize=5"]
    seen = []
    for images in (x, x / 8):
        split = {"X_test": images, "y_test": Y}
        given = ["dataset=arrays", f"dataset.path={save(X=images, y=Y, **split)}", *small]
        run = config.parse(hydra_config.compose("train", given)[0])
        state = training.train(run, [0], lambda state, metrics: None)
        seen.append(state.parameters["kernel_out"])
    np.testing.assert_array_equal(*seen)


def test_data_of_another_name_say_nothing():
    assert data.words("digits", None) == ""

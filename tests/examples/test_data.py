"""Data sets: what is read, what is refused, and the order in which batches come."""

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from cifar_files import python2_batch
from examples.paper import cifar, data

pytest.importorskip("sklearn")
NAMES = (*cifar.TRAIN_NAMES, cifar.TEST_NAME)


def rows_of(index: int, n: int = 12) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(index)
    return rng.integers(0, 256, (n, cifar.PIXELS), dtype=np.uint8), [i % 10 for i in range(n)]


def write_folder(parent: Path, suffix: str, n: int = 12) -> Path:
    folder = parent / cifar.FOLDERS[suffix]
    folder.mkdir()
    for index, name in enumerate(NAMES):
        pixels, labels = rows_of(index, n)
        if suffix:
            rows = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], 1)
            (folder / (name + suffix)).write_bytes(rows.tobytes())
        else:
            batch = {b"batch_label": b"one", b"labels": labels, b"data": pixels}
            batch[b"filenames"] = [f"{i}.png".encode() for i in range(n)]
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


@pytest.mark.parametrize("suffix", [".bin", ""])
@pytest.mark.parametrize("parent", [False, True])
def test_both_cifar_versions_give_their_rows(tmp_path, suffix, parent):
    folder = write_folder(tmp_path, suffix)
    (images, labels), (test_images, test_labels) = cifar.read_folder(tmp_path if parent else folder)
    assert images.shape == (60, 3, 32, 32) and images.dtype == np.uint8
    assert test_images.shape == (12, 3, 32, 32) and test_labels.dtype == np.int64
    for index in range(5):
        pixels, expected = rows_of(index)
        np.testing.assert_array_equal(images[index * 12 :][:12].reshape(12, -1), pixels)
        np.testing.assert_array_equal(labels[index * 12 :][:12], expected)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_batches_of_every_pickle_protocol_can_be_read(tmp_path, protocol):
    pixels, labels = rows_of(0)
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps({b"data": pixels, b"labels": labels}, protocol=protocol))
    images, _ = cifar.read_pickle(path)
    np.testing.assert_array_equal(images.reshape(12, -1), pixels)


def test_a_python_2_batch_can_be_read(tmp_path):
    pixels, labels = rows_of(3)
    path = tmp_path / "batch"
    path.write_bytes(python2_batch(pixels, labels))
    assert pickle.loads(path.read_bytes(), encoding="bytes")[b"labels"] == labels  # a valid pickle
    images, read = cifar.read_pickle(path)
    np.testing.assert_array_equal(images.reshape(12, -1), pixels)
    assert read.tolist() == labels


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class HugeArray:
    def __reduce__(self):
        make, args, state = np.zeros((1, 1), np.uint8).__reduce__()
        return make, args, (state[0], (2**40, 3072), *state[2:])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (Call(os.system, "touch {marker}"), "system"),
        (Call(eval, "open({marker!r}, 'w')"), "eval"),
        (Call(getattr, Path, "home"), "getattr"),
        ({b"data": np.array([[None]]), b"labels": [1]}, "not numeric"),
        ({b"data": HugeArray(), b"labels": [1]}, "does not fit"),
        ({b"data": Call(np.ndarray, (2**40,)), b"labels": [1]}, "directly"),
        ({b"data": np.zeros((1, 3071), np.uint8), b"labels": [1]}, "3071"),
        ({b"data": np.zeros((1, 3072), np.int8), b"labels": [1]}, "int8"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, "label"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [2**70]}, "label"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [-1]}, "label"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [True]}, "ints"),
        ({b"data": np.zeros((1, 3072), np.uint8), b"labels": [1, 2]}, "2 labels"),
        ({b"data": np.zeros((0, 3072), np.uint8), b"labels": []}, "bytes"),
        ({b"labels": [1]}, "data"),
        ([1, 2], "dict"),
    ],
)
def test_pickles_of_anything_else_are_refused(tmp_path, content, reason):
    marker = tmp_path / "marker"
    if isinstance(content, Call):
        function, args = content.call
        filled = (a.format(marker=str(marker)) if isinstance(a, str) else a for a in args)
        content = Call(function, *filled)
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match=reason) as caught:
        cifar.read_pickle(path)
    assert str(path) in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80\x02r\xff\xff\xff\x7f.",  # a memo slot that would be gigabytes of table
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00.",  # bytes of a claimed 2**40
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",  # the same as a bytearray
        b"\x80\x02}.trailing",
        b"",
    ],
)
def test_pickles_that_claim_more_than_they_hold_are_refused(tmp_path, raw):
    path = tmp_path / "data_batch_1"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="data_batch_1"):
        cifar.read_pickle(path)


def test_a_pickle_leaves_nothing_behind_in_the_stand_ins(tmp_path):
    # BUILD with (None, {...}) sets attributes on whatever lies on the stack.
    path = tmp_path / "data_batch_1"
    path.write_bytes(b"\x80\x02cnumpy\ndtype\n(N}U\x04callNstb.")
    with pytest.raises(ValueError, match="state of a function"):
        cifar.read_pickle(path)
    test_a_python_2_batch_can_be_read(tmp_path)


@pytest.mark.parametrize("suffix", [".bin", ""])
def test_mutated_files_are_read_or_refused_by_name(tmp_path, suffix):
    folder = write_folder(tmp_path, suffix, n=2)
    path = folder / (NAMES[0] + suffix)
    original = path.read_bytes()
    reader = cifar.read_binary if suffix else cifar.read_pickle
    # The interesting bytes are those around the pixels.
    pixels = original.find(rows_of(0, 2)[0].tobytes()[:16].decode("latin1").encode("utf-8"))
    structure = [i for i in range(len(original)) if suffix or not 0 <= pixels < i < pixels + 8000]
    rng = random.Random(7)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(600):
        content = bytearray(original)
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.choice(structure) % max(1, len(content))
            kind = rng.random()
            if kind < 0.6:
                content[at : at + 1] = bytes([rng.randrange(256)])
            elif kind < 0.75:
                del content[at : at + rng.choice((1, 2, 50))]
            elif kind < 0.9:
                content[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4))))
            else:
                del content[at:]
        path.write_bytes(content)
        try:
            images, labels = reader(path)
        except ValueError as error:
            assert str(path) in str(error)
            outcomes["refused"] += 1
        else:
            assert images.dtype == np.uint8 and images.shape[1:] == (3, 32, 32)
            assert len(images) == len(labels) and labels.min() >= 0 and labels.max() <= 9
            outcomes["read"] += 1
    assert min(outcomes.values()) > 20, outcomes


@pytest.mark.parametrize(
    ("size", "label"), [(0, 0), (3072, 0), (3073 * 2 - 1, 0), (3073 * 2 + 1, 0), (3073, 10)]
)
def test_a_malformed_binary_file_is_named_with_its_size(tmp_path, size, label):
    folder = write_folder(tmp_path, ".bin")
    path = folder / "data_batch_3.bin"
    path.write_bytes(bytes([label]) * size)
    with pytest.raises(ValueError) as caught:
        data.load(folder)
    assert str(path) in str(caught.value)
    assert (str(label) if label else str(size)) in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        data.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        data.load(tmp_path)
    folder = write_folder(tmp_path, ".bin")
    (folder / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4.bin"):
        data.load(tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        data.load(folder / "data_batch_1.bin")


def test_classes_are_selected_and_renumbered(tmp_path):
    folder = write_folder(tmp_path, ".bin")
    everything, some = data.load(folder), data.load(folder, (7, 1))
    assert some.classes == (7, 1)
    is_seven = everything.train.labels == 7
    torch.testing.assert_close(
        some.train.images[some.train.labels == 0], everything.train.images[is_seven]
    )
    assert len(some.train) == int(is_seven.sum() + (everything.train.labels == 1).sum())
    for classes, reason in (((1,), "1"), ((1, 1), "1,1"), ((0, 12), "0,12"), ((), "none")):
        with pytest.raises(ValueError, match=f"classes.*got {reason}"):
            data.load(folder, classes)


def test_an_absent_class_is_named(tmp_path):
    folder = write_folder(tmp_path, ".bin", n=4)  # labels 0..3 only
    with pytest.raises(ValueError, match="no training images of class 8"):
        data.load(folder, (0, 8))


def test_training_rows_are_standardised_per_channel(tmp_path):
    for dataset in (data.load("digits"), data.load(write_folder(tmp_path, ".bin"))):
        pixels = dataset.standardise(dataset.train.images).double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(
            pixels.mean(1), torch.zeros_like(pixels[:, 0]), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            pixels.std(1, correction=0), torch.ones_like(pixels[:, 0]), atol=1e-5, rtol=0
        )


def test_digits_split_is_fixed_and_disjoint():
    one, two = data.load("digits"), data.load("digits")
    assert one.fingerprint() == two.fingerprint()
    assert one.train.images.shape == (1437, 1, 8, 8) and len(one.test) == 360
    train = {image.numpy().tobytes() for image in one.train.images}
    assert not any(image.numpy().tobytes() in train for image in one.test.images)
    assert data.load("digits", (3, 4)).fingerprint() != one.fingerprint()


def test_augmentation_is_a_shift_and_a_flip_and_follows_its_generator():
    images = torch.randint(1, 256, (64, 3, 10, 10), dtype=torch.uint8)
    before = images.clone()
    got = data.augment_batch(images, torch.Generator().manual_seed(3))
    torch.testing.assert_close(images, before)
    assert got.dtype == torch.uint8 and got.shape == images.shape
    torch.testing.assert_close(got, data.augment_batch(images, torch.Generator().manual_seed(3)))
    assert not torch.equal(got, data.augment_batch(images, torch.Generator().manual_seed(4)))
    padded = torch.nn.functional.pad(images, (4,) * 4)
    seen = set()
    for source, image in zip(padded, got, strict=True):
        crops = {
            (dy, dx, flip): source[:, dy : dy + 10, dx : dx + 10].flip(-1)
            if flip
            else source[:, dy : dy + 10, dx : dx + 10]
            for dy in range(9)
            for dx in range(9)
            for flip in (False, True)
        }
        matches = [how for how, crop in crops.items() if torch.equal(crop, image)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len({flip for *_, flip in seen}) == 2
    assert len({dy for dy, *_ in seen}) > 5 and len({dx for _, dx, _ in seen}) > 5


def test_an_epoch_visits_every_row_once_in_an_order_of_seed_and_epoch():
    dataset = data.load("digits")

    def orders(seed: int) -> list[torch.Tensor]:
        loader = data.BatchLoader(dataset, 479, seed)  # 1437 = 3 * 479
        return [torch.cat([loader.next()[0] for _ in range(3)]) for _ in range(2)]

    one, again, other = orders(1), orders(1), orders(2)
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1])
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[0], other[0])
    every_row = dataset.standardise(dataset.train.images).flatten(1).sum(1).sort().values
    for epoch in one:
        torch.testing.assert_close(epoch.flatten(1).sum(1).sort().values, every_row)


@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [(500, [500, 500, 437]), (600, [600, 600]), (1437, [1437]), (4000, [1437])],
)
def test_a_partial_batch_counts_from_half_a_batch(batch_size, sizes):
    loader = data.BatchLoader(data.load("digits"), batch_size)
    assert loader.steps_per_epoch == len(sizes)
    assert [len(loader.next()[1]) for _ in sizes] == sizes
    assert (loader.epoch, loader.batch) == (1, 0)


@pytest.mark.parametrize("taken", [0, 1, 3, 4, 7])
def test_a_loader_goes_on_where_another_stopped(tmp_path, taken):
    dataset = data.load(write_folder(tmp_path, ".bin"))

    def loader() -> data.BatchLoader:
        return data.BatchLoader(dataset, 15, seed=5, augment=True)  # 4 batches an epoch

    one, two = loader(), loader()
    for _ in range(taken):
        one.next()
    two.load_state_dict(one.state_dict())
    for _ in range(6):
        for a, b in zip(one.next(), two.next(), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match="no batch 9"):
        two.load_state_dict(one.state_dict() | {"batch": 9})

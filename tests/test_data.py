"""Every format, written here from small arrays, is read back pixel by pixel."""

import contextlib
import errno
import gzip
import io
import json
import os
import pickle
import random
import struct
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from zskt.data import matlab, sources
from zskt.data.images import KNOWN, Dataset, digits, read
from zskt.errors import UsageError, ZsktError

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZSKT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Pillow's `open`, its calls counted."""
    watched = Mock(wraps=Image.open)
    monkeypatch.setattr(Image, "open", watched)
    return watched


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    """(H, W) or (H, W, 3) as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    return file.getvalue()


def write_folder(folder: Path, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


def write_zip(path: Path, files: dict[str, bytes]) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return str(path)


def write_tar(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return str(path)


def chw(array: np.ndarray) -> torch.Tensor:
    """(..., H, W, C) -> (..., C, H, W)"""
    return torch.from_numpy(np.moveaxis(array, -1, -3).copy())


def same(dataset: Dataset, images: torch.Tensor, labels: list[int]) -> None:
    assert dataset.images.dtype == torch.uint8
    assert dataset.labels.dtype == torch.int64
    assert torch.equal(dataset.images, images)
    assert dataset.labels.tolist() == labels


def refused(words: str, *sources: str | Path, split: Any = "test", kind: type[ZsktError] = ZsktError) -> None:
    with pytest.raises(kind, match=words):
        read([str(source) for source in sources], split)


# Images as split/class/file


def test_a_folder_is_read_in_order_of_class_and_name(tmp_path: Path) -> None:
    a, b, c = pixels(3, 5, 6, 3)
    files = {"test/dog/1.png": png(a), "test/cat/2.png": png(b), "test/cat/1.png": png(c), "train/cat/9.png": png(a)}
    result = read([write_folder(tmp_path / "pets", {**files, "train/dog/1.png": png(b)})], "test")
    same(result, chw(np.stack([c, b, a])), [0, 0, 1])
    assert result.class_names == ("cat", "dog")
    assert result.name == "images"


def test_zips_are_merged_below_a_top_folder(tmp_path: Path) -> None:
    images = pixels(4, 4, 4, 3)
    names = ["pets/train/cat/1.png", "pets/train/dog/1.png", "pets/train/cat/2.png", "pets/train/dog/0.png"]
    one = write_zip(tmp_path / "a.zip", {name: png(image) for name, image in zip(names[:2], images[:2], strict=True)})
    two = write_zip(tmp_path / "b.bin", {name: png(image) for name, image in zip(names[2:], images[2:], strict=True)})
    rest = write_zip(tmp_path / "test.zip", {"pets/test/cat/1.png": png(images[0])})
    for order in ([one, two, rest], [rest, two, one]):
        same(read(order, "train"), chw(images[[0, 2, 3, 1]]), [0, 0, 1, 1])
    same(read([one, two, rest], "test"), chw(images[:1]), [0])


def test_a_zip_and_its_unpacked_folder_are_the_same_data(tmp_path: Path) -> None:
    files = {f"test/{label}/{i}.png": png(pixels(3, 3)) for label in "ab" for i in range(3)}
    unpacked, packed = write_folder(tmp_path / "x", files), write_zip(tmp_path / "x.zip", files)
    one, two = read([unpacked], "test"), read([packed], "test")
    assert torch.equal(one.images, two.images)
    assert one.images.shape == (6, 1, 3, 3)
    refused("is the same image as", unpacked, packed)


def test_a_class_may_have_the_name_of_a_split(tmp_path: Path) -> None:
    cat, train = pixels(2, 4, 4)
    folder = write_folder(tmp_path / "x", {"train/train/deep/1.png": png(train), "train/cat/1.png": png(cat)})
    result = read([folder], "train")
    same(result, torch.from_numpy(np.stack([cat, train]))[:, None], [0, 1])
    assert result.class_names == ("cat", "train")


def test_test_labels_follow_the_train_classes(tmp_path: Path) -> None:
    image = png(pixels(4, 4))
    folder = write_folder(tmp_path / "x", {"train/a/1.png": image, "train/b/1.png": image, "test/b/2.png": image})
    result = read([folder], "test")
    assert result.labels.tolist() == [1]
    refused("test has a class 'c' that train lacks", write_folder(tmp_path / "x", {"test/c/1.png": image}))


def test_validation_replaces_a_missing_test_split_with_a_notice(tmp_path: Path) -> None:
    image = pixels(4, 4)
    folder = write_folder(tmp_path / "x", {"val/a/1.png": png(image)})
    said: list[str] = []
    same(read([folder], "test", notice=said.append), torch.from_numpy(image)[None, None], [0])
    assert said == ["no split test found, using val"]
    refused("expected images of split train, found only val", folder, split="train")


def test_cifar10_is_recognised_by_its_classes(tmp_path: Path) -> None:
    files = {f"test/{name}/1.png": png(pixels(32, 32, 3)) for name in KNOWN["cifar10"].class_names}
    assert read([write_folder(tmp_path / "x", files)], "test").name == "cifar10"


def test_hidden_and_other_files_are_ignored(tmp_path: Path) -> None:
    image = pixels(4, 4, 3)
    files = {
        "test/a/1.png": png(image),
        "test/a/.2.png": b"",
        ".git/test/a/3.png": b"",
        "__MACOSX/test/a/._1.png": b"",
        "test/a/notes.txt": b"",
        "README": b"",
    }
    for source in (write_folder(tmp_path / "x", files), write_zip(tmp_path / "x.zip", files)):
        same(read([source], "test"), chw(image[None]), [0])


def test_symbolic_links_are_not_followed(tmp_path: Path) -> None:
    outside = write_folder(tmp_path / "outside", {"1.png": png(pixels(4, 4))})
    folder = write_folder(tmp_path / "x", {"test/a/1.png": png(pixels(4, 4))})
    (tmp_path / "x/test/b").symlink_to(outside)
    (tmp_path / "x/test/a/2.png").symlink_to(Path(outside, "1.png"))
    said: list[str] = []
    result = read([folder], "test", notice=said.append)
    assert (result.class_names, len(result.images)) == (("a",), 1)
    assert len(said) == 1
    assert "links are not followed, 2 found" in said[0]


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "x", {f"test/a/{i:03}.png": png(pixels(2, 2)) for i in range(300)})
    calls: list[tuple[int, int]] = []
    read([folder], "test", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (300, 300)
    assert calls == sorted(set(calls))
    assert len(calls) > 1


@pytest.mark.parametrize("kind", ["P", "RGBA", "1"])
def test_other_pillow_modes_become_bytes(tmp_path: Path, kind: str) -> None:
    image = Image.fromarray(pixels(6, 6, 3)).convert(kind)
    image.save(tmp_path / "image.png")
    folder = write_folder(tmp_path / "x", {"test/a/1.png": (tmp_path / "image.png").read_bytes()})
    result = read([folder], "test", notice=lambda line: None).images
    expected = np.asarray(image.convert("L" if kind == "1" else "RGB")).reshape(6, 6, -1)
    assert torch.equal(result, chw(expected[None]))


# Another size


def test_images_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "x", {"test/a/1.png": png(pixels(4, 4)), "test/a/2.png": png(pixels(4, 5))})
    refused(r"\(1, 4, 4\) in .*1.png and \(1, 4, 5\) in .*2.png; resize them", folder)
    assert read([folder], "test", size=(1, 4, 4), notice=lambda line: None).images.shape == (2, 1, 4, 4)


@pytest.mark.parametrize("wide", [True, False])
def test_the_shorter_side_is_fitted_and_the_rest_centre_cropped(tmp_path: Path, wide: bool) -> None:
    image = np.zeros((8, 32, 3), np.uint8)
    image[:, 8:24] = 200  # the middle half
    image[:, 15:17] = 100
    if not wide:
        image = image.transpose(1, 0, 2).copy()
    folder = write_folder(tmp_path / "x", {"test/a/1.png": png(image)})
    result = read([folder], "test", size=(3, 4, 4), notice=lambda line: None).images[0]
    small = Image.fromarray(image).resize((16, 4) if wide else (4, 16), Image.Resampling.BILINEAR)
    whole = chw(np.asarray(small))
    assert torch.equal(result, whole[:, :, 6:10] if wide else whole[:, 6:10])
    assert result.max() == 200


def test_resizing_is_antialiased(tmp_path: Path) -> None:
    board = ((np.indices((32, 32)).sum(0) % 2) * 255).astype(np.uint8)
    folder = write_folder(tmp_path / "x", {"test/a/1.png": png(board)})
    result = read([folder], "test", size=(1, 4, 4), notice=lambda line: None).images.float()
    assert (result - 127.5).abs().max() < 2


def test_each_conversion_has_one_notice_also_from_the_cache(tmp_path: Path) -> None:
    files = {f"test/a/{i}.png": png(pixels(4, 4)) for i in range(3)} | {"test/a/8.png": png(pixels(8, 8, 3))}
    folder = write_folder(tmp_path / "x", files)
    for _ in range(2):
        said: list[str] = []
        result = read([folder], "test", size=(3, 8, 8), notice=said.append)
        assert said == [
            "3 of 4 images converted from greyscale to colour",
            "3 of 4 images resized and centre-cropped to 8 x 8",
        ]
    assert torch.equal(result.images[:3, 0], result.images[:3, 2])


def test_notices_go_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read([write_folder(tmp_path / "x", {"test/a/1.png": png(pixels(4, 4, 3))})], "test", size=(1, 4, 4))
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == "1 of 1 images converted from colour to greyscale\n"


def test_arrays_are_resized_like_images(tmp_path: Path) -> None:
    images, labels = pixels(5, 28, 20), np.arange(5, dtype=np.uint8)
    folder = write_folder(tmp_path / "x", idx_files("train", images, labels))
    said: list[str] = []
    result = read([folder], "train", size=(3, 10, 10), notice=said.append)
    files = {f"train/{i}/1.png": png(image) for i, image in enumerate(images)}
    expected = read([write_folder(tmp_path / "y", files)], "train", size=(3, 10, 10), notice=lambda line: None)
    same(result, expected.images, [0, 1, 2, 3, 4])
    assert len(said) == 2


@pytest.mark.parametrize("size", [(2, 8, 8), (3, 0, 8), (3, 8)])
def test_an_impossible_size_is_refused(size: Any) -> None:
    with pytest.raises(UsageError, match="expected a size"):
        read(["digits"], "test", size=size)


# The cache


def small_zip(path: Path) -> str:
    return write_zip(path, {f"test/{label}/{i}.png": png(pixels(4, 4, 3)) for label in "ab" for i in range(4)})


def test_a_second_read_comes_from_the_cache(tmp_path: Path, opened: Mock) -> None:
    source = small_zip(tmp_path / "x.zip")
    first = read([source], "test")
    assert opened.call_count == 9  # the header of the first one tells the size of all
    second = read([source], "test")
    assert opened.call_count == 9
    same(second, first.images, first.labels.tolist())
    assert (second.class_names, second.name) == (first.class_names, first.name)
    read([source], "test", size=(3, 2, 2), notice=lambda line: None)
    assert opened.call_count == 17


def test_the_cache_holds_no_pickle_and_does_not_change_with_the_images(tmp_path: Path, cache: Path) -> None:
    images = read([small_zip(tmp_path / "x.zip")], "test").images
    (about,), (array,) = cache.glob("*.json"), cache.glob("*.npy")
    assert set(json.loads(about.read_text())) == {"sha256", "notices"}
    assert np.load(array, allow_pickle=False).shape == (8, 3, 4, 4)
    before = array.read_bytes()
    images.zero_()
    assert array.read_bytes() == before


@pytest.mark.parametrize("packed", [True, False])
def test_changed_content_is_decoded_again(tmp_path: Path, packed: bool) -> None:
    files = {"test/a/1.png": png(pixels(4, 4)), "test/b/1.png": png(pixels(4, 4))}
    for _ in range(2):
        changed = pixels(4, 4)
        files["test/b/1.png"] = png(changed)
        source = write_zip(tmp_path / "x.zip", files) if packed else write_folder(tmp_path / "x", files)
        assert torch.equal(read([source], "test").images[1, 0], torch.from_numpy(changed))


@pytest.mark.parametrize("damage", ["flip", "truncate", "json", "list"])
def test_a_damaged_cache_is_not_trusted(tmp_path: Path, cache: Path, opened: Mock, damage: str) -> None:
    source = small_zip(tmp_path / "x.zip")
    first = read([source], "test").images.clone()
    (array,), (about,) = cache.glob("*.npy"), cache.glob("*.json")
    content = bytearray(array.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
        array.write_bytes(content)
    elif damage == "truncate":
        array.write_bytes(content[:-5])
    else:
        about.write_text("{" if damage == "json" else "[]")
    for _ in range(2):
        assert torch.equal(read([source], "test").images, first)
        assert opened.call_count == 18  # the second time the repaired cache serves


def test_an_unwritable_cache_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = small_zip(tmp_path / "x.zip")
    expected = read([source], "test").images
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZSKT_CACHE", str(tmp_path / "file" / "cache"))
    said: list[str] = []
    assert torch.equal(read([source], "test", notice=said.append).images, expected)
    assert len(said) == 1
    assert "not cached" in said[0]


def test_the_cache_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZSKT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    read([small_zip(tmp_path / "x.zip")], "test")
    assert len(list((tmp_path / "xdg/zskt").glob("*.npy"))) == 1


# Broken and missing images


@pytest.mark.parametrize("content", [b"", b"no image", png(pixels(40, 40, 3))[:-200]])
def test_a_broken_image_is_named_and_leaves_nothing_in_the_cache(tmp_path: Path, cache: Path, content: bytes) -> None:
    files = {"test/a/1.png": png(pixels(40, 40, 3)), "test/a/2.png": content}
    for source in (write_folder(tmp_path / "x", files), write_zip(tmp_path / "x.zip", files)):
        refused(r"test/a/2\.png (is not an image|cannot be decoded)", source)
    assert list(cache.iterdir()) == []


def test_a_decompression_bomb_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow warns above this and raises above twice as much
    folder = write_folder(tmp_path / "x", {"test/a/1.png": png(pixels(10, 15))})
    refused(r"1\.png cannot be decoded .*exceeds limit", folder)


def test_sixteen_bit_images_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "x", {"test/a/1.png": png(np.full((4, 4), 40000, np.uint16))})
    refused("expected 8 bits per channel, found mode I;16", folder)


def test_encrypted_and_damaged_zip_members_are_refused(tmp_path: Path) -> None:
    content = png(pixels(4, 4))
    path = Path(write_zip(tmp_path / "x.zip", {"test/a/1.png": content}))
    plain = path.read_bytes()
    encrypted = bytearray(plain)
    encrypted[6] |= 1  # the flag in the member's own header
    encrypted[plain.index(b"PK\x01\x02") + 8] |= 1  # and in the directory
    path.write_bytes(encrypted)
    refused(r"1\.png.* is encrypted", path)
    path.write_bytes(plain.replace(content[20:40], bytes(20)))
    refused(r"test/a/1\.png cannot be read .*CRC", path)
    path.write_bytes(plain[: len(plain) // 2])
    refused("expected images as split/class/file", path)


def test_a_member_that_claims_to_be_huge_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST", 1000)
    source = write_zip(tmp_path / "x.zip", {"test/a/1.png": bytes(1001)})
    refused("expected at most 1,000 bytes, found 1,001", source)


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SMALL", 10_000, raising=False)
    with zipfile.ZipFile(tmp_path / "zeros.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("test/a/1.bmp", bytes(2_000_000))
    refused(r"1\.bmp is a decompression bomb", tmp_path / "zeros.zip")
    labels = gzip.compress(bytes(2_000_000))
    files = {"t10k-images-idx3-ubyte.gz": labels, "t10k-labels-idx1-ubyte.gz": labels}
    refused("a decompression bomb", write_folder(tmp_path / "idx", files))
    zipped = write_folder(tmp_path / "zipped", {"test/a/1.png": gzip.compress(png(pixels(4, 4)))})
    refused("is not an image of a known format", zipped)


def test_postscript_is_no_image(tmp_path: Path) -> None:
    """Pillow would start Ghostscript on it."""
    picture = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(picture, "EPS")
    refused("is not an image of a known format", write_folder(tmp_path / "x", {"test/a/1.png": picture.getvalue()}))


def test_gzip_content_is_never_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST", 10_000)
    files = idx_files("t10k", pixels(20, 28, 28), np.zeros(20, np.uint8))
    packed = write_folder(tmp_path / "idx", {f"{name}.gz": gzip.compress(content) for name, content in files.items()})
    refused(r"expected at most 10,000|over 10,000 bytes", packed)


def test_few_large_files_are_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = {f"test/a/{i}.png": png(pixels(16, 16)) for i in range(6)}
    most = 2 * max(map(len, images.values()))
    monkeypatch.setattr("zskt.data.decode._GROUP_BYTES", most)
    done: list[int] = []
    folder = write_folder(tmp_path / "images", images)
    read([folder], "test", progress=lambda images, total: done.append(images))
    assert done == [2, 4, 6]


@pytest.mark.parametrize("shape", [(1, 6_000_000), (6_000_000, 1)])
def test_images_too_long_to_be_resized_are_refused(shape: tuple[int, int], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "images", {"test/a/long.png": png(np.zeros(shape, np.uint8))})
    with pytest.raises(ZsktError, match=r"long\.png: .* is too elongated .* to 32 x 32"):
        read([folder], "test", size=(3, 32, 32))


@pytest.mark.parametrize("size", [-512, -1024])
def test_a_tar_with_a_negative_size_is_no_archive(size: int, tmp_path: Path) -> None:
    entry = tarfile.TarInfo("test/a/1.png")
    header = bytearray(entry.tobuf())
    header[124:136] = b"\xff" * 10 + (size & 0xFFFF).to_bytes(2)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + sum(header[156:]) + 8 * 32)
    (tmp_path / "negative.tar").write_bytes(bytes(header) + bytes(10_240))
    refused(r"negative\.tar", tmp_path / "negative.tar")


@pytest.mark.parametrize("mode", ["bz2", "xz"])
def test_other_compressions_of_a_tar_are_named(mode: Any, tmp_path: Path) -> None:
    path = tmp_path / f"images.tar.{mode}"
    writing: Any = f"w:{mode}"
    with tarfile.open(path, writing) as archive:
        archive.add(__file__, "test/a/1.png")
    refused(r"expected .zip, .tar or .tar.gz, found .*images.tar.*compressed otherwise", path)


def test_the_expected_layout_is_in_the_error_for_another(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(r"expected images as split/class/file .* found nothing", tmp_path / "empty")
    flat = write_folder(tmp_path / "flat", {"cat/1.png": png(pixels(4, 4))})
    refused(r"expected images as split/class/file .* found only files such as .*cat/1\.png", flat)


def test_sources_of_two_formats_are_refused(tmp_path: Path) -> None:
    pets = write_folder(tmp_path / "pets", {"test/cat/1.png": png(pixels(28, 28))})
    idx = write_folder(tmp_path / "idx", idx_files("t10k", pixels(2, 28, 28), np.zeros(2, np.uint8)))
    refused(r"found nothing like .*pets: test/cat/1\.png in .*idx", pets, idx)


# IDX: MNIST and Fashion-MNIST


def idx_files(prefix: str, images: np.ndarray, labels: np.ndarray) -> dict[str, bytes]:
    return {
        f"{prefix}-images-idx3-ubyte": struct.pack(">HBB3I", 0, 8, 3, *images.shape) + images.tobytes(),
        f"{prefix}-labels-idx1-ubyte": struct.pack(">HBBI", 0, 8, 1, len(labels)) + labels.tobytes(),
    }


MNIST_LABELS = np.array([5, 0, 4, 1, 9, 2, 1, 3, 1, 4, 3], np.uint8)
FASHION_LABELS = np.array([9, 2, 1, 1, 6, 1, 4, 6, 5, 7, 4], np.uint8)


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_plain_and_compressed(tmp_path: Path, zipped: bool) -> None:
    train, test = pixels(11, 28, 28), pixels(11, 28, 28)
    files = {**idx_files("train", train, MNIST_LABELS), **idx_files("t10k", test, FASHION_LABELS)}
    if zipped:
        files = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    folder = write_folder(tmp_path / "raw", files)
    result = read([folder], "train")
    same(result, torch.from_numpy(train)[:, None], MNIST_LABELS.tolist())
    assert (result.name, result.class_names) == ("mnist", tuple("0123456789"))
    result = read([folder], "test")
    same(result, torch.from_numpy(test)[:, None], FASHION_LABELS.tolist())
    assert (result.name, result.class_names) == ("fashion-mnist", KNOWN["fashion-mnist"].class_names)


def test_idx_files_may_be_given_one_by_one_and_beside_their_gzips(tmp_path: Path) -> None:
    images, labels = pixels(3, 5, 5), np.array([2, 0, 1], np.uint8)
    files = idx_files("train", images, labels)
    folder = Path(write_folder(tmp_path / "x", files | {f"{n}.gz": gzip.compress(c) for n, c in files.items()}))
    for names in ([str(folder)], [str(folder / name) for name in files]):
        result = read(names, "train")
        same(result, torch.from_numpy(images)[:, None], [2, 0, 1])
        assert (result.name, result.class_names) == ("images", ("0", "1", "2"))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("damage", ["truncated", "longer", "magic", "gzip", "empty"])
def test_a_damaged_idx_file_is_named(tmp_path: Path, which: int, damage: str) -> None:
    files = idx_files("t10k", pixels(11, 28, 28), MNIST_LABELS)
    name = list(files)[which]
    whole = files[name]
    files[name] = {
        "truncated": whole[:-1],
        "longer": whole + b"\0",
        "magic": whole[:3] + b"\4" + whole[4:],
        "gzip": gzip.compress(whole)[:-9],
        "empty": b"",
    }[damage]
    refused(f"{name}.*fetch it again", write_folder(tmp_path / "x", files))


def test_idx_files_that_do_not_fit_together(tmp_path: Path) -> None:
    images = pixels(11, 28, 28)
    folder = write_folder(tmp_path / "x", idx_files("t10k", images, MNIST_LABELS[:-1]))
    refused("found 11 images and 10 labels", folder)
    refused(r"found only t10k-.*; add train-images-idx3-ubyte", folder, split="train")
    refused("expected one data set", folder, write_folder(tmp_path / "y", idx_files("t10k", images, MNIST_LABELS)))


# CIFAR as published


def pickled(images: np.ndarray, labels: list[int], key: bytes = b"labels") -> bytes:
    return pickle.dumps({b"data": images.reshape(len(images), 3072), key: labels, b"batch_label": b"one"}, protocol=2)


CIFAR = pixels(12, 3, 32, 32)
CIFAR_LABELS = RNG.integers(0, 10, 12).tolist()


def cifar10_files(binary: bool) -> dict[str, bytes]:
    files = {}
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        images, labels = CIFAR[2 * number : 2 * number + 2], CIFAR_LABELS[2 * number : 2 * number + 2]
        records = b"".join(bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True))
        files[name + ".bin" * binary] = records if binary else pickled(images, labels)
    return {**files, "batches.meta": b"", "readme.html": b""}


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_cifar10(tmp_path: Path, binary: bool, packed: bool) -> None:
    files = cifar10_files(binary)
    if packed:
        source = write_tar(tmp_path / "c.tar.gz", {f"cifar-10/{name}": files[name] for name in reversed(files)})
    else:
        source = write_folder(tmp_path / "c", files)
    train, test = read([source], "train"), read([source], "test")
    same(train, torch.from_numpy(CIFAR[:10]), CIFAR_LABELS[:10])
    same(test, torch.from_numpy(CIFAR[10:]), CIFAR_LABELS[10:])
    assert (test.name, test.class_names) == ("cifar10", KNOWN["cifar10"].class_names)


@pytest.mark.parametrize("binary", [True, False])
def test_cifar100_has_its_fine_labels(tmp_path: Path, binary: bool) -> None:
    labels = [99, 0, 17, 50]
    if binary:
        records = [bytes([7, label]) + image.tobytes() for label, image in zip(labels, CIFAR, strict=False)]
        files = {"train.bin": b"".join(records), "test.bin": records[0]}
    else:
        files = {name: pickled(CIFAR[:n], labels[:n], b"fine_labels") for name, n in (("train", 4), ("test", 1))}
    folder = write_folder(tmp_path / "c", {**files, "meta": b""})
    train = read([folder], "train")
    same(train, torch.from_numpy(CIFAR[:4]), labels)
    assert (train.name, train.class_names[99], len(train.class_names)) == ("cifar100", "worm", 100)
    same(read([folder], "test"), torch.from_numpy(CIFAR[:1]), [99])


def test_a_pickle_written_by_python_2_and_old_numpy(tmp_path: Path) -> None:
    """The opcodes of the published files, which differ from what today's pickle module writes."""
    text = CIFAR[:1].tobytes()
    stream = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85"
        b"U\x01b\x87Rq\x05(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<I", len(text)) + text + b"tb"
        b"U\x06labelsq\x08]q\x09K\x03au."
    )
    same(read([write_folder(tmp_path / "c", {"test_batch": stream})], "test"), torch.from_numpy(CIFAR[:1]), [3])


class Payload:
    """Calls a function when it is unpickled by the standard unpickler."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "found"),
    [(os.mkdir, "posix.mkdir"), (eval, "builtin.*eval"), (np.frombuffer, "numpy.*frombuffer"), (getattr, "getattr")],
)
def test_a_pickle_cannot_run_code(tmp_path: Path, function: Any, found: str) -> None:
    arguments = (str(tmp_path / "made"),) if function is os.mkdir else ("1/0",)
    evil = pickle.dumps({b"data": Payload(function, *arguments), b"labels": [1]}, protocol=2)
    refused(f"test_batch.*asks for .*{found}", write_folder(tmp_path / "c", {"test_batch": evil}))
    assert not (tmp_path / "made").exists()


def test_a_pickle_cannot_ask_for_a_huge_memo(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "c", {"test_batch": b"\x80\x02}r\x00\x00\x00\x01."})  # memo index 16,777,216
    refused("asks for 16,777,216 memo slots", folder)


def test_a_pickle_can_make_only_uint8_arrays(tmp_path: Path) -> None:
    """With a forged dtype of object, NumPy would take bytes for addresses."""
    batch = pickle.dumps({b"data": np.full((1, 3072), 7, object), b"labels": [1]}, protocol=2)
    refused("test_batch is not a complete CIFAR batch", write_folder(tmp_path / "c", {"test_batch": batch}))


def test_damaged_or_missing_cifar_batches_are_named(tmp_path: Path) -> None:
    files = cifar10_files(binary=False)
    folder = write_folder(tmp_path / "c", {**files, "data_batch_3": files["data_batch_3"][:-100]})
    refused("data_batch_3 is not a complete CIFAR batch", folder, split="train")
    Path(folder, "data_batch_3").unlink()
    refused("add data_batch_3", folder, split="train")
    assert len(read([folder], "test").labels) == 2
    write_folder(tmp_path / "c", {"test_batch": pickled(CIFAR[:2], [1, 10])})
    refused("expected one label below 10 per image", folder)
    binary = write_folder(tmp_path / "b", {"test_batch.bin": bytes(3073 * 2 - 1)})
    refused(r"test_batch\.bin is not a complete CIFAR batch", binary)


def test_two_cifar_sets_in_one_folder_are_not_mixed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "c", {**cifar10_files(binary=False), "train": b"", "test": b""})
    refused("one version of one CIFAR set", folder, split="train")


def test_a_truncated_tar_is_an_error(tmp_path: Path) -> None:
    path = Path(write_tar(tmp_path / "c.tar.gz", cifar10_files(binary=False)))
    path.write_bytes(path.read_bytes()[:-3000])
    refused(r"c\.tar\.gz.*fetch it again", path)


# SVHN


def test_svhn(tmp_path: Path) -> None:
    images = pixels(3, 32, 32, 3)
    content = {"X": images.transpose(1, 2, 3, 0), "y": np.array([[10], [1], [9]], np.uint8)}
    scipy.io.savemat(tmp_path / "test_32x32.mat", content)
    for source in (tmp_path, tmp_path / "test_32x32.mat"):
        result = read([str(source)], "test")
        same(result, chw(images), [0, 1, 9])
        assert (result.name, result.class_names) == ("svhn", tuple("0123456789"))
    scipy.io.savemat(tmp_path / "test_32x32.mat", content | {"X": content["X"] / 255})
    refused(r"test_32x32\.mat is not an SVHN file .*pixels of type float64", tmp_path)
    (tmp_path / "test_32x32.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    refused(r"test_32x32\.mat is not an SVHN file", tmp_path)


def saved_mat(content: dict[str, Any], compressed: bool = True) -> bytes:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, content, do_compression=compressed)
    return buffer.getvalue()


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_arrays_of_matlab_are_scipys(kind: str, compressed: bool) -> None:
    content = {"X": np.arange(24).reshape(2, 3, 4).astype(kind), "y": np.array([[1]], kind), "a name": np.ones((2, 9))}
    data = saved_mat(content, compressed)
    found, wanted = matlab.read_arrays(data, ["X", "y"]), scipy.io.loadmat(io.BytesIO(data))
    assert list(found) == ["X", "y"]
    for name, array in found.items():
        assert (array.dtype, array.shape) == (wanted[name].dtype, wanted[name].shape)
        assert np.array_equal(array, wanted[name])


@pytest.mark.parametrize("compressed", [True, False])
def test_a_damaged_matlab_file_is_refused_or_read(compressed: bool) -> None:
    data = saved_mat({"X": np.zeros((2, 3), np.uint8), "y": np.ones((1, 4), np.uint8)}, compressed)
    whole = {len(data) - len(part) for part in (b"", matlab_tail(data))}
    for length in range(len(data)):  # cut anywhere but between two arrays
        if length not in whole and length != 128:
            with pytest.raises(ValueError, match=r".+"):
                matlab.read_arrays(data[:length], ["X", "y"])
    rng = random.Random(0)
    for _ in range(2_000):  # SciPy's reader ends in a segmentation fault on some of these
        changed = bytearray(data)
        changed[rng.randrange(128, len(data))] = rng.randrange(256)
        with contextlib.suppress(ValueError):
            matlab.read_arrays(bytes(changed), ["X", "y"])


def matlab_tail(data: bytes) -> bytes:
    """The last of two elements."""
    first, _ = matlab.elements(memoryview(data)[128:])
    padding = 0 if first[0] == matlab.COMPRESSED else -len(first[1]) % 8
    return data[128 + 8 + len(first[1]) + padding :]


@pytest.mark.parametrize("value", ["text", 1j, {"a": 1}, [[1], [1, 2]]])
def test_other_things_of_matlab_are_refused(value: Any) -> None:
    value = np.array(value, dtype=object) if isinstance(value, list) else value
    with pytest.raises(ValueError, match="is not an array of real numbers"):
        matlab.read_arrays(saved_mat({"X": value}), ["X"])
    assert matlab.read_arrays(saved_mat({"X": value}), ["y"]) == {}


def test_a_compressed_array_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved_mat({"X": np.zeros((1_000, 1_000), np.uint8)})
    monkeypatch.setattr(matlab, "MOST", 10**6)
    with pytest.raises(ValueError, match="not whole"):
        matlab.read_arrays(data, ["X"])


# digits


def test_digits_have_a_stratified_split() -> None:
    train, test = digits()
    assert train.images.shape == (1257, 1, 8, 8)
    assert test.images.shape == (540, 1, 8, 8)
    share = test.labels.bincount() / (train.labels.bincount() + test.labels.bincount())
    assert share.sub(0.3).abs().max() < 0.005
    assert (train.name, train.class_names) == ("digits", tuple("0123456789"))
    assert int(train.images.max()) == 255
    same(read(["digits"], "train"), train.images, train.labels.tolist())
    same(read(["digits"], "test"), test.images, test.labels.tolist())


def test_the_split_of_the_digits_depends_on_the_seed() -> None:
    one, two = torch.cat([part.images for part in digits(0)]), torch.cat([part.images for part in digits(1)])
    assert not torch.equal(one, two)
    assert torch.equal(one.flatten(1).unique(dim=0), two.flatten(1).unique(dim=0))
    values = one.double() / 255
    assert values.mean().item() == pytest.approx(KNOWN["digits"].mean[0], abs=5e-5)
    assert values.std(correction=0).item() == pytest.approx(KNOWN["digits"].std[0], abs=5e-5)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ZsktError, match=r'pip install "zskt\[demo\]"'):
        digits()


# Names


@pytest.mark.parametrize("name", sorted(set(KNOWN) - {"digits"}))
def test_the_name_of_a_known_set_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    refused(f"{name}: nothing is downloaded, give .*path", name, split="train", kind=UsageError)


def test_unknown_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused("unknown data set 'cifar1': did you mean cifar10", "cifar1", kind=UsageError)
    for missing in ("cifar10.zip", "folder/of/images"):
        refused("no such file or folder", missing)
    refused("unknown split 'valid'", "digits", split="valid", kind=UsageError)
    refused("digits alone", tmp_path, "digits", kind=UsageError)


def test_a_path_may_have_the_name_of_a_known_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "mnist", idx_files("train", pixels(11, 28, 28), MNIST_LABELS))
    assert read(["mnist"], "train").name == "mnist"


def test_known_sets_are_consistent() -> None:
    for known in KNOWN.values():
        assert len(known.mean) == len(known.std) == known.size[0]
        assert len(set(known.class_names)) == len(known.class_names)
    classes = {name: len(known.class_names) for name, known in KNOWN.items()}
    assert {name: count for name, count in classes.items() if count != 10} == {"cifar100": 100}
    assert sorted(KNOWN["cifar100"].class_names) == list(KNOWN["cifar100"].class_names)


def test_a_full_disk_gives_a_notice_and_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "images", {"test/cat/1.png": png(np.full((4, 4, 3), 9, np.uint8))})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("zskt.files.os.fsync", full)
    said: list[str] = []
    assert read([folder], "test", notice=said.append).images.eq(9).all()
    assert any("no space left" in line for line in said)

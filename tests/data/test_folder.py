# SPDX-License-Identifier: Apache-2.0
"""Layouts of image folders, what a class folder stands for, and the published preprocessing."""

import pytest
import torch

pytest.importorskip("timm")
pytest.importorskip("skimage")
Image = pytest.importorskip("PIL.Image")

import timm  # noqa: E402
from tokenprune_ext import models  # noqa: E402
from tokenprune_ext._errors import UserError  # noqa: E402
from tokenprune_ext.data import BrokenImage, ImageFolder, class_numbers, find_folder, preprocessing  # noqa: E402

from tests.photos import COUNT, PHOTOS, make_folder  # noqa: E402


@pytest.mark.parametrize("place", ["val", "img_val", "validation", "."])
def test_every_layout_is_found(place, tmp_path):
    folder = find_folder(make_folder(tmp_path, place))
    images = ImageFolder(folder, lambda image: image)
    assert len(images) == COUNT
    assert images.classes == sorted(PHOTOS)
    image, label = images[0]
    assert (image.mode, label) == ("RGB", 0)


def test_it_is_the_order_of_torchvision(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    folder = find_folder(make_folder(tmp_path))
    (folder / "n02123045" / "deeper").mkdir()
    Image.new("L", (8, 8)).save(folder / "n02123045" / "deeper" / "z.PNG")
    theirs = torchvision.datasets.ImageFolder(folder)
    ours = ImageFolder(folder, lambda image: image)
    assert [(str(folder / name), label) for name, label in ours.files] == theirs.imgs
    assert torch.equal(_pixels(ours[3][0]), _pixels(theirs[3][0]))


def _pixels(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)


def test_split_is_wanted_and_found(tmp_path):
    make_folder(tmp_path, "val")
    make_folder(tmp_path, "img_train")
    assert find_folder(tmp_path, "train").name == "img_train"
    assert find_folder(tmp_path).name == "val"
    with pytest.raises(UserError, match="must be one of train, val"):
        find_folder(tmp_path, "test")
    with pytest.raises(UserError, match="no folder train or img_train"):
        find_folder(tmp_path / "val", "train")


def test_bad_folders_say_why(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        find_folder(tmp_path / "missing")
    with pytest.raises(UserError, match="no class folders"):
        ImageFolder(tmp_path, None)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="one folder per class"):
        ImageFolder(tmp_path, None)
    (tmp_path / "class").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        ImageFolder(tmp_path, None)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_every_kind_of_image_becomes_rgb(mode, tmp_path):
    (tmp_path / "class").mkdir()
    image = Image.new("RGB", (9, 7), (200, 100, 50))
    image = Image.new("I;16", (9, 7), 40000) if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "class" / ("a.jpg" if mode == "CMYK" else "a.png"))
    loaded, _ = ImageFolder(tmp_path, lambda image: image)[0]
    assert (loaded.mode, loaded.size) == ("RGB", (9, 7))
    if mode == "I;16":
        assert abs(loaded.getpixel((0, 0))[0] - 40000 // 256) <= 1


@pytest.mark.parametrize("content", ["truncated", "empty", "text"])
def test_broken_images_are_named(content, tmp_path):
    file = make_folder(tmp_path) / "val" / "n02123045" / "chelsea.png"
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no image"}[content])
    broken, label = ImageFolder(tmp_path / "val", lambda image: image)[0]
    assert isinstance(broken, BrokenImage)
    assert "chelsea.png" in broken.message
    assert label == 0


def test_class_folders_name_their_outputs():
    labels = ["n01", "n02", "n03"]
    assert class_numbers(["n01", "n03"], 3, labels) == [0, 2]
    assert class_numbers(["a", "b", "c"], 3, labels) == [0, 1, 2]
    # Names by number, in the order of names: 10 comes before 2.
    assert class_numbers(["0", "1", "10", "2"], 1000) == [0, 1, 10, 2]
    with pytest.raises(UserError, match="3 classes and the data folder 2"):
        class_numbers(["n01", "dog"], 3, labels)


@pytest.mark.parametrize(
    "name, size, crop",
    [
        ("deit_small_patch16_224", 224, 0.875),  # its authors', not timm's 0.9
        ("deit_base_distilled_patch16_384", 384, 0.875),
        ("vit_small_patch16_224", 224, 0.9),
        ("deit_small_patch16_shrink_base", 224, 0.875),
        ("vit_b16_in1k", 384, 1.0),  # SWAG: short side to the resolution itself
        ("spvit_lvvit_s", 224, 0.875),
    ],
)
def test_published_preprocessing(name, size, crop):
    with torch.device("meta"):
        known = name in models.list_models()
        model = models.create_model(name) if known else timm.create_model(name)
    setting = preprocessing(model, name)
    assert (setting.image_size, setting.crop_pct, setting.interpolation) == ((size, size), crop, "bicubic")
    assert setting.transform()(Image.new("L", (40, 900)).convert("RGB")).shape == (3, size, size)


def test_preprocessing_follows_the_built_size_and_the_user():
    model = timm.create_model("deit_tiny_patch16_224", img_size=96)
    setting = preprocessing(model, "deit_tiny_patch16_224", crop_pct=1.0, interpolation="bilinear")
    assert (setting.image_size, setting.crop_pct, setting.interpolation) == ((96, 96), 1.0, "bilinear")
    with pytest.raises(UserError, match="--crop-pct"):
        preprocessing(model, crop_pct=1.5)
    with pytest.raises(UserError, match="--interpolation"):
        preprocessing(model, interpolation="magic")

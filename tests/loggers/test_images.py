"""Images: which pixels are shown, and where files go."""

import sys

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from trainer import ArgumentError, ArgumentTypeError, CSVLogger, FileLogger
from trainer.loggers.images import as_pixels, write_png

GREY = np.array([[0.0, 1.0], [0.2, 0.4]])
PIXELS = np.array([[0, 255], [51, 102]], np.uint8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (GREY, PIXELS),
        (GREY[:, :, None], PIXELS),
        (np.stack([GREY] * 3, axis=-1), np.stack([PIXELS] * 3, axis=-1)),
        (np.stack([GREY] * 4, axis=-1), np.stack([PIXELS] * 4, axis=-1)),
        (jnp.asarray(GREY, jnp.float32), PIXELS),
        (jnp.asarray([[0.0, 1.0]], jnp.bfloat16), PIXELS[:1]),
        (np.asarray(GREY, np.float16), PIXELS),
        (PIXELS, PIXELS),
        (jnp.asarray(PIXELS, jnp.int32), PIXELS),
        (GREY > 0.3, np.array([[0, 255], [0, 255]], np.uint8)),
        (GREY * 1.002 - 0.001, PIXELS),  # less than a grey level outside
        ([[0, 255], [51, 102]], PIXELS),
    ],
)
def test_pixels(image, expected):
    made = as_pixels(image, "x")
    assert made.dtype == np.uint8
    np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize(
    ("image", "expected", "top"),
    [
        ([[-1.0, 1.5]], [[0, 255]], "1"),
        ([[np.nan, 0.2], [np.inf, -np.inf]], [[0, 51], [255, 0]], "1"),
        ([[300, -5]], [[255, 0]], "255"),
    ],
)
def test_what_is_outside_is_cut_off_and_said(image, expected, top):
    with pytest.warns(UserWarning, match=f"the image `x` has values outside of 0 to {top} .*, which are cut off"):
        made = as_pixels(image, "x")
    np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize(
    ("image", "error", "text"),
    [
        (np.zeros(3), ArgumentError, r"the image `x` has shape \(3,\); it must be \(height, width\), or"),
        (np.zeros((3, 8, 8)), ArgumentError, r"Channels come last: np.moveaxis\(image, 0, -1\)"),
        (np.zeros((2, 8, 8, 3)), ArgumentError, "Log one image at a time"),
        (np.zeros((8, 8, 2)), ArgumentError, "with 1, 3 or 4 channels"),
        (np.zeros((0, 8)), ArgumentError, r"has shape \(0, 8\)"),
        (np.zeros((2, 2), complex), ArgumentTypeError, "has dtype complex128; it must be a float from 0 to 1"),
        ([["a"]], ArgumentTypeError, "has dtype <U1"),
    ],
)
def test_what_is_no_image_is_refused_by_name(image, error, text, tmp_path):
    with pytest.raises(error, match=text):
        write_png(tmp_path / "images", "x", 1, image, by="FileLogger")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "step", "file"),
    [
        ("samples", 7, "samples/00000007.png"),
        ("val/samples", 123456789, "val/samples/123456789.png"),
        ("samples", None, "samples.png"),
        ("../../up", 1, "%2E./%2E./up/00000001.png"),
        ("/root", 1, "_/root/00000001.png"),
        ("a:b?c\\d", 1, "a%3Ab%3Fc%5Cd/00000001.png"),
        (".hidden", 1, "%2Ehidden/00000001.png"),
    ],
)
def test_names_of_files_stay_in_the_folder(tmp_path, name, step, file):
    written = write_png(tmp_path / "images", name, step, GREY, by="FileLogger")
    assert written == tmp_path / "images" / file
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(written)), PIXELS)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [written]


def test_an_image_of_the_same_step_is_replaced(tmp_path):
    write_png(tmp_path, "x", 1, GREY, by="FileLogger")
    written = write_png(tmp_path, "x", 1, GREY * 0.5, by="FileLogger")
    assert np.asarray(PIL.Image.open(written)).max() == 128


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def broken(self, file, format):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(PIL.Image.Image, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        write_png(tmp_path, "x", 1, GREY, by="FileLogger")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("make", [lambda path: FileLogger(path / "events.jsonl"), CSVLogger])
def test_loggers_of_files_write_real_images(tmp_path, make):
    logger = make(tmp_path)
    logger.log_image("samples", np.stack([GREY] * 3, axis=-1), 3)
    logger.close()
    with PIL.Image.open(tmp_path / "events_images" / "samples" / "00000003.png") as image:
        assert (image.mode, image.size) == ("RGB", (2, 2))


def test_missing_pillow_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(
        ArgumentError, match=r"an image of FileLogger needs pillow.* `pip install 'nnx-trainer\[images\]'`"
    ):
        FileLogger(tmp_path / "log.jsonl").log_image("x", GREY, 1)
    assert list(tmp_path.iterdir()) == []

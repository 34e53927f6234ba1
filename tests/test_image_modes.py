"""walt.data.video.read_image: each mode and depth that Pillow opens is the right RGB or an error that names it."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest

from walt.data.video import read_image
from walt.errors import WaltError

image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

# Two rows, three columns; corners differ, so that turning and mirroring show.
GREY = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)
RGB = np.array([[(40, 200, 0), (200, 30, 60), (10, 20, 230)], [(255, 255, 255), (0, 0, 0), (90, 140, 120)]], np.uint8)
ALPHA = np.array([[255, 128, 0], [255, 51, 255]], np.uint8)
ORIENTATIONS = {  # what EXIF asks for
    1: lambda p: p,
    2: np.fliplr,
    3: lambda p: np.rot90(p, 2),
    4: np.flipud,
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p.swapaxes(0, 1), 2),
    8: lambda p: np.rot90(p, 1),
}


def over_white(colour: np.ndarray) -> np.ndarray:
    return 255 - (255.0 - colour) * (ALPHA[..., None] / 255)


def grey(values: np.ndarray) -> np.ndarray:
    return values[..., None].repeat(3, axis=-1).astype(float)


def away(path, shown: np.ndarray) -> float:
    """Grey levels between what is read and what should be, at most."""
    made = read_image(path)
    assert made.dtype == np.uint8
    assert made.shape == shown.shape
    return float(np.abs(made - shown.astype(float)).max())


def save(path, mode: str, exif=None):
    """A file that Pillow opens in this mode (TIFF has all of them) -> what it shows."""
    colour = image.fromarray(RGB)
    alpha = image.fromarray(ALPHA)
    pale = image.fromarray(GREY)
    with_alpha = colour.copy()
    with_alpha.putalpha(alpha)
    grey_alpha = image.merge("LA", (pale, alpha))
    palette = image.new("P", (3, 2))
    palette.putpalette(RGB.reshape(-1, 3).tobytes())
    palette.putdata(range(6))
    options = {} if exif is None else {"exif": exif}
    if mode == "1":
        image.fromarray(np.where(GREY > 127, 255, 0).astype(np.uint8)).convert("1").save(path, "PNG", **options)
        return grey(np.where(GREY > 127, 255, 0))
    if mode == "P with a transparent colour":
        palette.save(path, "PNG", transparency=1, **options)
        return np.where(np.arange(6).reshape(2, 3, 1) == 1, 255.0, RGB)
    if mode in ("RGB with a transparent colour", "L with a transparent colour"):
        source, value = (colour, (200, 30, 60)) if mode[0] == "R" else (pale, 51)
        source.save(path, "PNG", transparency=value, **options)
        return np.where(np.arange(6).reshape(2, 3, 1) == 1, 255.0, RGB if mode[0] == "R" else grey(GREY))
    if mode in ("I;16", "I;16B"):
        deep = (GREY.astype(np.uint16) * 257).astype({"I;16": "<u2", "I;16B": ">u2"}[mode])
        image.fromarray(deep).save(path, "PNG" if mode == "I;16" else "TIFF", **options)
        return grey(GREY)
    made = {
        "L": (pale, "PNG", grey(GREY)),
        "LA": (grey_alpha, "PNG", over_white(grey(GREY))),
        "P": (palette, "PNG", RGB),
        "RGB": (colour, "PNG", RGB),
        "RGBA": (with_alpha, "PNG", over_white(RGB)),
        "CMYK": (colour.convert("CMYK"), "TIFF", RGB),
    }
    source, kind, shown = made[mode]
    if exif is not None and kind == "TIFF":
        options["compression"] = "tiff_lzw"  # Pillow 13 misreads turned TIFFs without compression
    source.save(path, kind, **options)
    return shown


OPENED = {
    "P with a transparent colour": "P",
    "RGB with a transparent colour": "RGB",
    "L with a transparent colour": "L",
}
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B", *OPENED]


@pytest.mark.parametrize("mode", MODES)
def test_modes_in_files(tmp_path, mode):
    shown = save(tmp_path / "a.png", mode)
    with image.open(tmp_path / "a.png") as picture:
        assert picture.mode in (OPENED.get(mode, mode), "I" if mode == "I;16" else "")  # I: Pillow before 11
    assert away(tmp_path / "a.png", shown) <= 1


@pytest.mark.parametrize("mode", ["La", "PA", "RGBa", "RGBX", "YCbCr", "HSV", "LAB"])
def test_modes_that_few_files_have(tmp_path, monkeypatch, mode):
    """Given to the reader in place of the file's own."""
    with_alpha = image.fromarray(np.concatenate([RGB, ALPHA[..., None]], axis=-1))
    if mode == "PA":
        made = image.new("PA", (3, 2))
        made.putpalette(RGB.reshape(-1, 3).tobytes())
        made.putdata(list(zip(range(6), ALPHA.ravel().tolist(), strict=True)))
    elif mode == "LAB":
        cms = pytest.importorskip("PIL.ImageCms")
        srgb, lab = cms.createProfile("sRGB"), cms.createProfile("LAB")
        made = cms.profileToProfile(image.fromarray(RGB), srgb, lab, outputMode="LAB")
    else:
        by_way = {"La": "LA", "RGBa": "RGBA", "HSV": "RGB", "RGBX": "RGB", "YCbCr": "RGB"}[mode]
        made = with_alpha.convert(by_way).convert(mode)
    colour = grey(np.array(image.fromarray(RGB).convert("L"))) if mode == "La" else RGB
    shown = colour if mode in ("RGBX", "YCbCr", "HSV", "LAB") else over_white(colour)
    assert made.mode == mode
    (tmp_path / "a.png").touch()
    monkeypatch.setattr(image, "open", lambda path: made)
    # Rounded to 8 bits, these tell strong colours roughly.
    assert away(tmp_path / "a.png", shown) <= {"YCbCr": 3, "HSV": 2, "LAB": 15}.get(mode, 1)


def test_a_ramp_of_16_bits(tmp_path):
    ramp = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    image.fromarray(ramp).save(tmp_path / "a.png")
    made = read_image(tmp_path / "a.png").astype(float)
    assert np.abs(made[..., 1] - ramp / 257).max() <= 0.5
    assert abs(made.mean() - 127.5) < 0.01


def write_png(path, depth: int, samples: list[int], transparent: list[int]) -> None:
    """One row: grey where `transparent` is one number, else RGB. Pillow writes no such files."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    channels = len(transparent)
    header = struct.pack(">IIBBBBB", len(samples) // channels, 1, depth, 0 if channels == 1 else 2, 0, 0, 0)
    bits = "".join(f"{sample:0{depth}b}" for sample in samples)
    row = int(bits, 2).to_bytes(len(bits) // 8, "big")
    parts = [(b"IHDR", header), (b"tRNS", struct.pack(f">{channels}H", *transparent))]
    parts += [(b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_a_transparent_grey_of_any_depth(tmp_path, depth):
    highest = (1 << depth) - 1
    values = [0, highest, highest // 3, highest // 2] * 2
    for transparent in {0, highest // 2, highest // 3}:
        write_png(tmp_path / "a.png", depth, values, [transparent])
        shown = [255 if value == transparent else 255 * value / highest for value in values]
        assert away(tmp_path / "a.png", grey(np.array([shown]))) <= 1


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_of_any_depth(tmp_path, depth):
    highest = (1 << depth) - 1
    colours = [[0, highest // 2, highest], [highest // 3, highest // 3, 0], [highest, 0, 0]]
    for transparent in colours:
        write_png(tmp_path / "a.png", depth, np.ravel(colours).tolist(), transparent)
        shown = [[255] * 3 if colour == transparent else [255 * c / highest for c in colour] for colour in colours]
        assert away(tmp_path / "a.png", np.array([shown])) <= 1


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_transparent_grey_of_16_bits_turned(tmp_path, orientation):
    deep = GREY.astype(np.uint16) * 257
    exif = image.Exif()
    exif[0x0112] = orientation
    image.fromarray(deep).save(tmp_path / "a.png", transparency=51 * 257, exif=exif)
    shown = ORIENTATIONS[orientation](grey(np.where(GREY == 51, 255, GREY)))
    assert away(tmp_path / "a.png", shown) <= 1


@pytest.mark.parametrize("depth", [10, 16])
def test_a_grey_map_of_more_than_8_bits(tmp_path, depth):
    highest = (1 << depth) - 1
    values = (GREY.astype(int) * highest // 255).astype(">u2")
    (tmp_path / "a.png").write_bytes(b"P5\n3 2\n%d\n" % highest + values.tobytes())
    assert away(tmp_path / "a.png", grey(GREY)) <= 1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_have_no_white(tmp_path, mode):
    image.fromarray(GREY).convert(mode).save(tmp_path / "a.png", "TIFF")
    with pytest.raises(WaltError, match=rf"a\.png is not an image that can be decoded: its mode is {mode}, 32 bits"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("mode", ["1", "LA", "P with a transparent colour", "RGB", "I;16", "CMYK"])
def test_exif_orientation(tmp_path, mode, orientation):
    exif = image.Exif()
    exif[0x0112] = orientation
    shown = ORIENTATIONS[orientation](save(tmp_path / "a.png", mode, exif))
    assert away(tmp_path / "a.png", shown) <= 1


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_exif_orientation_of_other_formats(tmp_path, suffix):
    picture = RGB[:1].repeat(16, axis=0).repeat(16, axis=1)
    for orientation, turned in ORIENTATIONS.items():
        exif = image.Exif()
        exif[0x0112] = orientation
        image.fromarray(picture).save(tmp_path / f"a{suffix}", exif=exif, quality=95)
        image.fromarray(picture).save(tmp_path / f"b{suffix}", quality=95)
        assert np.array_equal(read_image(tmp_path / f"a{suffix}"), turned(read_image(tmp_path / f"b{suffix}")))

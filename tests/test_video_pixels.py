"""walt.data.video reads films as a player shows them: colour matrix, range, alpha, square pixels, turned."""

from __future__ import annotations

import re
import struct
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from films import noise

from walt.data.prepare import prepare
from walt.data.video import _upright, iterate_video, read_video, write_mp4
from walt.errors import WaltError

av = pytest.importorskip("av", reason="PyAV is not installed")

COLOURS = [(40, 200, 0), (200, 30, 60), (10, 20, 230), (128, 128, 128), (255, 255, 255), (0, 0, 0)]
# What H.273 calls them: number, weight of red, weight of blue.
MATRICES = {
    "709": (1, 0.2126, 0.0722),
    "fcc": (4, 0.30, 0.11),
    "601 of 625 lines": (5, 0.299, 0.114),
    "601 of 525 lines": (6, 0.299, 0.114),
    "240m": (7, 0.212, 0.087),
    "2020": (9, 0.2627, 0.0593),
}
LIMITED, FULL, UNSPECIFIED = 1, 2, 2


def write_colours(path, matrix, *, full=False, tag=None, size=(32, 32), kind="yuv444p", primaries=UNSPECIFIED):
    """A lossless film of a frame for each of COLOURS, coded by the definition. `tag`: another matrix that it names."""
    number, red_weight, blue_weight = MATRICES[matrix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"qp": "0"})
        (stream.height, stream.width), stream.pix_fmt = size, kind
        coder = stream.codec_context
        coder.colorspace = number if tag is None else tag
        coder.color_range = FULL if full else LIMITED
        coder.color_primaries = coder.color_trc = primaries
        for red, green, blue in np.array(COLOURS) / 255:
            luma = red_weight * red + (1 - red_weight - blue_weight) * green + blue_weight * blue
            chroma = np.array([(blue - luma) / (1 - blue_weight), (red - luma) / (1 - red_weight)]) / 2
            scale, offset, chroma_scale = (255, 0, 255) if full else (219, 16, 224)
            values = [scale * luma + offset, *(chroma_scale * chroma + 128)]
            frame = av.VideoFrame(size[1], size[0], kind)
            for plane, value in zip(frame.planes, values, strict=True):
                depth = 10 if "10le" in kind else 8
                sample = np.array(min(round(value * 2 ** (depth - 8)), 2**depth - 1), "<u2" if depth > 8 else "u1")
                plane.update(sample.tobytes() * (plane.buffer_size // sample.itemsize))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def farthest(path) -> int:
    """Grey levels between what is read and what was meant."""
    video = read_video(path).astype(int)
    assert np.ptp(video, axis=(1, 2)).max() == 0
    return int(np.abs(video[:, 0, 0] - COLOURS).max())


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", MATRICES)
def test_colour_matrix_and_range(tmp_path, matrix, full):
    write_colours(tmp_path / "a.mp4", matrix, full=full)
    assert farthest(tmp_path / "a.mp4") <= 2


@pytest.mark.parametrize("kind", ["yuv420p", "yuv422p10le", "yuv444p10le"])
def test_colours_of_other_depths_and_samplings(tmp_path, kind):
    write_colours(tmp_path / "a.mp4", "709", kind=kind)
    assert farthest(tmp_path / "a.mp4") <= 4  # libswscale's fast paths; another matrix would be 30 away


@pytest.mark.parametrize("tag", [8, 10, 12, 14])
def test_a_matrix_that_cannot_be_converted(tmp_path, tag):
    (tmp_path / "films").mkdir()
    write_colours(tmp_path / "films/a.mkv", "709", tag=tag)
    message = f"not a video that can be decoded: its colour matrix, number {tag} of H.273, cannot be converted"
    with pytest.raises(WaltError, match=f"films/a.mkv is {re.escape(message)}"):
        list(iterate_video(tmp_path / "films/a.mkv"))
    lines: list[str] = []
    with pytest.raises(WaltError, match="none of its 1 videos and images can be used"):
        prepare(tmp_path / "films", tmp_path / "prepared", height=16, width=16, progress=False, say=lines.append)
    assert lines == [f"passed over, {message}: 1 (a.mkv)"]


@pytest.mark.parametrize(
    ("size", "matrix"), [((32, 1280), "709"), ((578, 32), "709"), ((576, 1278), "601 of 625 lines")]
)
def test_no_matrix_is_that_of_the_size(tmp_path, size, matrix):
    write_colours(tmp_path / "a.mp4", matrix, tag=UNSPECIFIED, size=size)
    assert farthest(tmp_path / "a.mp4") <= 2


@pytest.mark.parametrize("number", [0, 3, 16, 18, 22])
def test_primaries_and_transfer_curve_change_nothing(tmp_path, number):
    """Reserved and unknown ones do no harm, those of HDR are not converted."""
    write_colours(tmp_path / "a.mp4", "2020", primaries=number)
    assert farthest(tmp_path / "a.mp4") <= 2


@pytest.mark.parametrize("size", [(32, 48), (600, 1280)])
def test_what_is_written_names_its_colours(tmp_path, size):
    video = np.broadcast_to(np.array(COLOURS, np.uint8)[:, None, None], (len(COLOURS), *size, 3))
    write_mp4(tmp_path / "a.mp4", video)
    back = read_video(tmp_path / "a.mp4").astype(int)
    assert np.abs(back[:, 8:-8, 8:-8] - video[:, 8:-8, 8:-8]).mean(axis=(1, 2)).max() < 3
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (1, LIMITED)


@pytest.mark.parametrize(("suffix", "codec", "kind"), [(".mov", "qtrle", "argb"), (".mov", "png", "rgba")])
def test_transparent_parts_lie_over_white(tmp_path, suffix, codec, kind):
    pixels = np.zeros((2, 32, 48, 4), np.uint8)
    pixels[...] = (40, 200, 0, 255)
    pixels[:, :, 16:32, 3] = 128
    pixels[:, :, 32:, 3] = 0
    path = tmp_path / f"a{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 48, kind
        for picture in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgba").reformat(format=kind)))
        container.mux(stream.encode())
    row = read_video(path)[1, 16].astype(int)
    assert np.abs(row[[8, 24, 40]] - [(40, 200, 0), (147, 227, 127), (255, 255, 255)]).max() <= 1


def upright(picture: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """By the definition: the pixel in column x and row y goes to (a x + c y, b x + d y), then all into view."""
    rows, columns = picture.shape[:2]
    places = {(a * x + c * y, b * x + d * y): (y, x) for y, x in product(range(rows), range(columns))}
    left, top = np.min(list(places), axis=0)
    right, bottom = np.max(list(places), axis=0)
    shown = np.empty((bottom - top + 1, right - left + 1, 3), np.uint8)
    for (x, y), place in places.items():
        shown[y - top, x - left] = picture[place]
    return shown


def with_header(content: bytes, *, matrix=None, pixel=None) -> bytes:
    """An mp4 whose track header has another display matrix, or that has a box with the shape of its pixels."""
    changed = bytearray(content)
    place = changed.index(b"tkhd") + 44
    assert struct.unpack_from(">9i", changed, place) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    if matrix is not None:
        a, b, c, d = (round(value * 65536) for value in matrix)
        struct.pack_into(">9i", changed, place, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    if pixel is not None:
        place = changed.index(b"pasp") + 4
        struct.pack_into(">2I", changed, place, *pixel)
    return bytes(changed)


EIGHT = [m for m in product((-1, 0, 1), repeat=4) if abs(m[0] * m[3] - m[1] * m[2]) == 1 and sum(map(abs, m)) == 2]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    write_mp4(path, noise(3, seed=1))
    return path


@pytest.mark.parametrize("matrix", EIGHT, ids=str)
def test_all_eight_display_matrices(tmp_path, film, matrix):
    (tmp_path / "a.mp4").write_bytes(with_header(film.read_bytes(), matrix=matrix))
    stored, shown = read_video(film), read_video(tmp_path / "a.mp4")
    assert np.array_equal(shown, np.stack([upright(picture, *matrix) for picture in stored]))
    assert np.array_equal(shown, np.stack(list(iterate_video(tmp_path / "a.mp4", fps=12))))


def test_a_matrix_between_is_the_nearest(tmp_path, film):
    cosine, sine = np.cos(np.radians(80)), np.sin(np.radians(80))
    (tmp_path / "a.mp4").write_bytes(with_header(film.read_bytes(), matrix=(cosine, sine, -sine, cosine)))
    assert np.array_equal(read_video(tmp_path / "a.mp4"), np.rot90(read_video(film), -1, axes=(1, 2)))


def test_side_data_that_pyav_does_not_know():
    """Is not the end of a film; it is turned, at least."""

    class Frame:
        rotation = -90

        @property
        def side_data(self):
            raise ValueError("31 is not a valid Type")

    picture = noise(1, seed=1)[0]
    assert np.array_equal(_upright(Frame())(picture), np.rot90(picture, -1))


def write_pixels(path, pixel: Fraction, height: int = 32, width: int = 48, codec: str = "libx264"):
    """Black left half, white right half, top row of blocks grey; the film says what shape its pixels have."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, width // 2 :] = 255
    picture[: height // 2, : width // 4] = 128
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.sample_aspect_ratio = pixel
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("name", "codec", "pixel", "width"),
    [
        ("a.mp4", "libx264", Fraction(4, 3), 64),
        ("a.mkv", "libx264", Fraction(1, 2), 24),
        ("a.mov", "mpeg4", Fraction(16, 15), 51),
        ("a.mpg", "mpeg2video", Fraction(32, 27), 57),
        ("a.mp4", "libx264", Fraction(0, 1), 48),
    ],
)
def test_pixels_become_square(tmp_path, name, codec, pixel, width):
    write_pixels(tmp_path / name, pixel, codec=codec)
    video = read_video(tmp_path / name)
    assert video.shape == (3, 32, width, 3)
    edge = (video[1, 24, :, 0] > 128).argmax()
    assert abs(edge - width / 2) <= 1
    assert abs(int(video[1, 8, width // 8, 0]) - 128) < 12


def test_pixels_become_square_before_the_film_is_turned(tmp_path):
    write_pixels(tmp_path / "a.mp4", Fraction(2, 1))
    (tmp_path / "b.mp4").write_bytes(with_header((tmp_path / "a.mp4").read_bytes(), matrix=(0, 1, -1, 0)))
    assert read_video(tmp_path / "a.mp4").shape == (3, 32, 96, 3)
    assert np.array_equal(read_video(tmp_path / "b.mp4"), np.rot90(read_video(tmp_path / "a.mp4"), -1, axes=(1, 2)))


@pytest.mark.parametrize("pixel", [(17, 1), (1, 4000)])
def test_pixels_of_no_sensible_shape(tmp_path, pixel):
    write_pixels(tmp_path / "a.mp4", Fraction(2, 1))
    (tmp_path / "b.mp4").write_bytes(with_header((tmp_path / "a.mp4").read_bytes(), pixel=pixel))
    with pytest.raises(WaltError, match=rf"b\.mp4 has pixels {Fraction(*pixel)} as wide as high; expected at most 16"):
        read_video(tmp_path / "b.mp4")

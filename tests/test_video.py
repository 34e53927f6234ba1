"""walt.data.video: what is written can be read again, and every bad file gives one line that names it."""

from __future__ import annotations

import gc
import struct
import sys

import numpy as np
import pytest

from walt.data.video import (
    frame_rate,
    iterate_video,
    read_image,
    read_video,
    tile,
    write_gif,
    write_mp4,
    write_png,
    write_video,
)
from walt.errors import WaltError
from walt.evaluate.metrics import psnr

pytest.importorskip("av", reason="PyAV is not installed")
image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")


def moving_square(frames: int = 9, height: int = 48, width: int = 64) -> np.ndarray:
    video = np.full((frames, height, width, 3), 60, np.uint8)
    for index in range(frames):
        video[index, 8:24, 4 * index : 4 * index + 16] = (200, 120, 40)
    return video


def test_mp4_round_trip(tmp_path):
    video = moving_square()
    write_mp4(tmp_path / "clip.mp4", video)
    back = read_video(tmp_path / "clip.mp4")
    assert back.shape == video.shape
    assert back.dtype == np.uint8
    # 4:2:0 blurs the colour edges of the square; a shifted or swapped frame would fall below 22 dB.
    assert psnr(back, video).min() > 27
    later = psnr(back[1:], video[:-1])
    assert (psnr(back[1:], video[1:]) > later + 5).all()


def test_mp4_of_odd_size_is_padded_not_refused(tmp_path):
    write_mp4(tmp_path / "odd.mp4", moving_square(5, 33, 49))
    assert read_video(tmp_path / "odd.mp4").shape == (5, 34, 50, 3)


def test_read_a_part(tmp_path):
    write_mp4(tmp_path / "clip.mp4", moving_square(9))
    whole = read_video(tmp_path / "clip.mp4")
    assert np.array_equal(read_video(tmp_path / "clip.mp4", start=3, frames=4), whole[3:7])


def test_iterate(tmp_path):
    write_mp4(tmp_path / "clip.mp4", moving_square(9), fps=25)
    frames = iterate_video(tmp_path / "clip.mp4")
    assert np.array_equal(next(frames), read_video(tmp_path / "clip.mp4")[0])
    assert np.array_equal(np.stack(list(frames)), read_video(tmp_path / "clip.mp4")[1:])
    assert frame_rate(tmp_path / "clip.mp4") == 25


def test_frames_are_freed_one_by_one(tmp_path):
    """Not when Python next looks for cycles: hundreds of large frames may be held until then."""
    write_mp4(tmp_path / "clip.mp4", moving_square(30))
    gc.collect()
    gc.disable()
    try:
        assert sum(1 for _ in iterate_video(tmp_path / "clip.mp4")) == 30
        assert sum(type(thing).__name__ == "VideoFrame" for thing in gc.get_objects()) <= 2
    finally:
        gc.enable()


def test_a_telephone_held_upright(tmp_path):
    video = moving_square()
    path = tmp_path / "clip.mp4"
    write_mp4(path, video)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44  # of the track header: shown turned by 90 degrees clockwise
    assert struct.unpack_from(">9i", content, matrix) == (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", content, matrix, 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    (tmp_path / "upright.mp4").write_bytes(content)
    assert np.array_equal(read_video(tmp_path / "upright.mp4"), np.rot90(read_video(path), -1, axes=(1, 2)))


def test_a_change_of_size_is_refused(tmp_path):
    av = pytest.importorskip("av")
    for height in (48, 32):
        with av.open(str(tmp_path / f"{height}.ts"), "w") as container:
            stream = container.add_stream("libx264", rate=24, options={"tune": "zerolatency"})
            stream.height, stream.width, stream.pix_fmt = height, 64, "yuv420p"
            for picture in moving_square(2, height):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
            container.mux(stream.encode())
    (tmp_path / "clip.mpg").write_bytes((tmp_path / "48.ts").read_bytes() + (tmp_path / "32.ts").read_bytes())
    with pytest.raises(WaltError, match=r"changes its size from \(48, 64\) to \(32, 64\) at frame 2"):
        read_video(tmp_path / "clip.mpg")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_read_image(tmp_path, suffix):
    picture = moving_square()[3]
    image.fromarray(picture).save(tmp_path / f"a{suffix}")
    assert psnr(read_image(tmp_path / f"a{suffix}")[None], picture[None])[0] > 25
    image.fromarray(picture[:, :, 0]).save(tmp_path / f"grey{suffix}")
    assert read_image(tmp_path / f"grey{suffix}").shape == picture.shape


def test_image_that_lies_on_its_side(tmp_path):
    picture = moving_square()[3]
    exif = image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees clockwise
    image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.rot90(picture, -1))


@pytest.mark.parametrize("content", [b"", b"This is a text.\n" * 100, None])
def test_not_an_image(tmp_path, content):
    with pytest.raises(WaltError, match=r"no such image: .*a\.png"):
        read_image(tmp_path / "a.png")
    write_png(tmp_path / "a.png", moving_square()[0])
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:-40] if content is None else content)
    with pytest.raises(WaltError, match=r"a\.png is not an image that can be decoded"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_animated_image(tmp_path, suffix):
    frames = [image.fromarray(picture) for picture in moving_square(3)]
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(WaltError, match=rf"a\{suffix} is animated; make it a video, such as an \.mp4 or a \.gif"):
        read_image(tmp_path / f"a{suffix}")


def test_photograph_with_a_preview(tmp_path):
    """Cameras write both into one .jpg, which is no animation."""
    first, second = (image.fromarray(picture) for picture in moving_square(2))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    assert psnr(read_image(tmp_path / "a.jpg")[None], moving_square(1))[0] > 25


def test_image_that_claims_to_be_huge(tmp_path, monkeypatch):
    write_png(tmp_path / "a.png", moving_square()[0])
    monkeypatch.setattr(image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(WaltError, match=r"a\.png is not an image that can be decoded: Image size"):
        read_image(tmp_path / "a.png")


def test_gif(tmp_path):
    video = moving_square()
    write_gif(tmp_path / "clip.gif", video)
    with image.open(tmp_path / "clip.gif") as picture:
        assert picture.n_frames == len(video)
        assert picture.size == (64, 48)
        assert picture.info["loop"] == 0
        picture.seek(4)
        back = np.array(picture.convert("RGB"))
    assert psnr(back[None], video[4][None])[0] > 30


def test_png_is_exact(tmp_path):
    picture = moving_square()[3]
    write_png(tmp_path / "frame.png", picture)
    assert np.array_equal(np.array(image.open(tmp_path / "frame.png")), picture)


def test_tile_places_videos_in_rows():
    videos = np.stack([np.full((2, 4, 6, 3), value, np.uint8) for value in (10, 20, 30)])
    sheet = tile(videos, columns=2, margin=1, scale=2)
    assert sheet.shape == (2, 2 * 9 + 1, 2 * 13 + 1, 3)
    assert (sheet[:, 1:9, 1:13] == 10).all()
    assert (sheet[:, 1:9, 14:26] == 20).all()
    assert (sheet[:, 10:18, 1:13] == 30).all()


def test_missing_video(tmp_path):
    with pytest.raises(WaltError, match=r"no such video: .*nowhere\.mp4"):
        read_video(tmp_path / "nowhere.mp4")


@pytest.mark.parametrize("content", [b"", b"This is a text.\n" * 100, bytes(range(256)) * 40])
def test_not_a_video(tmp_path, content):
    path = tmp_path / "letter.mp4"
    path.write_bytes(content)
    with pytest.raises(WaltError, match=r"letter\.mp4 (is not a video|has no video stream|gives 0 frames)"):
        read_video(path)


def test_truncated_video(tmp_path):
    write_mp4(tmp_path / "clip.mp4", moving_square())
    whole = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(WaltError, match=r"cut\.mp4"):
        read_video(tmp_path / "cut.mp4")


def test_too_few_frames(tmp_path):
    write_mp4(tmp_path / "clip.mp4", moving_square(9))
    with pytest.raises(WaltError, match=r"clip\.mp4 gives 9 frames .* but 17 are needed"):
        read_video(tmp_path / "clip.mp4", frames=17)


def test_unknown_suffix(tmp_path):
    with pytest.raises(WaltError, match=r"must end in \.mp4 or \.gif"):
        write_video(tmp_path / "clip.xyz", moving_square())


def test_wrong_array(tmp_path):
    with pytest.raises(WaltError, match=r"uint8 \[T, H, W, 3\].*float64 \[2, 4, 4, 3\]"):
        write_mp4(tmp_path / "clip.mp4", np.zeros((2, 4, 4, 3)))


@pytest.mark.parametrize(("module", "write"), [("av", write_mp4), ("PIL.Image", write_gif)])
def test_missing_dependency_names_the_extra(tmp_path, monkeypatch, module, write):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(WaltError, match=r'pip install "walt-kernels\[video\]"'):
        write(tmp_path / "clip.mp4", moving_square())


def test_unwritable_target_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WaltError, match="cannot write"):
        write_gif(tmp_path / "file" / "clip.gif", moving_square())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]

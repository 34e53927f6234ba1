"""Video and image files: read with PyAV and Pillow, write mp4, gif and png. A video is uint8 [T, H, W, 3], RGB."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from walt.atomic import atomic_write, check_writable, write_new_array
from walt.errors import WaltError, require
from walt.rates import check_rate

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".mpg", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SIDES = {".mp4": 16384, ".gif": 65535, ".png": 2**31 - 1}  # pixels of a side, at most
OBLONG = 16  # times as wide as high, or the other way, at most: a pixel here, a stored frame in walt.data.pixels
STILL = 60  # seconds between two frames, at most, where films are read at a rate: a wrong time stamp may say years
CONVERTED = (0, 1, 2, 3, 4, 5, 6, 7, 9)  # colour matrices of H.273 that FFmpeg knows; not YCgCo (8) and ICtCp (14), say
# Pillow scales the samples of a PNG to 8 bits, by its name for their layout, but not the colour that is transparent.
SCALES = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
BT709, UNSPECIFIED, RESERVED, BT601 = 1, 2, 3, 6  # colour matrices, primaries and curves as H.273 has them
LIMITED = 1  # range of a colour: 16 to 235
PIXELS = 178_956_970  # of a .png, at most: Pillow opens no picture of more
FPS = 12.0  # frames a second of a video that is written, where nothing says more

Frame = TypeVar("Frame")


def iterate_video(path: str | Path, fps: float = 0.0) -> Iterator[np.ndarray]:
    """The frames of a video one by one, uint8 [H, W, 3], as a player shows them. None is kept.

    Colours: by the matrix and range that the file names; where it names no matrix, BT.709 for high definition and
    BT.601 below. Primaries and transfer curve are left as they are. Transparent parts lie over white.
    Geometry: pixels that are not square become so in width, then the display matrix turns and mirrors.
    Time: every frame, or with `fps` those of `resample`.

    Raises WaltError if the file is missing, is no video, changes its size on the way, has pixels more than OBLONG times
    as wide as high or the other way or, with `fps`, frames more than STILL seconds apart.
    """
    shape = rotation = None
    with _open_stream(path) as (container, stream):
        pixel = stream.sample_aspect_ratio or Fraction(1)
        if not 1 <= OBLONG * pixel <= OBLONG**2:
            raise WaltError.of(path, f"has pixels {pixel} as wide as high; expected at most {OBLONG} to 1")
        frames = container.decode(stream)
        for index, frame in enumerate(resample(_timed(frames, stream), fps, str(path)) if fps else frames):
            # A frame whose side data was looked at is freed only when Python looks for cycles, so that of one is used.
            if index == 0 or frame.rotation != rotation:
                rotation, upright = frame.rotation, _upright(frame)
            picture = upright(_picture(frame, pixel))
            shape = picture.shape if shape is None else shape
            if picture.shape != shape:
                raise WaltError.of(path, f"changes its size from {shape[:2]} to {picture.shape[:2]} at frame {index}")
            yield picture


def _picture(frame: Any, pixel: Fraction) -> np.ndarray:
    """A decoded frame as uint8 [H, W, 3], its colours and square pixels (see `iterate_video`)."""
    if frame.colorspace in (UNSPECIFIED, RESERVED) and not frame.format.is_rgb:
        frame.colorspace = BT709 if frame.width >= 1280 or frame.height > 576 else BT601  # as players guess
    # With them, libswscale would convert to other primaries, and refuses the numbers that it does not know.
    frame.color_primaries = frame.color_trc = UNSPECIFIED
    alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    width = max(1, round(frame.width * pixel))
    try:
        picture = frame.reformat(width=width, format="rgba" if alpha else "rgb24").to_ndarray()
    except OSError as error:
        if frame.colorspace in CONVERTED:
            raise
        raise ValueError(f"its colour matrix, number {int(frame.colorspace)} of H.273, cannot be converted") from error
    return _over_white(picture) if alpha else picture


def _upright(frame: Any) -> Callable[[np.ndarray], np.ndarray]:
    """What turns and mirrors pictures: the display matrix sends a pixel at (x, y) to (a x + c y, b x + d y)."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV 18 and older, for a film with side data of a kind that it does not know
        quarters = round(frame.rotation / 90)
        return lambda picture: np.rot90(picture, quarters)
    a, b, _, c, d = (1, 0, 0, 0, 1) if matrix is None else np.frombuffer(matrix, np.int32)[:5].tolist()
    swapped = abs(b) + abs(c) > abs(a) + abs(d)
    columns, rows = (-1 if side < 0 else 1 for side in ((c, b) if swapped else (a, d)))
    return lambda picture: (picture.swapaxes(0, 1) if swapped else picture)[::rows, ::columns]


def _over_white(picture: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 4], RGB and alpha -> uint8 [H, W, 3]."""
    colour, alpha = picture[..., :3].astype(np.uint16), picture[..., 3:].astype(np.uint16)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _timed(frames: Iterable[Any], stream: Any) -> Iterator[tuple[Fraction, Fraction, Any]]:
    """Frames with their first and last moment in seconds.

    A time stamp that is missing, or not later than the one before, counts as one frame later.
    """
    usual = 1 / Fraction(stream.average_rate or 25)
    last = None
    for frame in frames:
        stamp = frame.dts if frame.pts is None else frame.pts
        time = Fraction(0) if stamp is None else stamp * stream.time_base
        last = time if last is None or time > last else last + usual
        yield last, last + ((frame.duration or 0) * stream.time_base or usual), frame


def resample(frames: Iterable[tuple[Fraction, Fraction, Frame]], fps: float, name: str = "the film") -> Iterator[Frame]:
    """Of frames with the first and last moment of each, those of an even rate: frame k is the one that begins nearest
    to k / fps seconds after the first, of two the earlier. So many as the film's length, rounded, has room for.

    WaltError, with the film's `name`, if a frame would be shown for more than STILL seconds.
    """
    step = 1 / Fraction(fps)
    shown: tuple[Fraction, Fraction, Frame] | None = None
    begin = instant = Fraction(0)
    index = -1
    for index, current in enumerate(frames):
        if shown is None:
            begin = instant = current[0]
        elif (apart := current[0] - shown[0]) > STILL:
            where = f"frames {index - 1} and {index} are {float(apart):g} s apart"
            raise WaltError.of(f"{name}:", f"{where}, expected {STILL} s at most; cut the film there")
        while shown is not None and 2 * instant <= shown[0] + current[0]:
            yield shown[2]
            instant += step
        shown = current
    if shown is not None and (length := shown[1] - shown[0]) > STILL:
        last = f"its last frame, {index}, is shown for {float(length):g} s, expected {STILL} s at most"
        raise WaltError.of(f"{name}:", last)
    while shown is not None and (instant == begin or instant + step / 2 <= shown[1]):
        yield shown[2]
        instant += step


def read_video(path: str | Path, *, start: int = 0, frames: int | None = None) -> np.ndarray:
    """Frames start .. start + frames - 1 (all that follow if frames is None) as uint8 [T, H, W, 3].

    Raises WaltError if the file is missing, is no video, or holds too few frames.
    """
    stop = None if frames is None else start + frames
    pictures = list(islice(iterate_video(path), start, stop))
    if not pictures or (frames is not None and len(pictures) < frames):
        wanted = "at least 1" if frames is None else str(frames)
        raise WaltError(f"{path} gives {len(pictures)} frames from frame {start} on, but {wanted} are needed")
    return np.stack(pictures)


def frame_rate(path: str | Path) -> float:
    """Frames a second, on average; 0 if the file does not say."""
    with _open_stream(path) as (container, stream):
        if container.format.name != "gif":
            return float(stream.average_rate or 0)
    return frame_timing(path)[0]


def frame_timing(path: str | Path) -> tuple[float, bool]:
    """`frame_rate`, and whether it varies: more than one in twenty of the distances between frames is off the usual one
    by half of it or more. By the time stamps of the coded packets; nothing is decoded.
    """
    with _open_stream(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if (packet.pts, packet.dts) != (None, None)]
        stamps = np.sort([packet.dts if packet.pts is None else packet.pts for packet in packets])
        rate = float(stream.average_rate or 0)
        if container.format.name == "gif" and len(stamps) > 1:  # FFmpeg's is a guess; the last frame may be held
            rate = float((len(stamps) - 1) / ((stamps[-1] - stamps[0]) * stream.time_base))
    steps = np.diff(stamps)
    usual = np.median(steps) if len(steps) else 0
    return rate, bool((np.abs(steps - usual) >= usual / 2).mean() > 0.05) if usual else False


@contextlib.contextmanager
def _open_stream(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream. What goes wrong while they are read is a WaltError.

    FFmpeg gets an open file and no name, which it might take for a URL, and may open no other file that this one names.
    """
    av = require("av", "video")
    if not Path(path).is_file():
        raise WaltError(f"no such video: {path}", reason="no such video")
    try:
        # Names in it that are no UTF-8 do no harm.
        options = {"metadata_errors": "ignore", "options": {"protocol_whitelist": "none"}}
        with Path(path).open("rb") as file, av.open(file, **options) as container:
            if not container.streams.video:
                raise WaltError.of(path, "has no video stream")
            yield container, container.streams.video[0]
    except (av.error.FFmpegError, OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise WaltError.of(path, f"is not a video that can be decoded: {why}") from error


def read_image(path: str | Path) -> np.ndarray:
    """A picture as uint8 [H, W, 3], turned and mirrored as its EXIF orientation says, transparent parts over white.

    Raises WaltError if the file is missing, is no picture, or has 32 bits a channel (Pillow's modes I and F), of which
    nothing says what white is.
    """
    image: Any = require("PIL.Image", "video")
    ops: Any = require("PIL.ImageOps", "video")
    if not Path(path).is_file():
        raise WaltError(f"no such image: {path}", reason="no such image")
    try:
        with image.open(path) as picture:
            if getattr(picture, "is_animated", False) and picture.format != "MPO":  # a photograph with its preview
                raise WaltError.of(path, "is animated; make it a video, such as an .mp4 or a .gif")
            # Pillow before 11 opens 16 bits of a PNG or PGM as 32.
            deep = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))
            _scale_transparent(picture)
            return _eight_bit(ops.exif_transpose(picture), deep)
    except WaltError:
        raise
    except Exception as error:  # on broken files, Pillow's formats raise what they like
        raise WaltError.of(path, f"is not an image that can be decoded: {error}") from error


def _scale_transparent(picture: Any) -> None:
    """Before the samples are read: a transparent colour of a PNG on the scale that Pillow gives them."""
    layout = str(picture.tile[0][3]) if getattr(picture, "tile", None) else ""
    if layout in SCALES and "transparency" in picture.info:
        colour = np.multiply(picture.info["transparency"], SCALES[layout]).astype(int)
        picture.info["transparency"] = tuple(colour.tolist()) if colour.ndim else int(colour)


def _eight_bit(picture: Any, deep: bool) -> np.ndarray:
    """A picture of Pillow's, of any mode, as uint8 [H, W, 3]. `deep`: it is grey of 16 bits."""
    if deep:  # Pillow's own conversion takes all above 255 for white
        values = np.asarray(picture)
        grey = np.rint(values / 257).astype(np.uint8)
        grey[values == picture.info.get("transparency", -1)] = 255
        return np.repeat(grey[..., None], 3, axis=-1)
    if picture.mode in ("I", "F"):
        raise ValueError(f"its mode is {picture.mode}, 32 bits of no known scale; expected 8 or 16 bits a channel")
    if picture.mode == "La":  # alpha multiplied in, which Pillow takes out on the way to LA alone
        picture = picture.convert("LA")
    if picture.has_transparency_data:
        return _over_white(np.array(picture.convert("RGBA")))
    return np.array(picture.convert("RGB"))


def check_output(path: str | Path, allowed: Sequence[str] = (".mp4", ".gif")) -> None:
    """WaltError, before the work that `path` is for, if its name ends in something else or it cannot be written."""
    if Path(path).suffix.lower() not in allowed:
        raise WaltError(f"cannot write {path}: the name must end in {' or '.join(allowed)}")
    check_writable(path)


def check_size(path: str | Path, height: int, width: int) -> None:
    """WaltError if frames of that many pixels are more than the format that `path` ends in takes."""
    suffix = Path(path).suffix.lower()
    limit = ""
    if suffix == ".png" and height * width > PIXELS:
        limit = f"viewers take a .png of at most {PIXELS}"
    if max(height, width) > (side := SIDES.get(suffix, SIDES[".mp4"])):
        limit = f"{suffix} takes at most {side} a side"
    if limit:
        raise WaltError(f"cannot write {path}: it would have {height}x{width} pixels; {limit}")


def write_mp4(path: str | Path, video: Iterable[np.ndarray], fps: float = FPS) -> None:
    """H.264, 4:2:0. Odd heights and widths get one more row or column (a copy of the edge), as 4:2:0 needs.

    The frames may come one by one, uint8 [H, W, 3] of one size.
    """
    av = require("av", "video")
    frames = iter(video)
    first = next(frames, np.empty(0))
    height, width, _ = _check(path, video if isinstance(video, np.ndarray) else first[None], fps).shape[1:]
    edges = ((0, height % 2), (0, width % 2), (0, 0))
    with atomic_write(path) as temporary:
        try:
            # An open file, since FFmpeg would take some names for URLs.
            with temporary.open("wb") as file, av.open(file, "w", format="mp4") as container:
                # The fraction that was meant: 30000/1001 for 29.97002997002997.
                stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10_000))
                stream.height, stream.width = height + height % 2, width + width % 2
                stream.pix_fmt = "yuv420p"
                stream.options = {"crf": "14"}
                coder = stream.codec_context
                coder.colorspace = coder.color_primaries = coder.color_trc = BT709
                coder.color_range = LIMITED
                for picture in chain([first], frames):
                    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(np.pad(picture, edges, mode="edge")))
                    frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
        except av.error.FFmpegError as error:
            raise WaltError(f"cannot write {path}: {error.strerror or error}") from error


def write_gif(path: str | Path, video: np.ndarray, fps: float = FPS) -> None:
    """An endless GIF with one palette for all frames (adaptive palettes flicker and are 40 times slower).

    Its clock ticks 100 times a second: frames take one tick more or less, so that the rate is right on the whole. Above
    50 frames a second each takes 2 ticks, since browsers slow down what is faster.
    """
    image = require("PIL.Image", "video")
    video = _check(path, video, fps)
    sampled = video[:: max(1, len(video) // 4)]
    palette = image.fromarray(sampled.reshape(-1, *video.shape[2:])).quantize(256, dither=image.Dither.NONE)
    pictures = [image.fromarray(p).quantize(palette=palette, dither=image.Dither.NONE) for p in video]
    ticks = [round(100 * i / min(fps, 50)) for i in range(len(video) + 1)]
    durations = [10 * (end - start) for start, end in pairwise(ticks)]
    with atomic_write(path) as temporary:
        pictures[0].save(
            temporary, save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=False
        )


def write_png(path: str | Path, picture: np.ndarray) -> None:
    """uint8 [H, W, 3]."""
    image: Any = require("PIL.Image", "video")
    with atomic_write(path) as temporary:
        image.fromarray(picture).save(temporary)


def write_video(path: str | Path, video: Iterable[np.ndarray], fps: float = FPS) -> None:
    """By suffix: .mp4 or .gif, for which all frames are held in memory."""
    check_output(path)
    if Path(path).suffix.lower() == ".gif":
        write_gif(path, video if isinstance(video, np.ndarray) else np.stack(list(video)), fps)
    else:
        write_mp4(path, video, fps)


@contextlib.contextmanager
def keeping(samples: np.ndarray, path: str | Path) -> Iterator[None]:
    """Around the writing of samples: if that fails, they go to a new NumPy file beside `path`, or else in the folder
    for temporary files, and the WaltError says where they are."""
    try:
        yield
    except Exception as error:  # a codec may raise anything; sampling may have taken hours
        reason = error if isinstance(error, WaltError) else f"cannot write {path}: {error or type(error).__name__}"
        for folder in (Path(path).parent, Path(tempfile.gettempdir())):
            try:
                kept = write_new_array(samples, folder, Path(path).name[:50])
            except OSError:
                continue
            raise WaltError(f"{reason}; the samples, uint8 {list(samples.shape)}, are kept in {kept}") from error
        raise


MARGIN, GREY = 2, 24  # of `tile`, in pixels, and its colour


def tile(videos: np.ndarray, columns: int, *, margin: int = MARGIN, scale: int = 1) -> np.ndarray:
    """Videos [N, T, H, W, 3] side by side in rows of `columns`, each pixel repeated `scale` times -> [T, H', W', 3]."""
    videos = np.asarray(videos).repeat(scale, axis=2).repeat(scale, axis=3)
    count, frames, height, width, _ = videos.shape
    sheet = np.full((frames, *sheet_size(count, columns, height, width, margin), 3), GREY, np.uint8)
    for index, video in enumerate(videos):
        top = margin + index // columns * (height + margin)
        left = margin + index % columns * (width + margin)
        sheet[:, top : top + height, left : left + width] = video
    return sheet


def sheet_size(count: int, columns: int, height: int, width: int, margin: int = MARGIN) -> tuple[int, int]:
    """Height and width of what `tile` makes of `count` videos."""
    return -(-count // columns) * (height + margin) + margin, columns * (width + margin) + margin


def tiles_of(picture: np.ndarray, height: int, width: int) -> int:
    """How many clips of height x width a frame uint8 [H, W, 3] has place for, if it looks like `tile`'s; else 0."""
    (rows, below), (columns, beside) = (
        divmod(side - MARGIN, length + MARGIN) for side, length in zip(picture.shape, (height, width), strict=False)
    )
    edges = [*picture[:MARGIN].ravel().tolist(), *picture[:, :MARGIN].ravel().tolist()]
    grey = abs(np.median(edges) - GREY) < 8  # a codec may have changed it
    return rows * columns if grey and not (below or beside) else 0


def _check(path: str | Path, video: np.ndarray, fps: float) -> np.ndarray:
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or not len(video):
        raise WaltError(f"a video must be uint8 [T, H, W, 3] with T >= 1, got {video.dtype} {list(video.shape)}")
    check_size(path, *video.shape[1:3])
    check_rate(fps)
    return video

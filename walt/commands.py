"""What the commands do, beside `walt demo` (`walt.demo`) and the inner workings of training (`walt.runs`)."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from walt.atomic import check_writable, write_json
from walt.checkpoint import TensorFiles, fingerprint, load_description
from walt.data.clips import ClipStore
from walt.data.pixels import fill, to_model, to_pixels
from walt.data.prepare import prepare as prepare_folder
from walt.data.simulator import write_demo_folder
from walt.data.video import (
    FPS,
    IMAGE_SUFFIXES,
    check_output,
    check_size,
    frame_rate,
    keeping,
    read_image,
    read_video,
    sheet_size,
    tile,
    write_png,
    write_video,
)
from walt.distributed import process_group
from walt.doctor import doctor as diagnose
from walt.errors import WaltError, as_user_error
from walt.evaluate.evaluate import METRICS as METRIC_NAMES
from walt.evaluate.evaluate import evaluate as compare
from walt.evaluate.networks import FrameFeatures, VideoFeatures
from walt.evaluate.real_clips import real_clips, trained_on
from walt.info import describe, table
from walt.model.config import SPACE_FACTOR
from walt.model.text import ByteEncoder
from walt.model.tokenizer import Tokenizer
from walt.pretrained import load_tokenizer
from walt.rates import check_rate
from walt.sample.codec import decode_film, encode_film
from walt.sample.denoiser import local_folder
from walt.sample.pipeline import OVERLAP, WaltPipeline
from walt.settings import load_settings
from walt.train.denoiser import train_denoiser
from walt.train.run import Run, alone, captions_of, check, open_data, warn_of_cut_captions
from walt.train.tokenizer import train_tokenizer
from walt.train.trainer import Trainer

METRICS = tuple(METRIC_NAMES)
DEVICES = ("cpu", "cuda", "mps", "xpu")


def demo_data(arguments: argparse.Namespace) -> None:
    a = arguments
    with as_user_error("--frames, --size"):
        write_demo_folder(a.out, clips_per_class=a.num, frames=a.frames, size=a.size, seed=a.seed)
    print(f"{a.out}: {len(list(a.out.glob('*/*.mp4')))} clips in {len(list(a.out.glob('*/')))} classes, captions.jsonl")


def prepare(arguments: argparse.Namespace) -> None:
    height, width = arguments.size
    store = prepare_folder(
        arguments.data,
        arguments.out,
        height=height,
        width=width,
        captions=captions_of(arguments.data, arguments.captions),
        shots=not arguments.no_shots,
        fps=arguments.fps,
        held_out=arguments.held_out,
    )
    print(f"{arguments.out}: {_contents(store)}")
    warn_of_cut_captions(store, ByteEncoder())


def _contents(store: ClipStore) -> str:
    videos = [item for item in store.items if item.kind == "video"]
    shots = sum(len(item.shots) for item in videos)
    frames = sum(item.frames for item in store.items)
    return (
        f"{len(videos)} videos with {shots} shots and {len(store.items) - len(videos)} images, {frames} frames,"
        f" {len(store.classes)} classes, {sum(map(bool, store.caption))} captions"
    )


def train(arguments: argparse.Namespace) -> None:
    a = arguments
    stage = f"sr{a.level}" if a.stage == "sr" else a.stage
    short = {"training.steps": a.steps, "training.lr": a.lr, "training.seed": a.seed}
    short |= {"data.batch": a.batch, "data.frames": a.frames, "data.fps": a.fps}
    if a.size is not None:
        short |= {"data.height": a.size[0], "data.width": a.size[1]}
    overrides = [f"{name}={value}" for name, value in short.items() if value is not None]
    settings = load_settings(stage, preset=a.preset, file=a.config, overrides=[*overrides, *a.overrides])
    if stage != "tokenizer":
        load_description(a.out / "tokenizer", "tokenizer")  # before the data is prepared, which may take long
    with process_group() as device, alone(a.out):
        store = open_data(a.data, a.out, settings, a.captions)
        print(f"data: {_contents(store)}")
        trainer = train_stage(Run(stage, settings, store, a.out, device, a.new_settings))
        print(f"{trainer.folder}: {trainer.step} steps in {trainer.elapsed:.0f} s; losses in {trainer.log_path}")


def sample(arguments: argparse.Namespace) -> None:
    a = arguments
    out: Path = a.out or Path("samples.png" if a.images else "samples.mp4")
    if out.suffix.lower() == ".png" and not a.images:
        raise WaltError(f"cannot write {out}: pictures are made with --images, clips are .mp4 or .gif")
    check_output(out, (".png",) if a.images else (".mp4", ".gif"))
    labels, texts = a.label or [], a.text or []
    for option, values in (("--class", labels), ("--text", texts)):
        if a.num and len(values) > a.num:
            raise WaltError(f"{option}: given {len(values)} times; expected {a.num} at most (--num)")
    pipeline = _pipeline(a)
    clip, frames, fps = pipeline.clip, None, a.fps or pipeline.clip.fps
    if a.first_frames is not None:
        frames = _first_frames(a.first_frames, a.given, clip.height, clip.width)
        if a.given > 1:  # they have a rate, which a single frame has not
            fps = _rate(a, a.first_frames, clip.fps)
    if not labels and not texts:
        labels = list(pipeline.classes)
    num = a.num or max(len(labels), len(texts), 1)
    columns = min(num, max(8 if a.images else 4, math.isqrt(num - 1) + 1))
    if num > 1 or a.images:
        check_size(out, *sheet_size(num, columns, clip.height, clip.width))
    label, text = _in_turn(labels, num), _in_turn(texts, num)
    made = pipeline.generate(label, num, text=text, frames=frames, images=a.images, **_sampling(a))
    with keeping(made, out):
        if a.images:
            write_png(out, tile(made[:, None], columns)[0])
        else:
            write_video(out, tile(made, columns) if num > 1 else made[0], fps)
    given = [*labels[:num], *(" ".join(sentence.split()) or "no text" for sentence in texts[:num])]
    kind = ("picture" if a.images else "clip") + "s" * (num > 1)
    print(f"{out}: {num} {kind} of {', '.join(given) or 'no class'}")


def _in_turn(values: list[str], num: int) -> list[str] | None:
    """`num` of them, from the first again after the last."""
    return [values[i % len(values)] for i in range(num)] if values else None


def _rate(arguments: argparse.Namespace, video: Path, default: float) -> float:
    """Frames a second of what is made from a video: those asked for, or else the video's."""
    fps = float(arguments.fps or frame_rate(video) or default)
    check_rate(fps)
    return fps


def extend(arguments: argparse.Namespace) -> None:
    out = arguments.out or Path("extended.mp4")
    check_output(out)
    pipeline, video = _pipeline(arguments), read_video(arguments.video)
    fps = _rate(arguments, arguments.video, pipeline.clip.fps)
    missing = arguments.frames - len(video)
    if missing <= 0:
        raise WaltError(f"--frames {arguments.frames}: {arguments.video} has {len(video)} already")
    if pipeline.clip.frames == 1:
        raise WaltError(f"{arguments.source} makes pictures, which cannot be extended")
    chunks = chunks_for(missing, pipeline.clip.frames)
    longer = pipeline.extend(video, chunks, label=arguments.label, text=arguments.text, **_sampling(arguments))
    with keeping(longer, out):
        write_video(out, longer, fps)
    print(f"{out}: {len(video)} -> {len(longer)} frames, {fps:g} a second")


def chunks_for(missing: int, clip: int) -> int:
    """How often to go on with clips of so many frames, until `missing` frames or more are new."""
    return -(-missing // (clip - (OVERLAP if clip > OVERLAP else 1)))


def upscale(arguments: argparse.Namespace) -> None:
    out = arguments.out or Path("upscaled.mp4")
    check_output(out)
    pipeline, video = _pipeline(arguments), read_video(arguments.video)
    fps = _rate(arguments, arguments.video, pipeline.clip.fps)
    stages = len(pipeline.upscalers)
    scale = 2 ** min(arguments.stages or stages, stages)
    check_size(out, scale * video.shape[1], scale * video.shape[2])
    larger = pipeline.upscale(
        video, stages=arguments.stages, label=arguments.label, text=arguments.text, **_sampling(arguments)
    )
    with keeping(larger, out):
        write_video(out, larger, fps)
    print(f"{out}: {video.shape[2]}x{video.shape[1]} -> {larger.shape[2]}x{larger.shape[1]} pixels")


def _pipeline(arguments: argparse.Namespace) -> WaltPipeline:
    device = _device(arguments)  # first: the model may be a download
    return WaltPipeline.from_pretrained(arguments.source).to(device)


def _tokenizer(arguments: argparse.Namespace) -> Tokenizer:
    device, folder = _device(arguments), local_folder(arguments.source)
    if not folder.is_dir():
        raise WaltError(f"no such folder: {folder}")
    return load_tokenizer(folder / "tokenizer").to(device)


def _device(arguments: argparse.Namespace) -> torch.device:
    """The device that was asked for, after a number was written there and read back."""
    name = arguments.device
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name.partition(":")[0] not in {*DEVICES, *(there.partition(":")[0] for there in _devices())}:
            raise ValueError("expected cpu, cuda, cuda:N, mps or xpu")  # PyTorch knows others, that hold no tensors
        number = torch.zeros(1, device=name)
        number.item()
    except (ValueError, RuntimeError, AssertionError, ImportError) as error:  # which of them is the backend's choice
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise WaltError(f"--device {shlex.quote(name)}: {reason}; there is {', '.join(_devices())}") from error
    return number.device


def _devices() -> list[str]:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator is not None else 0
    return ["cpu", *(f"{accelerator}:{index}" for index in range(count))]


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("steps", "seed", "guidance", "guidance_power", "batch")}


def _first_frames(path: Path, count: int, height: int, width: int) -> np.ndarray:
    """The first frames of a video, or a picture, as large as the model's: [count, height, width, 3]."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        frames = read_image(path)[None]
        if count > 1:
            raise WaltError(f"--given {count}: {path} is a single picture")
    else:
        frames = read_video(path, frames=count)
    with as_user_error(str(path)):
        return fill(frames, height, width)


def encode(arguments: argparse.Namespace) -> None:
    check_output(arguments.out, (".safetensors",))
    tokenizer = _tokenizer(arguments)
    with as_user_error("--tile"):
        count, shape = encode_film(tokenizer, arguments.video, arguments.out, **_tiles(arguments))
    _, frames, height, width = tokenizer.config.video_shape(*shape[2:])
    cut = "" if frames == count else f" (of {count}: a clip has 1 + 4k)"
    print(f"{arguments.out}: {frames} frames{cut} of {height}x{width} -> latent {shape}")


def decode(arguments: argparse.Namespace) -> None:
    check_output(arguments.out)
    tokenizer = _tokenizer(arguments)
    if not arguments.latents.is_file():
        raise WaltError(f"no such file: {arguments.latents}")
    files = TensorFiles(arguments.latents)
    if "latent" not in files.shapes:
        raise WaltError(f"{arguments.latents} holds no tensor named latent; expected what walt encode writes")
    key = fingerprint(tokenizer)
    if files.metadata.get("tokenizer", key) != key:
        raise WaltError(
            f"{arguments.latents} holds latents of another tokenizer than {arguments.source};"
            " encode the video again, or name the model that it was encoded with"
        )
    with as_user_error(str(arguments.latents)):
        # Pictures have no rate, nor have files from before it was written.
        stored = float(files.metadata.get("fps", 0))
        fps = arguments.fps or stored or trained_on(local_folder(arguments.source))[0]["fps"] or FPS
        check_rate(fps)
        frames, height, width = decode_film(tokenizer, files, arguments.out, fps, **_tiles(arguments))
    print(f"{arguments.out}: {frames} frames of {height}x{width}, {fps:g} a second")


def _tiles(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.tile is None:
        return {}
    return {"tile": arguments.tile, "overlap": min(arguments.tile) // 4 // SPACE_FACTOR * SPACE_FACTOR}


def evaluate(arguments: argparse.Namespace) -> None:
    """Reconstructions of the real clips for PSNR and SSIM, samples of their classes for the other metrics."""
    if arguments.json is not None:
        check_writable(arguments.json)
    paired = [name for name in arguments.metrics if name in ("psnr", "ssim")]
    others = [name for name in arguments.metrics if name not in paired]
    pipeline = _pipeline(arguments) if others else None
    tokenizer = pipeline.tokenizer if pipeline else _tokenizer(arguments)
    folder = local_folder(arguments.source)
    clip, _ = trained_on(folder)
    trained = (clip["frames"], clip["height"], clip["width"])
    frames, size = arguments.frames or trained[0], arguments.size or trained[1:]
    with as_user_error("--frames, --size"):
        tokenizer.config.latent_shape(frames, *size)
    if pipeline is not None and (frames, *size) != trained:
        raise WaltError(
            f"--frames {frames}, --size {size[0]}x{size[1]}: samples have {trained[0]} frames of"
            f" {trained[1]}x{trained[2]} pixels; ask for these, or for psnr and ssim alone"
        )
    real, labels, texts = real_clips(arguments.data, arguments.num, frames, size, folder)
    results = {}
    with as_user_error("evaluate"):
        if paired:
            results["reconstructions"] = compare(real, np.concatenate(list(_reconstructions(tokenizer, real))), paired)
        if pipeline is not None:
            options = {name: getattr(arguments, name) for name in ("steps", "seed", "guidance")}
            label = [pipeline.label(name) if name in pipeline.classes else None for name in labels] or None
            text = texts if pipeline.text is not None and texts else None
            made = pipeline.generate(label, len(real), text=text, **options)  # type: ignore[arg-type]
            results["samples"] = compare(real, made, others, **_networks(arguments, tokenizer, others))
    for name, result in results.items():
        print(f"{name}: {result}")
    if arguments.json is not None:
        write_json(arguments.json, {name: asdict(result) for name, result in results.items()})


def _networks(arguments: argparse.Namespace, tokenizer: Tokenizer, metrics: list[str]) -> dict[str, Any]:
    """What gives the metrics their features, where the tokenizer is."""
    device = tokenizer.latent_mean.device
    networks: dict[str, Any] = {}
    if {"fvd", "inception_score"} & set(metrics):
        networks["video"] = VideoFeatures(arguments.weights, device=device)
    if "frechet_image_distance" in metrics:
        networks["image"] = FrameFeatures(device=device)
    return networks


@torch.inference_mode()
def _reconstructions(tokenizer: Tokenizer, real: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(real), 8):
        video = to_model(real[start : start + 8]).to(tokenizer.latent_mean)
        yield to_pixels(tokenizer.decode(tokenizer.encode(video)).cpu())


def info(arguments: argparse.Namespace) -> None:
    print(table(arguments.batch) if arguments.all else describe(arguments.name, arguments.batch))


def doctor(arguments: argparse.Namespace) -> None:
    for line in diagnose(arguments.out):
        print(line)


def train_stage(run: Run) -> Trainer[Any]:
    """Train the stage, from its checkpoint if there is one, to its last step.

    `training.accumulate` and the number of processes change rounding alone, but for the tokenizer's decorrelation loss,
    which is a statistic of the part of the batch that is at hand: it is then the mean over smaller parts.
    """
    check(run)
    return train_tokenizer(run) if run.stage == "tokenizer" else train_denoiser(run)

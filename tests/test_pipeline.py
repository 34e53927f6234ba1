"""WaltPipeline on tiny untrained models whose every parameter counts: what it returns, and from what."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from walt.errors import WaltError
from walt.model.config import ClipShape, DiffusionConfig, TokenizerConfig, TransformerConfig
from walt.model.diffusion import Diffusion
from walt.model.text import ByteEncoder
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.sample.denoiser import Denoiser
from walt.sample.pipeline import WaltPipeline
from walt.sample.sampler import clip_starts, join_clips

TOKENIZER = TokenizerConfig(
    channels=4, multipliers=(1, 1, 1, 1), blocks=1, middle_blocks=0, latent_channels=4, groups=2
)
BASE = TransformerConfig(
    layers=2,
    width=32,
    heads=2,
    latent_size=(3, 2, 2),
    latent_channels=4,
    spatial_window=(1, 2, 2),
    spacetime_window=(3, 2, 2),
    classes=2,
    text_width=8,
    text_length=12,
    text_vocabulary=256,
    frame_condition=True,
)
SR1 = replace(
    BASE,
    latent_size=(3, 4, 4),
    patch=2,
    classes=0,
    text_width=0,
    text_vocabulary=0,
    frame_condition=False,
    low_resolution=True,
)
CLIP = ClipShape(9, 16, 16, 8)
QUICK = {"steps": 2, "progress": False}


def alive(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def build(**changes) -> WaltPipeline:
    torch.manual_seed(0)
    parts = {
        "tokenizer": alive(Tokenizer(TOKENIZER)),
        "transformer": alive(Transformer(BASE)),
        "diffusion": Diffusion(),
        "clip": CLIP,
        "classes": ("left", "right"),
        "text": ByteEncoder(12),
        "upscalers": [
            Denoiser(alive(Transformer(SR1)), Diffusion(), ClipShape(9, 32, 32, 8)),
            Denoiser(alive(Transformer(replace(SR1, latent_size=(3, 8, 8)))), Diffusion(), ClipShape(9, 64, 64, 8)),
        ],
        **changes,
    }
    return WaltPipeline(parts.pop("tokenizer"), parts.pop("transformer"), parts.pop("diffusion"), **parts)


def test_names_of_classes_are_compared_in_one_form():
    """macOS takes accents apart."""
    for apart, typed in (("cafe\u0301", "caf\xe9"), ("caf\xe9", "cafe\u0301"), ("cafe\u0301", "cafe\u0301")):
        pipeline = build(classes=("bar", apart), upscalers=[])
        assert (pipeline.label(typed), pipeline.classes) == (1, ("bar", "caf\xe9"))
    with pytest.raises(WaltError, match=r"unknown class 'Bar '; the classes are bar, café \('Bar ' is not 'bar'\)"):
        pipeline.label("Bar ")


@pytest.fixture(scope="module")
def pipeline() -> WaltPipeline:
    return build()


def video(frames: int, num: int | None = None, seed: int = 0) -> np.ndarray:
    shape = (frames, 16, 16, 3) if num is None else (num, frames, 16, 16, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference of two uint8 videos. Rounding may move a value by 1."""
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# Generating


def test_the_same_seed_gives_the_same_video_in_any_batch(pipeline) -> None:
    labels, texts = ["left", "right", "left"], ["go", "", "stop"]
    options = {**QUICK, "seed": 3, "guidance": 2.0}
    together = pipeline.generate_latents(labels, 3, text=texts, **options)
    for batch in (1, 2):
        split = pipeline.generate_latents(labels, 3, text=texts, batch=batch, **options)
        torch.testing.assert_close(split, together, rtol=1e-4, atol=1e-4)
    fewer = pipeline.generate_latents("left", 1, text="go", **options)
    torch.testing.assert_close(fewer[0], together[0], rtol=1e-4, atol=1e-4)
    shown = pipeline.generate(labels, 3, text=texts, **options)
    assert (shown.shape, shown.dtype) == ((3, 9, 16, 16, 3), np.uint8)
    assert np.array_equal(shown, pipeline.generate(labels, 3, text=texts, **options))
    assert np.array_equal(shown, pipeline.decode(together))
    assert apart(shown, pipeline.generate(labels, 3, text=texts, **{**options, "seed": 4})) > 1


@pytest.mark.parametrize(
    "change", [{"label": "right"}, {"label": None}, {"text": "stop"}, {"text": None}, {"guidance": 3.0}, {"steps": 3}]
)
def test_every_argument_matters(pipeline, change) -> None:
    arguments = {"label": "left", "text": "go", "guidance": 1.0, **QUICK}
    assert apart(pipeline.generate(**arguments), pipeline.generate(**{**arguments, **change})) > 0


def test_pictures_are_one_frame_videos_of_their_own(pipeline) -> None:
    labels = ["left", "right", "left", None]
    pictures = pipeline.generate(labels, 4, images=True, **QUICK)
    assert (pictures.shape, pictures.dtype) == ((4, 16, 16, 3), np.uint8)
    assert apart(pictures, pipeline.generate(labels, 4, images=True, batch=1, **QUICK)) <= 1
    assert apart(pictures[:1], pipeline.generate("left", 1, images=True, **QUICK)) <= 1
    assert apart(pictures[0], pictures[2]) > 1


@pytest.mark.parametrize(("given", "known"), [(1, 1), (5, 2)])
def test_first_frames_come_back_as_the_tokenizer_shows_them(pipeline, given, known) -> None:
    frames = video(given, 2)
    latent = pipeline.generate_latents("left", 2, frames=frames, **QUICK)
    with torch.no_grad():
        clean = pipeline.tokenizer.encode(torch.from_numpy(frames).permute(0, 4, 1, 2, 3) / 127.5 - 1)
    torch.testing.assert_close(latent[:, :, :known], clean, rtol=0, atol=1e-5)
    other = pipeline.generate_latents("left", 2, frames=video(given, 2, seed=1), **QUICK)
    assert (other[:, :, known:] - latent[:, :, known:]).abs().amax(dim=(1, 2, 3, 4)).min() > 1e-4
    one = pipeline.generate_latents("left", 2, frames=frames[0], **QUICK)  # for all samples
    torch.testing.assert_close(one[0], latent[0], rtol=1e-4, atol=1e-4)
    assert (one[1, :, :known] == one[0, :, :known]).all()
    assert (one[1, :, known:] - one[0, :, known:]).abs().max() > 1e-4


def test_preview_and_bar(pipeline, capsys) -> None:
    seen = []
    latent = pipeline.generate_latents(
        "left", 3, steps=2, batch=2, preview=lambda step, steps, x0: seen.append((step, steps, x0))
    )
    assert [(step, steps, len(x0)) for step, steps, x0 in seen] == [(1, 2, 2), (2, 2, 2), (1, 2, 1), (2, 2, 1)]
    torch.testing.assert_close(torch.cat([seen[1][2], seen[3][2]]), latent, rtol=0, atol=0)
    assert pipeline.decode(seen[0][2]).shape == (2, 9, 16, 16, 3)
    assert "sample" in capsys.readouterr().err


# Long videos


def test_extend_keeps_what_was_there_and_goes_on_from_its_end(pipeline) -> None:
    start = video(9, 2)
    longer = pipeline.extend(start, 2, label="left", **QUICK)
    assert longer.shape == (2, 17, 16, 16, 3)  # 9 frames, and twice 9 - 5
    assert np.array_equal(longer[:, :9], start)
    once = pipeline.extend(start, 1, label="left", **QUICK)
    assert np.array_equal(longer[:, :13], once)
    new = pipeline.generate("left", 2, frames=start[:, -5:], **QUICK)
    assert apart(once[:, 9:], new[:, 5:]) > 1  # its noise is not that of a first clip
    changed = start.copy()
    changed[:, 4:] = 255 - changed[:, 4:]
    assert apart(pipeline.extend(changed, 1, label="left", **QUICK)[:, 9:], once[:, 9:]) > 0
    changed = start.copy()
    changed[:, :4] = 255 - changed[:, :4]
    assert np.array_equal(pipeline.extend(changed, 1, label="left", **QUICK)[:, 9:], once[:, 9:])


def test_extend_one_video_and_one_frame(pipeline) -> None:
    assert pipeline.extend(video(9), 1, **QUICK).shape == (13, 16, 16, 3)
    assert pipeline.extend(video(1), 2, **QUICK).shape == (13, 16, 16, 3)  # 1 + 8, and 4


def test_clips_cover_a_long_video() -> None:
    assert clip_starts(17, 17, 5) == [0]
    assert clip_starts(9, 17, 5) == [0]
    assert clip_starts(41, 17, 5) == [0, 12, 24]
    assert clip_starts(30, 17, 5) == [0, 12, 13]
    with pytest.raises(ValueError, match="got 8 frames; expected 1 \\+ 4k"):
        clip_starts(8, 17, 5)
    frames = np.arange(30).reshape(1, 30, 1, 1, 1)
    starts = clip_starts(30, 17, 5)
    clips = np.stack([frames[:, start : start + 17] for start in starts], axis=1)
    clips = clips + 100 * np.arange(3).reshape(1, 3, 1, 1, 1, 1)
    joined = join_clips(clips, starts)[0, :, 0, 0, 0]
    assert (joined % 100 == np.arange(30)).all()
    assert (joined // 100 == np.repeat([0, 1, 2], [17, 12, 1])).all()


# Super-resolution


def test_upscale_twice(pipeline) -> None:
    start = video(9, 2)
    large = pipeline.upscale(start, **QUICK)
    assert (large.shape, large.dtype) == ((2, 9, 64, 64, 3), np.uint8)
    assert pipeline.upscale(start[0], stages=1, **QUICK).shape == (9, 32, 32, 3)
    assert apart(pipeline.upscale(start, batch=1, **QUICK), large) <= 1
    with torch.no_grad():
        latent = pipeline.tokenizer.encode(torch.from_numpy(start).permute(0, 4, 1, 2, 3) / 127.5 - 1)
    assert apart(pipeline.upscale(latent, **QUICK), large) <= 1
    other = pipeline.upscale(255 - start, **QUICK)
    assert apart(other, large) > 1
    assert apart(pipeline.upscale(start, noise=0.3, **QUICK), large) > 0


def test_upscale_long_videos_in_clips(pipeline) -> None:
    start = video(14, 2)  # clips at 0, 4 and 5
    large = pipeline.upscale(start, stages=1, **QUICK)
    assert large.shape == (2, 14, 32, 32, 3)
    assert apart(large[:, :9], pipeline.upscale(start[:, :9], stages=1, **QUICK)) <= 1
    assert pipeline.upscale(video(5), stages=1, **QUICK).shape == (5, 32, 32, 3)


def test_large_frames_are_decoded_a_latent_frame_at_a_time(pipeline, monkeypatch) -> None:
    latent = torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = pipeline.decode(latent)
    sizes = []
    decode_chunks = pipeline.tokenizer.decode_chunks
    monkeypatch.setattr(
        pipeline.tokenizer, "decode_chunks", lambda x: decode_chunks(sizes.append(c.shape) or c for c in x)
    )
    monkeypatch.setattr("walt.sample.pipeline.LARGE", 15)
    assert apart(pipeline.decode(latent), whole) <= 1
    assert sizes == [(1, 4, 1, 4, 4)] * 6


# Folders


def test_a_folder_holds_all_of_it(pipeline, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sr1", "sr2", "tokenizer", "transformer"]
    loaded = WaltPipeline.from_pretrained(tmp_path)
    assert (loaded.classes, loaded.clip, loaded.text.name) == (pipeline.classes, CLIP, "bytes")
    arguments = {"label": "left", "text": "go", **QUICK}
    small = pipeline.generate(**arguments)
    assert np.array_equal(loaded.generate(**arguments), small)
    assert np.array_equal(loaded.upscale(small, **QUICK), pipeline.upscale(small, **QUICK))


def test_a_second_stage_needs_the_first(pipeline, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "sr2").rename(tmp_path / "away")
    assert len(WaltPipeline.from_pretrained(tmp_path).upscalers) == 1
    (tmp_path / "away").rename(tmp_path / "sr2")
    (tmp_path / "sr1").rename(tmp_path / "away")
    with pytest.raises(WaltError, match="has sr2 without sr1"):
        WaltPipeline.from_pretrained(tmp_path)


def test_a_name_on_the_hub_is_downloaded(pipeline, tmp_path, monkeypatch) -> None:
    pipeline.save_pretrained(tmp_path)
    asked = []

    def download(name: str, **options: object) -> str:
        asked.append((name, options))
        if name == "no/where":
            raise FileNotFoundError("the network is away")
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))
    assert WaltPipeline.from_pretrained("hub:some/one").clip == CLIP
    assert asked == [("some/one", {"allow_patterns": ["*.json", "*.safetensors"]})]
    with pytest.raises(WaltError, match="hub:no/where cannot be downloaded: the network is away"):
        WaltPipeline.from_pretrained("hub:no/where")
    with pytest.raises(WaltError, match="no such folder: some/one"):  # the network is never asked by mistake
        WaltPipeline.from_pretrained("some/one")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": replace(TOKENIZER, latent_channels=8)}, "transformer latent_channels: got 4; expected 8"),
        ({"transformer": replace(BASE, latent_size=(3, 2, 4))}, r"transformer latent_size: got \(3, 2, 4\); expected"),
        ({"transformer": replace(BASE, low_resolution=True)}, "transformer low_resolution: got True; expected False"),
        ({"text": None}, "text: got no text encoder; expected one: transformer has text_width=8"),
        ({"text": ByteEncoder(9)}, "text_length: got 9 from the text encoder 'bytes'; expected 12"),
        ({"upscalers": (BASE, CLIP)}, "sr1 low_resolution: got False; expected True"),
        (
            {"upscalers": (replace(SR1, latent_size=(3, 8, 8)), ClipShape(9, 64, 64, 8))},
            r"sr1 latent_size: got \(3, 8, 8\); expected \(3, 4, 4\), twice the stage before it",
        ),
    ],
)
def test_parts_that_do_not_fit(changes, message) -> None:
    for name, kind in (("tokenizer", Tokenizer), ("transformer", Transformer)):
        if name in changes:
            changes = {**changes, name: kind(changes[name])}
    if "upscalers" in changes:
        config, clip = changes["upscalers"]
        changes = {"upscalers": [Denoiser(Transformer(config), Diffusion(), clip)]}
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_a_folder_of_parts_that_do_not_fit(pipeline, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path)
    wide = build(
        tokenizer=Tokenizer(replace(TOKENIZER, latent_channels=8)),
        transformer=Transformer(replace(BASE, latent_channels=8)),
        upscalers=(),
    )
    wide.save_pretrained(tmp_path / "wide")
    (tmp_path / "tokenizer").rename(tmp_path / "old")
    (tmp_path / "wide" / "tokenizer").rename(tmp_path / "tokenizer")
    with pytest.raises(WaltError, match=rf"{tmp_path}: transformer latent_channels: got 4; expected 8"):
        WaltPipeline.from_pretrained(tmp_path)


# Errors


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("generate", {"label": "up"}, "unknown class 'up'; the classes are left, right"),
        ("generate", {"text": ["a", "b"], "num": 3}, "2 texts for num=3 samples"),
        ("generate", {"num": 0}, "0 labels for num=0"),
        ("generate", {"steps": 1001}, "sample: steps: got 1001"),
        ("generate", {"seed": -1}, "sample: seed: got -1"),
        ("generate", {"guidance": 2.0}, "sample: guidance: got 2.0; expected 1 without label, text and known frames"),
        ("generate", {"batch": 0}, "batch: got 0"),
        ("generate", {"frames": video(4)}, r"frames: got \[1, 4, 16, 16, 3\]; expected \[1, 1 or 5, 16, 16, 3\]"),
        ("generate", {"frames": video(1, 2), "num": 3}, r"frames: got \[2, 1, 16, 16, 3\]"),
        (
            "generate",
            {"frames": video(1)[:, :8]},
            r"frames: got uint8 \[1, 8, 16, 3\]; expected uint8 \[T, 16, 16, 3\]",
        ),
        ("generate", {"frames": video(1), "images": True}, "frames: got 1; expected fewer than the 1 of a picture"),
        ("extend", {"video": video(9).astype(float)}, "video: got float64"),
        ("extend", {"video": video(9), "chunks": 0}, "chunks: got 0; expected at least 1"),
        ("upscale", {"video": video(8)}, "upscale: video: got 8 frames; expected 1 \\+ 4k"),
        ("upscale", {"video": video(9), "stages": 3}, "stages: got 3; expected 1 to 2"),
        ("upscale", {"video": video(9), "noise": 0.5}, "noise: got 0.5; expected 0 to 0.3"),
        ("upscale", {"video": torch.zeros(4, 3, 2, 2)}, r"latents: got torch.float32 \[4, 3, 2, 2\]"),
        ("upscale", {"video": torch.zeros(1, 4, 3, 4, 4)}, r"upscale 1: z_t: got shape \(1, 4, 3, 8, 8\)"),
    ],
)
def test_bad_values(pipeline, method, arguments, message) -> None:
    with pytest.raises(WaltError, match=message):
        getattr(pipeline, method)(**{**QUICK, **arguments})


def test_what_the_model_was_trained_without() -> None:
    plain = build(
        transformer=Transformer(replace(BASE, classes=0, text_width=0, text_vocabulary=0, frame_condition=False)),
        classes=(),
        text=None,
        upscalers=(),
    )
    for method, arguments, message in (
        ("generate", {"label": 0}, "the model was trained without classes, the subfolders of --data"),
        ("generate", {"text": "go"}, "text: the model was trained without text; train one with --data.text bytes"),
        ("generate", {"frames": video(1)}, "by walt train base with --transformer.frame-condition true"),
        ("extend", {"video": video(9)}, "by walt train base with --transformer.frame-condition true"),
        ("upscale", {"video": video(9)}, "the pipeline has no super-resolution stages; train one with walt train sr"),
    ):
        with pytest.raises(WaltError, match=message):
            getattr(plain, method)(**QUICK, **arguments)
    assert plain.generate(**QUICK).shape == (1, 9, 16, 16, 3)


def test_noise_that_stages_were_not_trained_on() -> None:
    diffusion = Diffusion(DiffusionConfig(low_resolution_noise=0.05))
    stage = Denoiser(Transformer(SR1), diffusion, ClipShape(9, 32, 32, 8))
    with pytest.raises(WaltError, match=r"noise: got 0.1; expected 0 to 0.05, which upscale 1 was trained on"):
        build(upscalers=[stage]).upscale(video(9), noise=0.1, **QUICK)

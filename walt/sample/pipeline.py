"""WaltPipeline: a tokenizer, a denoiser and super-resolution stages from a folder, and samples from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from walt.checkpoint import checkpoint_folder, fingerprint, save_checkpoint, weights_in
from walt.data.pixels import to_model, to_pixels
from walt.errors import WaltError, as_user_error
from walt.model.config import ClipShape, as_int, tokenizer_description, transformer_description
from walt.model.diffusion import Diffusion
from walt.model.randoms import sample_noise
from walt.model.text import TextEncoder, encode_sentences, text_encoder
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.names import look_alike, normal
from walt.pretrained import load_tokenizer, model_folder, tokenizer_mismatches
from walt.sample.denoiser import Denoiser, check_fit, load_denoiser
from walt.sample.sampler import Options, Sampling, clip_starts, join_clips, sample_batches
from walt_kernels.values import plain

if TYPE_CHECKING:
    from typing_extensions import Unpack

Labels = str | int | Sequence[str | int] | None
Texts = str | Sequence[str] | None

# The second number of a noise's key (`sample_noise`), after the sample's. Noise of `generate` has none.
EXTENSION, UPSCALING, LOW_RESOLUTION = 1, 2, 3
OVERLAP = 5  # known pixel frames of a continuation: 2 latent frames
LARGE = 32 * 32  # latent sites of a frame above which one latent frame is decoded at a time


class WaltPipeline:
    """Tokenizer, denoiser and super-resolution stages, ready to sample on whatever device they are.

    >>> pipeline = WaltPipeline.from_pretrained("tiny-doom")  # in the package; or a folder, such as "runs/demo"
    >>> clips = pipeline.generate(label="basic", num=4)  # uint8 [4, 17, 64, 64, 3]
    >>> longer = pipeline.extend(clips, chunks=2)  # uint8 [4, 41, 64, 64, 3]
    >>> larger = pipeline.upscale(longer)  # uint8 [4, 41, 256, 256, 3] with two stages

    Each sample has its own noise, from the seed and its number: the same seed gives the same sample, whatever
    batch it is in (to rounding).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        transformer: Transformer,
        diffusion: Diffusion,
        *,
        clip: ClipShape,
        classes: Sequence[str] = (),
        text: TextEncoder | None = None,
        upscalers: Sequence[Denoiser] = (),
    ) -> None:
        self.tokenizer, self.transformer = tokenizer.eval(), transformer.eval()
        self.diffusion, self.clip, self.classes = diffusion, clip, tuple(map(normal, classes))
        self.text, self.upscalers = text, tuple(upscalers)
        for denoiser in upscalers:
            denoiser.transformer.eval()
        check_fit(tokenizer, (self.base, *self.upscalers), text)

    @property
    def base(self) -> Denoiser:
        return Denoiser(self.transformer, self.diffusion, self.clip)

    def to(self, device: torch.device | str) -> WaltPipeline:
        """Move all models, in place."""
        for model in (self.tokenizer, self.transformer, *(denoiser.transformer for denoiser in self.upscalers)):
            model.to(device)
        return self

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, text: TextEncoder | None = None) -> WaltPipeline:
        """Read `folder`/tokenizer, /transformer and, where they are there, /sr1 and /sr2.

        folder: a folder, "tiny-doom" for the model in this package, or "hub:<owner>/<name>" for one on the Hugging
            Face hub, which is downloaded once.
        text: the text encoder, if it is to be another than the checkpoint names (such as the same one elsewhere).
        Raises WaltError for a missing, broken or foreign folder, and names what does not fit together, such as a
        denoiser that was trained with another tokenizer.
        """
        folder = model_folder(folder)
        tokenizer = load_tokenizer(folder / "tokenizer")
        base, document = load_denoiser(folder / "transformer")
        found = [name for name in ("sr1", "sr2") if checkpoint_folder(folder / name)]
        if found == ["sr2"]:
            raise WaltError(f"{folder} has sr2 without sr1, whose videos it takes")
        upscalers = [load_denoiser(folder / name)[0] for name in found]
        name = str(document.get("text") or "")
        if text is None and name:
            try:
                text = text_encoder(name, base.transformer.config.text_length)
            except WaltError as error:
                place = folder / "transformer" / "config.json"
                raise WaltError(f'{error} (the model\'s text encoder, by "text" in {place})') from error
        with as_user_error(str(folder)):
            pipeline = cls(
                tokenizer,
                base.transformer,
                base.diffusion,
                clip=base.clip,
                classes=document.get("classes", ()),
                text=text,
                upscalers=upscalers,
            )
        for message in tokenizer_mismatches(folder, fingerprint(tokenizer)):
            raise WaltError(message)
        return pipeline

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write what from_pretrained reads: safetensors and config.json, without any training state.

        dtype: of the weights in the files, such as torch.float16 (None: as they are). They are read into float32.
        WaltError for a weight that is beyond its range.
        """
        folder = Path(folder)
        text = self.text.name if self.text is not None else ""
        description = tokenizer_description(self.tokenizer.config)
        save_checkpoint(folder / "tokenizer", "tokenizer", description, {"model": weights_in(self.tokenizer, dtype)})
        key = fingerprint(load_tokenizer(folder / "tokenizer"))  # as it is read back, in float32
        for name, denoiser in zip(("transformer", "sr1", "sr2"), (self.base, *self.upscalers), strict=False):
            config = denoiser.transformer.config
            description = transformer_description(
                config, denoiser.diffusion.config, denoiser.clip, self.classes, text if config.text_width else ""
            )
            tensors = {"model": weights_in(denoiser.transformer, dtype)}
            save_checkpoint(folder / name, "transformer", {**description, "tokenizer": key}, tensors)

    def label(self, name: str | int | None) -> int | None:
        """A class name or number -> its number; None for a model without classes or for no class."""
        name = plain(name)
        if name is None:
            return None
        if isinstance(name, str) and normal(name) in self.classes:
            return self.classes.index(normal(name))
        if str(name).isdecimal() and int(name) < len(self.classes):
            return int(name)
        known = ", ".join(self.classes) or "none: the model was trained without classes, the subfolders of --data"
        alike = look_alike([str(name)], self.classes)
        raise WaltError(f"unknown class {name!r}; the classes are {known}{alike and f' ({alike})'}")

    def generate(
        self,
        label: Labels = None,
        num: int = 1,
        *,
        text: Texts = None,
        frames: np.ndarray | None = None,
        images: bool = False,
        **options: Unpack[Options],
    ) -> np.ndarray:
        """Sample videos uint8 [num, T, H, W, 3], or with images=True independent pictures uint8 [num, H, W, 3].

        label, text: one for all, or a sequence with one for each sample. An empty text is no text; one that is
            longer than the encoder reads is cut (WaltWarning).
        frames: the first 1 or 5 frames, uint8 [1 or 5, H, W, 3] for all, or [num, 1 or 5, H, W, 3].
        options: the fields of `Sampling`.
        """
        latent = self.generate_latents(label, num, text=text, frames=frames, images=images, **options)
        video = self.decode(latent, batch=Sampling(**options).batch)
        return video[:, 0] if images else video

    def generate_latents(
        self,
        label: Labels = None,
        num: int = 1,
        *,
        text: Texts = None,
        frames: np.ndarray | None = None,
        images: bool = False,
        **options: Unpack[Options],
    ) -> Tensor:
        """`generate` before decoding: float32 [num, c, t, h, w] (t = 1 for images), which `upscale` takes."""
        with as_user_error("generate"):
            num = as_int("num", num)
        return self._generate(label, num, text, frames, images, Sampling(**options), ())

    def extend(
        self,
        video: np.ndarray,
        chunks: int = 1,
        *,
        label: Labels = None,
        text: Texts = None,
        **options: Unpack[Options],
    ) -> np.ndarray:
        """Go on from the last 5 frames, `chunks` times (paper section 3.4): 17 frames -> 29 -> 41 ...

        video uint8 [T, H, W, 3] or [num, T, H, W, 3] -> the same with more frames. One of fewer than 5 frames goes on
        from its last one. label, text and options are those of `generate`.
        """
        sampling = Sampling(**options)
        videos = self._videos("video", video)
        with as_user_error("extend"):
            chunks = as_int("chunks", chunks)
        if chunks < 1:
            raise WaltError(f"chunks: got {chunks}; expected at least 1")
        for chunk in range(chunks):
            overlap = min(self._overlap(), OVERLAP if videos.shape[1] >= OVERLAP else 1)
            latent = self._generate(label, len(videos), text, videos[:, -overlap:], False, sampling, (EXTENSION, chunk))
            videos = np.concatenate([videos, self.decode(latent, batch=sampling.batch)[:, overlap:]], axis=1)
        return videos if video.ndim == 5 else videos[0]

    def upscale(
        self,
        video: np.ndarray | Tensor,
        *,
        stages: int | None = None,
        noise: float = 0.1,
        label: Labels = None,
        text: Texts = None,
        **options: Unpack[Options],
    ) -> np.ndarray:
        """Twice the height and width by each super-resolution stage (all, or the first `stages`) -> uint8 video.

        video: uint8 [T, H, W, 3] or [num, T, H, W, 3] of the base model's size, or latents [num, c, t, h, w]. More
            frames than a stage takes are cut into clips that overlap by 5 frames or more, which the earlier clip keeps
            (ours: each clip is upscaled alone).
        noise: on the low-resolution latents, as a fraction of the steps (ours: the paper gives no value).
        label, text and options are those of `generate`; a stage gets those of label and text that it takes.
        """
        sampling = Sampling(**options)
        with as_user_error("upscale"):
            wanted = len(self.upscalers) if stages is None else as_int("stages", stages)
        if not self.upscalers:
            raise WaltError("upscale: the pipeline has no super-resolution stages; train one with walt train sr")
        if not 1 <= wanted <= len(self.upscalers):
            raise WaltError(f"stages: got {wanted}; expected 1 to {len(self.upscalers)}, the stages of this pipeline")
        if isinstance(video, Tensor):
            if video.ndim != 5 or not video.is_floating_point():
                expected = "floating point [num, c, t, h, w]"
                raise WaltError(f"latents: got {video.dtype} {list(video.shape)}; expected {expected}")
            latent, starts = video.float().cpu(), [0]
        else:
            videos = self._videos("video", video)
            length = self.clip.frames
            with as_user_error("upscale"):
                starts = clip_starts(videos.shape[1], length, self._overlap())
            clips = np.stack([videos[:, start : start + length] for start in starts], axis=1)
            latent = self._encode(clips.reshape(-1, *clips.shape[2:]), sampling.batch)
        num = len(latent) // len(starts)  # clips of one video are neighbours
        for number, denoiser in enumerate(self.upscalers[:wanted]):
            conditions = self._conditions(denoiser, label, text, num)
            conditions = {name: tensor.repeat_interleave(len(starts), dim=0) for name, tensor in conditions.items()}
            keys = [(i, number, start) for i in range(num) for start in starts]
            latent = self._upscale(denoiser, latent, conditions, noise, keys, sampling, f"upscale {number + 1}")
        clips = self.decode(latent, batch=sampling.batch)
        joined = join_clips(clips.reshape(num, len(starts), *clips.shape[1:]), starts)
        return joined if isinstance(video, Tensor) or video.ndim == 5 else joined[0]

    @torch.inference_mode()
    def decode(self, latent: Tensor, *, batch: int = 16) -> np.ndarray:
        """Latents [num, c, t, h, w] -> uint8 [num, T, H, W, 3]. Large frames one sample and latent frame at a time."""
        like = self.tokenizer.latent_mean
        with as_user_error("decode"):
            batch = as_int("batch", batch)
        large = latent.shape[3] * latent.shape[4] > LARGE
        videos = []
        for latents in latent.to(like).split(1 if large else batch):
            chunks = (
                self.tokenizer.decode_chunks(latents.split(1, dim=2)) if large else [self.tokenizer.decode(latents)]
            )
            videos.append(np.concatenate([to_pixels(chunk.cpu()) for chunk in chunks], axis=1))
        return np.concatenate(videos)

    @torch.inference_mode()
    def _encode(self, video: np.ndarray, batch: int) -> Tensor:
        """uint8 [num, T, H, W, 3] -> latents [num, c, t, h, w] on the CPU."""
        like = self.tokenizer.latent_mean
        videos = torch.from_numpy(np.ascontiguousarray(video)).split(batch)
        return torch.cat([self.tokenizer.encode(to_model(pixels).to(like)).float().cpu() for pixels in videos])

    def _generate(
        self,
        label: Labels,
        num: int,
        text: Texts,
        frames: np.ndarray | None,
        images: bool,
        sampling: Sampling,
        key: tuple[int, ...],
    ) -> Tensor:
        base, config = self.base, self.transformer.config
        shape = self.tokenizer.config.latent_shape(self.clip.frames, self.clip.height, self.clip.width)
        conditions = self._conditions(base, label, text, num)
        desc = "sample"
        if images:  # each is a stack of one
            shape, desc = (shape[0], 1, *shape[2:]), "sample images"
            conditions["image"] = torch.ones(num, dtype=torch.bool)
            sampling = replace(sampling, batch=sampling.batch * config.latent_size[0])
        if frames is not None:
            conditions |= self._known(frames, num, shape, sampling.batch)
        return sample_batches(base, conditions, [(i, *key) for i in range(num)], shape, sampling, desc)

    def _upscale(
        self,
        denoiser: Denoiser,
        latent: Tensor,
        conditions: dict[str, Tensor],
        noise: float,
        keys: Sequence[tuple[int, ...]],
        sampling: Sampling,
        desc: str,
    ) -> Tensor:
        """One stage: noise on the low-resolution latents, then samples of twice the height and width."""
        trained = denoiser.diffusion.config.low_resolution_noise
        if not 0 <= noise <= trained:
            raise WaltError(f"noise: got {noise}; expected 0 to {trained}, which {desc} was trained on")
        level = max(0, round(noise * denoiser.diffusion.config.steps) - 1)
        levels = torch.full((len(latent),), level)
        with as_user_error(desc):
            low = denoiser.diffusion.add_noise(
                latent,
                sample_noise(sampling.seed, [(i, LOW_RESOLUTION, *rest) for i, *rest in keys], latent.shape[1:]),
                levels,
            )
        conditions = {**conditions, "low_resolution": low, "noise_level": levels}
        channels, frames, height, width = latent.shape[1:]
        shape = (channels, frames, 2 * height, 2 * width)
        return sample_batches(denoiser, conditions, [(i, UPSCALING, *rest) for i, *rest in keys], shape, sampling, desc)

    def _conditions(self, denoiser: Denoiser, label: Labels, text: Texts, num: int) -> dict[str, Tensor]:
        """Label and text as the stage takes them, one for each of `num` samples; a super-resolution stage may not."""
        config = denoiser.transformer.config
        conditions: dict[str, Tensor] = {}
        numbers = [self.label(name) for name in _each("labels", label, num)]
        if config.classes and any(number is not None for number in numbers):
            conditions["label"] = torch.tensor([config.classes if number is None else number for number in numbers])
        texts = _each("texts", text, num)
        if not all(text is None or isinstance(text, str) for text in texts):
            raise WaltError(f"text: got {text!r}; expected a sentence, or one for each sample")
        if self.text is None and any(text is not None for text in texts):
            raise WaltError("text: the model was trained without text; train one with --data.text bytes")
        sentences = [(text or "").strip() for text in texts]
        if self.text is not None and config.text_width and any(sentences):
            with as_user_error("text"):
                conditions["text"], conditions["text_mask"] = encode_sentences(self.text, sentences)
        return conditions

    def _known(self, frames: np.ndarray, num: int, shape: Sequence[int], batch: int) -> dict[str, Tensor]:
        """First frames as the denoiser takes them: their latents, zeros after them, and how many they are."""
        if not self.transformer.config.frame_condition:
            raise WaltError(
                "frames: the model was trained without frame prediction; remove its folder transformer and train it"
                " again, by walt train base with --transformer.frame-condition true"
            )
        videos = self._videos("frames", frames)
        if videos.shape[1] not in (1, self._overlap()) or len(videos) not in (1, num):
            expected = f"[{num}, 1 or {self._overlap()}, {self.clip.height}, {self.clip.width}, 3]"
            raise WaltError(f"frames: got {list(videos.shape)}; expected {expected}")
        latent = self._encode(videos, batch)
        if latent.shape[2] >= shape[1]:
            sample = "picture" if shape[1] == 1 else "clip"
            limit = self.tokenizer.config.video_shape(*shape[1:])[1]
            raise WaltError(f"frames: got {videos.shape[1]}; expected fewer than the {limit} of a {sample}")
        clean = torch.zeros(num, *shape)
        clean[:, :, : latent.shape[2]] = latent
        return {"frames": clean, "known": torch.full((num,), latent.shape[2])}

    def _overlap(self) -> int:
        """Pixel frames that a clip shares with the one before it."""
        return OVERLAP if self.clip.frames > OVERLAP else 1

    def _videos(self, name: str, video: np.ndarray) -> np.ndarray:
        """[T, H, W, 3] or [num, T, H, W, 3] -> [num, T, H, W, 3]; WaltError unless it is of the base model's size."""
        videos = video[None] if video.ndim == 4 else video
        size = (self.clip.height, self.clip.width, 3)
        if videos.dtype != np.uint8 or videos.ndim != 5 or videos.shape[2:] != size or 0 in videos.shape:
            expected = f"uint8 [T, {size[0]}, {size[1]}, 3] or [num, T, {size[0]}, {size[1]}, 3]"
            raise WaltError(f"{name}: got {video.dtype} {list(video.shape)}; expected {expected}")
        return videos


def _each(what: str, value: Any, num: int) -> list[Any]:
    value = plain(value)
    many = isinstance(value, Iterable) and not isinstance(value, str | Tensor)  # a tensor with fractions is no label
    values = list(value) if many else [value] * num
    if len(values) != num or num < 1:
        raise WaltError(f"{len(values)} {what} for num={num} samples; give one, or one for each sample")
    return values

"""WaltPipeline: a tokenizer and a transformer from a folder, and samples from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from walt.checkpoint import best_weights, load_description, load_weights, read_tensors, save_checkpoint
from walt.config import DiffusionConfig, TokenizerConfig, TransformerConfig
from walt.data import to_pixels
from walt.diffusion import Diffusion
from walt.errors import WaltError, user_values
from walt.tokenizer import Tokenizer
from walt.transformer import Transformer


@dataclass(frozen=True)
class ClipShape:
    """What the model was trained on, in pixels and frames a second."""

    frames: int
    height: int
    width: int
    fps: int


def tokenizer_description(config: TokenizerConfig) -> dict[str, Any]:
    return {"config": config.to_dict()}


def transformer_description(
    config: TransformerConfig, diffusion: DiffusionConfig, clip: ClipShape, classes: Sequence[str]
) -> dict[str, Any]:
    return {
        "config": config.to_dict(),
        "diffusion": diffusion.to_dict(),
        "clip": asdict(clip),
        "classes": list(classes),
    }


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, averaged weights if it has them."""
    folder, document = load_description(folder, "tokenizer")
    with user_values(str(folder / "config.json")):
        model = Tokenizer(TokenizerConfig.from_dict(document.get("config", {})))
    path = best_weights(folder)
    load_weights(model, read_tensors(path), path)
    return model.eval()


class WaltPipeline:
    """Tokenizer, transformer and diffusion process, ready to sample.

    >>> pipeline = WaltPipeline.from_pretrained("runs/demo")
    >>> clips = pipeline.generate(label="basic", num=4)  # uint8 [4, 17, 64, 64, 3]
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        transformer: Transformer,
        diffusion: Diffusion,
        *,
        clip: ClipShape,
        classes: Sequence[str] = (),
    ) -> None:
        self.tokenizer, self.transformer = tokenizer.eval(), transformer.eval()
        self.diffusion, self.clip, self.classes = diffusion, clip, tuple(classes)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> WaltPipeline:
        """Read `folder`/tokenizer and `folder`/transformer. Raises WaltError for a missing, broken or foreign one."""
        folder = Path(folder)
        if not folder.is_dir():
            raise WaltError(f"no such folder: {folder}")
        tokenizer = load_tokenizer(folder / "tokenizer")
        place, document = load_description(folder / "transformer", "transformer")
        with user_values(str(place / "config.json")):
            transformer = Transformer(TransformerConfig.from_dict(document.get("config", {})))
            diffusion = Diffusion(DiffusionConfig.from_dict(document.get("diffusion", {})))
            clip = ClipShape(**document.get("clip", {}))
        path = best_weights(place)
        load_weights(transformer, read_tensors(path), path)
        return cls(tokenizer, transformer, diffusion, clip=clip, classes=document.get("classes", ()))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what from_pretrained reads: safetensors and config.json, without any training state."""
        folder = Path(folder)
        description = transformer_description(self.transformer.config, self.diffusion.config, self.clip, self.classes)
        for kind, model, text in (
            ("tokenizer", self.tokenizer, tokenizer_description(self.tokenizer.config)),
            ("transformer", self.transformer, description),
        ):
            save_checkpoint(folder / kind, kind, text, {"model": model.state_dict()})

    def label(self, name: str | int | None) -> int | None:
        """A class name or number -> its number; None for a model without classes or for no class."""
        if name is None:
            return None
        if isinstance(name, str) and name in self.classes:
            return self.classes.index(name)
        if str(name).isdecimal() and int(name) < len(self.classes):
            return int(name)
        known = ", ".join(self.classes) or "none: the model was trained without classes"
        raise WaltError(f"unknown class {name!r}; the classes are {known}")

    def generate(
        self,
        label: str | int | Sequence[str | int] | None = None,
        num: int = 1,
        *,
        steps: int = 50,
        seed: int = 0,
        images: bool = False,
        batch: int = 16,
        progress: bool = True,
    ) -> np.ndarray:
        """Sample videos uint8 [num, T, H, W, 3], or with images=True independent pictures uint8 [num, H, W, 3].

        label is one class for all, or a sequence with one class for each sample. Equal arguments give equal samples.
        """
        shape = self.tokenizer.config.latent_shape(self.clip.frames, self.clip.height, self.clip.width)
        names = [label] * num if label is None or isinstance(label, str | int) else list(label)
        if len(names) != num or num < 1:
            raise WaltError(f"{len(names)} labels for num={num} samples; give one label, or one for each sample")
        with user_values("steps"):
            times = len(self.diffusion.timesteps(steps))
        numbers = [self.label(name) for name in names]
        generator = torch.Generator().manual_seed(seed)
        if images:  # a stack of 1+t images is one sample of one class, so sort pictures into stacks by class
            return self._pictures(numbers, shape, steps, generator, batch, progress)
        videos = []
        with tqdm(total=-(-num // batch) * times, desc="sample", unit="step", disable=not progress, leave=False) as bar:
            for first in range(0, num, batch):
                latent = self._latents(shape, numbers[first : first + batch], False, steps, generator, bar)
                videos.append(to_pixels(self._decode(latent)))
        return np.concatenate(videos)

    def _pictures(
        self,
        numbers: Sequence[int | None],
        shape: tuple[int, ...],
        steps: int,
        generator: torch.Generator,
        batch: int,
        progress: bool,
    ) -> np.ndarray:
        depth = shape[1]
        stacks: list[tuple[int | None, list[int]]] = []
        for number in dict.fromkeys(numbers):
            places = [i for i, other in enumerate(numbers) if other == number]
            stacks += [(number, places[i : i + depth]) for i in range(0, len(places), depth)]
        pictures = np.empty((len(numbers), self.clip.height, self.clip.width, 3), np.uint8)
        total = -(-len(stacks) // batch) * steps
        with tqdm(total=total, desc="sample images", unit="step", disable=not progress, leave=False) as bar:
            for first in range(0, len(stacks), batch):
                some = stacks[first : first + batch]
                latent = self._latents(shape, [number for number, _ in some], True, steps, generator, bar)
                for stack, (_, places) in zip(latent, some, strict=True):
                    singles = stack.transpose(0, 1)[: len(places), :, None]  # [n, c, 1, h, w]: n one-frame videos
                    pictures[places] = to_pixels(self._decode(singles))[:, 0]
        return pictures

    @torch.inference_mode()
    def _decode(self, latent: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.decode(latent)

    def _latents(
        self,
        shape: tuple[int, ...],
        numbers: Sequence[int | None],
        images: bool,
        steps: int,
        generator: torch.Generator,
        bar: tqdm[Any],
    ) -> torch.Tensor:
        label = None if numbers[0] is None else torch.tensor(numbers)
        return self.diffusion.sample(
            self.transformer,
            (len(numbers), *shape),
            steps=steps,
            generator=generator,
            label=label,
            image=torch.full((len(numbers),), images),
            progress=lambda _done, _total: bar.update(),
        )

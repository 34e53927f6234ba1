"""Previews of `walt train base`: samples of the model with its averaged weights."""

from __future__ import annotations

from torch import nn

from walt.model.diffusion import Diffusion
from walt.model.text import TextEncoder
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.sample.pipeline import WaltPipeline
from walt.train.run import Run, write_preview
from walt.train.trainer import Preview

PREVIEWS = 4  # samples of a preview


def denoiser_preview(
    run: Run, tokenizer: Tokenizer, diffusion: Diffusion, encoder: TextEncoder | None
) -> Preview | None:
    """previews/base-<step>.mp4: samples of the first classes or captions, the same noise each time."""
    if run.stage != "base":
        return None
    texts = sorted({caption for caption in run.store.caption if caption})

    def preview(module: nn.Module, step: int) -> None:
        assert isinstance(module, Transformer)
        classes = run.store.classes if module.config.classes else ()
        pipeline = WaltPipeline(tokenizer, module, diffusion, clip=run.clip, classes=classes, text=encoder)
        label = [i % len(classes) for i in range(PREVIEWS)] if classes else None
        text = [texts[i % len(texts)] for i in range(PREVIEWS)] if encoder is not None else None
        videos = pipeline.generate(label, PREVIEWS, text=text, steps=20, progress=False)
        write_preview(run, step, videos, columns=PREVIEWS)

    return preview

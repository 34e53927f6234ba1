"""A whole training step of walt's tiny preset, as `walt demo` takes it: loss, backward pass, clipping, AdamW.

Parameters are float32; the 16-bit dtypes are those of autocast. The data are random clips and latents of the right
shapes, and no weight is zero, so that every kernel has real work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from walt.config import PRESETS
from walt.data import Clips
from walt.diffusion import Diffusion
from walt.stages import Latents, tokenizer_draw, tokenizer_loss, transformer_draw, transformer_loss
from walt.tokenizer import Tokenizer
from walt.training import Draw, Loss, TrainingConfig
from walt.transformer import Transformer
from walt_kernels import testing, use_backend

from .case import Case
from .contender import COMPILED, REFERENCE, Contender, Subject, on_reference

WIDE = f"{REFERENCE} in float32"

Step = Callable[[nn.Module, torch.Generator], Tensor]


def step_of(draw: Draw, loss: Loss) -> Step:
    """The loss of a batch as a trainer draws it."""
    return lambda model, generator: loss(model, draw(generator))[0]


def build(stage: str, batch: int, frames: int, size: int, wide: bool = False) -> tuple[nn.Module, Step]:
    """The model and its loss on one batch; ``frames`` and ``size`` are the tokenizer's pixels or the base's latents.

    ``wide`` is for the truth: the same numbers in float64.
    """
    torch.manual_seed(0)
    tokenizer, transformer = PRESETS["tiny"]
    model: nn.Module
    if stage == "tokenizer tiny":
        video = np.random.default_rng(0).integers(0, 256, (batch, frames, size, size, 3), dtype=np.uint8)
        clips = Clips(video, np.zeros(batch, np.int64), ("random",) * batch, ("random",))
        model = Tokenizer(tokenizer)
        loss = step_of(tokenizer_draw(clips, batch, frames), tokenizer_loss(clips, frames))
        if wide:  # the step makes pixels in float32
            model.encoder.register_forward_pre_hook(lambda _, arguments: (arguments[0].double(), *arguments[1:]))
    else:
        images, channels, kind = batch // 4, transformer.latent_channels, torch.float64 if wide else torch.float32
        label = torch.arange(batch) % transformer.classes
        latents = Latents(
            torch.randn(batch, channels, frames, size, size).to(kind),
            label,
            torch.randn(batch * frames, channels, size, size).to(kind),
            label.sort().values.repeat_interleave(frames),
        )
        model, diffusion = Transformer(transformer), Diffusion()
        draw = transformer_draw(diffusion, latents, batch, images)
        loss = step_of(draw, transformer_loss(diffusion, latents))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return (model.double() if wide else model).train(), loss


def evaluate(model: nn.Module, loss: Step, dtype: torch.dtype, device: str) -> Tensor:
    """The loss; a fresh generator makes it the same batch and noise every time."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(device, dtype if narrow else None, enabled=narrow):
        return loss(model, torch.Generator().manual_seed(0))


def trainer(case: Case, dtype: torch.dtype, device: str, *, reference: bool, compiled: bool = False) -> Contender:
    """A contender with a model and an optimizer of its own; they are made when it is first called."""
    state: list[Any] = []

    def step(**inputs: Any) -> float:
        if not state:
            model, loss = build(**inputs)
            if compiled:
                for part in (model.encoder, model.decoder) if isinstance(model, Tokenizer) else (model,):
                    part.compile(dynamic=False)
            state.extend((model.to(device), loss, torch.optim.AdamW(model.parameters(), lr=1e-4)))
        model, loss, optimizer = state
        value = evaluate(model, loss, dtype, device)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), TrainingConfig.clip_norm)
        optimizer.step()
        return value.item()

    return Contender(on_reference(step) if reference else step, compiled=compiled, like=REFERENCE if compiled else "")


def flops(case: Case) -> float:
    """Of one step of the reference, as PyTorch counts its products."""
    with FlopCounterMode(display=False) as counter:
        trainer(case, torch.float32, "cpu", reference=True).function(**case.inputs(torch.float32))
    return float(counter.get_total_flops())


def subject(case: Case, dtype: torch.dtype, device: str, quick: bool, backends: Sequence[str] = ()) -> Subject:
    """Ours is the default of every op; a step is not measured by backends."""
    assert not backends
    torch._dynamo.reset()
    contenders = {
        "ours": trainer(case, dtype, device, reference=False),
        REFERENCE: trainer(case, dtype, device, reference=True),
    }
    if dtype is not torch.float32 and device == "cpu":
        contenders[WIDE] = trainer(case, torch.float32, device, reference=True)
    if quick:
        return Subject(case.inputs(dtype), contenders, (f"{COMPILED}: left out by --quick, it would compile for long",))
    contenders[COMPILED] = trainer(case, dtype, device, reference=True, compiled=True)
    return Subject(case.inputs(dtype), contenders)


def check(
    case: Case, dtype: torch.dtype, device: str, reference_runs: bool, ours: str = "ours"
) -> tuple[float, list[str]]:
    """Compares loss and gradient of the small version, all parameters as one vector, with truth in float64.

    ``reference_runs`` does not matter: the reference is affordable at that size. Nor does ``ours``, see ``subject``.
    """
    small = case.small()

    def results(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        model, loss = build(**small.inputs(dtype), wide=kind is torch.float64)
        value = evaluate(model.to(device), loss, kind, device)
        gradients = torch.autograd.grad(value, list(model.parameters()))
        return value.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    own = results(dtype)
    with use_backend("reference"):
        truth, yardstick = results(torch.float64), results(dtype)
    ratios = [
        testing.compare(name, *values, k=k, rows=small.terms)
        for name, k, values in zip(
            ("loss", "gradient"),
            (testing.K_FORWARD, testing.K_BACKWARD),
            zip(own, truth, yardstick, strict=True),
            strict=True,
        )
    ]
    return max(ratios), ["checked on a smaller batch"]

"""A whole training step of walt's tiny preset, as `walt demo` takes it: loss, backward pass, clipping, AdamW, average.

Parameters are float32; bfloat16 is that of autocast. The batch is random, made once, and no weight is zero, so that
every kernel has real work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from walt.data.loading import Batch, map_tensors
from walt.demo.config import DemoConfig
from walt.model.diffusion import Diffusion
from walt.model.tokenizer import Tokenizer
from walt.model.transformer import Transformer
from walt.presets import PRESETS
from walt.train.losses import DenoiserLoss
from walt.train.objective import Objective
from walt.train.tokenizer import tokenizer_objectives
from walt_kernels import testing, use_backend

from .case import Case
from .contender import COMPILED, REFERENCE, Contender, Subject, on_reference

WIDE = f"{REFERENCE} in float32"
LR = 1e-4


def build(stage: str, batch: int, frames: int, size: int, dtype: torch.dtype, device: str) -> tuple[Objective, Batch]:
    """The demo's objective of a stage, and a batch; ``frames`` and ``size`` are those of the tokenizer's pixels or the
    base model's latents. float64 is for the truth: the same numbers in it.
    """
    torch.manual_seed(0)
    made: Batch
    network: nn.Module
    settings = DemoConfig().settings(stage.split()[0])
    precision = "bfloat16" if dtype is torch.bfloat16 else "float32"
    settings = replace(settings, training=replace(settings.training, precision=precision))
    if stage == "tokenizer L":
        settings = replace(settings, tokenizer=PRESETS["L"][0])
    if stage.startswith("tokenizer"):
        network = Tokenizer(settings.tokenizer)
        made = {"video": torch.rand(batch, 3, frames, size, size) * 2 - 1}
    else:
        config, diffusion = settings.transformer, Diffusion(settings.diffusion)
        network, shape = Transformer(config), (config.latent_channels, frames, size, size)
        made = {
            "latent": torch.randn(batch, *shape),
            "label": torch.arange(batch) % config.classes,
            "image": torch.arange(batch) >= batch - batch // 4,
            "randoms": diffusion.randoms(shape, [torch.Generator().manual_seed(i) for i in range(batch)]),
        }
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    if dtype is torch.float64:
        network = network.double()
        made = map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, made)
    network.to(device).train()
    made = map_tensors(lambda tensor: tensor.to(device), made)
    if isinstance(network, Tokenizer):
        return tokenizer_objectives(network, settings)[0][0], made
    return Objective(network, DenoiserLoss(diffusion), settings.training, average=True), made


def trainer(dtype: torch.dtype, device: str, *, reference: bool, compiled: bool = False) -> Contender:
    """A contender with an objective of its own, which is made when it is first called."""
    state: list[Any] = []

    def step(**inputs: Any) -> float:
        if not state:
            objective, batch = build(**inputs, dtype=dtype, device=device)
            if compiled:
                network = objective.network
                for part in (network.encoder, network.decoder) if isinstance(network, Tokenizer) else (network,):
                    part.compile(dynamic=False)
            state.extend((objective, batch))
        objective, batch = state
        result = objective.backward([batch])
        objective.step(LR)
        return float(result.loss)

    return Contender(on_reference(step) if reference else step, compiled=compiled, like=REFERENCE if compiled else "")


def flops(case: Case) -> float:
    """Of one step of the reference, as PyTorch counts its products."""
    with FlopCounterMode(display=False) as counter:
        trainer(torch.float32, "cpu", reference=True).function(**case.inputs(torch.float32))
    return float(counter.get_total_flops())


def subject(case: Case, dtype: torch.dtype, device: str, quick: bool, backends: Sequence[str] = ()) -> Subject:
    """Ours is the default of every op; a step is not measured by backends."""
    assert not backends
    torch._dynamo.reset()
    contenders = {
        "ours": trainer(dtype, device, reference=False),
        REFERENCE: trainer(dtype, device, reference=True),
    }
    if dtype is not torch.float32 and device == "cpu":
        contenders[WIDE] = trainer(torch.float32, device, reference=True)
    if quick:
        return Subject(case.inputs(dtype), contenders, (f"{COMPILED}: left out by --quick, it would compile for long",))
    contenders[COMPILED] = trainer(dtype, device, reference=True, compiled=True)
    return Subject(case.inputs(dtype), contenders)


def check(
    case: Case, dtype: torch.dtype, device: str, reference_runs: bool, ours: str = "ours"
) -> tuple[float, list[str]]:
    """Compares loss and gradient of the small version, all parameters as one vector, with truth in float64.

    ``reference_runs`` does not matter: the reference is affordable at that size. Nor does ``ours``, see ``subject``.
    """
    small = case.small()

    def results(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        objective, batch = build(**small.inputs(dtype), dtype=kind, device=device)
        loss, _ = objective.forward(batch)
        gradients = torch.autograd.grad(loss, list(objective.network.parameters()))
        return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    own = results(dtype)
    with use_backend("reference"):
        truth, yardstick = results(torch.float64), results(dtype)
    rows = small.terms
    rounded: dict[str, Any] = {"rows": rows} if dtype is torch.float32 else {"averaged": rows, "dtype": dtype}
    loss, gradient = zip(own, truth, yardstick, strict=True)
    ratios = [
        testing.compare("loss", *loss, k=testing.K_FORWARD, **rounded),
        testing.compare("gradient", *gradient, k=testing.K_BACKWARD, rows=rows),
    ]
    return max(ratios), ["checked on a smaller batch"]

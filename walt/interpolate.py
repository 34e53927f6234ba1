"""Another latent size, other windows: the position tables of a trained denoiser, resampled.

The paper fine-tunes the 128x128 model on 128x224 clips after interpolating its absolute and its relative tables; how,
it leaves open. Ours: bicubic for the space table, over patch centres; linear for the time table, frame 0 staying
frame 0; trilinear for the bias tables, from the largest offset to the largest, offset 0 staying offset 0.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from walt.config import TransformerConfig
from walt.transformer import Transformer

__all__ = ["interpolate"]

CHANGEABLE = ("latent_size", "spatial_window", "spacetime_window")


@torch.no_grad()
def interpolate(model: Transformer, config: TransformerConfig) -> Transformer:
    """A new Transformer of `config`, in the model's dtype and on its device, with the model's weights.

    Only latent_size, spatial_window and spacetime_window may differ from the model's own configuration (ValueError
    otherwise). Tables whose shape stays are the same bits.
    """
    for field in dataclasses.fields(config):
        old, new = getattr(model.config, field.name), getattr(config, field.name)
        if old != new and field.name not in CHANGEABLE:
            raise ValueError(f"config.{field.name}: got {new!r}; expected {old!r}, as the model has")
    with torch.device("meta"):
        resized = Transformer(config)
    shapes = {name: tensor.shape for name, tensor in resized.state_dict().items()}
    state = {
        name: tensor.clone() if tensor.shape == shapes[name] else _resize(name, tensor, shapes[name])
        for name, tensor in model.state_dict().items()
    }
    resized.load_state_dict(state, assign=True)
    resized.checkpointing = model.checkpointing
    return resized.train(model.training)


def _resize(name: str, table: Tensor, shape: torch.Size) -> Tensor:
    exact = table.double()
    if name == "space_table":  # [h, w, width]
        size = (shape[0], shape[1])
        resized = F.interpolate(exact.permute(2, 0, 1)[None], size, mode="bicubic")[0].permute(1, 2, 0)
    elif name == "time_table":  # [frames, width]
        resized = F.interpolate(exact.T[None], shape[0], mode="linear", align_corners=True)[0].T
    else:  # [heads, 2t-1, 2h-1, 2w-1]
        resized = _resize_bias(exact, shape[1:])
    return resized.to(table.dtype).contiguous()


def _resize_bias(table: Tensor, shape: torch.Size) -> Tensor:
    for axis, size in enumerate(shape, 1):
        if size == 1:  # offset 0 is all there is
            table = table.narrow(axis, table.shape[axis] // 2, 1)
    return F.interpolate(table[None], tuple(shape), mode="trilinear", align_corners=True)[0]

"""The definition of window attention in plain PyTorch: right in float64, differentiable any number of times."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# A window grid splits every axis into full windows and at most one smaller one: (start, number of windows, size).
Part = tuple[int, int, int]


def axis_parts(size: int, window: int) -> list[Part]:
    full, rest = size // window, size % window  # divmod knows no symbolic sizes
    parts = [(0, full, window)] if full else []
    return [*parts, (full * window, 1, rest)] if rest else parts


def partition(x: torch.Tensor, parts: tuple[Part, Part, Part]) -> torch.Tensor:
    """[B, T, H, W, ...] -> [B, windows, N, ...] for one part of every axis."""
    for axis, (start, count, size) in zip((1, 2, 3), parts, strict=True):
        x = x.narrow(axis, start, count * size)
    (_, nt, t), (_, nh, h), (_, nw, w) = parts
    rest = x.shape[4:]
    x = x.reshape(x.shape[0], nt, t, nh, h, nw, w, *rest)
    x = x.permute(0, 1, 3, 5, 2, 4, 6, *range(7, 7 + len(rest)))
    return x.reshape(x.shape[0], nt * nh * nw, t * h * w, *rest)


def merge(x: torch.Tensor, parts: tuple[Part, Part, Part]) -> torch.Tensor:
    """The inverse of ``partition``: [B, windows, N, heads, dim] -> [B, T, H, W, heads, dim]."""
    (_, nt, t), (_, nh, h), (_, nw, w) = parts
    rest = x.shape[3:]
    x = x.reshape(x.shape[0], nt, nh, nw, t, h, w, *rest)
    x = x.permute(0, 1, 4, 2, 5, 3, 6, *range(7, 7 + len(rest)))
    return x.reshape(x.shape[0], nt * t, nh * h, nw * w, *rest)


def bias_of(table: torch.Tensor, window: tuple[int, int, int], size: tuple[int, int, int]) -> torch.Tensor:
    """[heads, N, N] of a window of ``size`` <= ``window``: element (i, j) is table[:, i - j + window - 1]."""
    axes = [torch.arange(s, device=table.device) for s in size]
    tokens = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)  # [3, N]
    index = torch.zeros((), dtype=torch.long, device=table.device)
    for offset, extent in zip(tokens[:, :, None] - tokens[:, None], window, strict=True):
        index = index * (2 * extent - 1) + offset + extent - 1
    return table.flatten(1)[:, index]


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """LayerNorm over the last dimension, without bias, in float32 or wider; x itself when ``weight`` is None."""
    if weight is None:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    return (F.layer_norm(x.to(wide), x.shape[-1:], eps=eps) * weight.to(wide)).to(x.dtype)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    visible: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """[B, windows, N, heads, dim] and keys [B, windows, M, heads, dim] -> [B, windows, N, heads, dim].

    ``bias`` [heads, N, M] and ``visible`` (broadcastable to [B, windows, heads, N, M]) act on the scores, which are
    float32 or wider; probabilities are rounded to v's dtype once.
    """
    q, k, v = (x.transpose(2, 3) for x in (q, k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) @ k.to(wide).transpose(-2, -1)) * scale
    if bias is not None:
        scores = scores + bias.to(wide)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return (torch.softmax(scores, -1).to(v.dtype) @ v).transpose(2, 3)


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: tuple[int, int, int],
    bias_table: torch.Tensor | None = None,
    image: torch.Tensor | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    context_k: torch.Tensor | None = None,
    context_v: torch.Tensor | None = None,
    context_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """See ``walt_kernels.window_attention``; takes validated inputs."""
    B, T, H, W = q.shape[:4]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = layer_norm(q, q_norm, norm_eps), layer_norm(k, k_norm, norm_eps)
    if context_k is not None:
        context_k = layer_norm(context_k, k_norm, norm_eps)
    frames = None if image is None else image.reshape(B, -1, 1, 1).expand(B, T, H, W)

    def one_part(parts: tuple[Part, Part, Part]) -> torch.Tensor:
        pq, pk, pv = (partition(x, parts) for x in (q, k, v))
        size = (parts[0][2], parts[1][2], parts[2][2])
        windows, N = pq.shape[1:3]
        bias = None if bias_table is None else bias_of(bias_table, window, size)
        visible = alone = None
        if frames is not None:
            alone = partition(frames, parts)
            itself = torch.eye(N, dtype=torch.bool, device=q.device)
            visible = (itself | ~(alone[..., :, None] | alone[..., None, :]))[:, :, None]
        if context_k is not None and context_v is not None:
            L = context_k.shape[1]
            pk, pv = (
                torch.cat([x, c[:, None].expand(-1, windows, -1, -1, -1)], 2)
                for x, c in ((pk, context_k), (pv, context_v))
            )
            if bias is not None:
                bias = F.pad(bias, (0, L))
            if context_mask is not None:
                visible = F.pad(context_mask, (N, 0), value=True)[:, None, None, None]
        out = attend(pq, pk, pv, bias, visible, scale)
        if alone is not None:
            out = torch.where(alone[..., None, None], pv, out)
        return merge(out, parts)

    rows = [
        torch.cat(
            [torch.cat([one_part((t, h, w)) for w in axis_parts(W, window[2])], 3) for h in axis_parts(H, window[1])],
            2,
        )
        for t in axis_parts(T, window[0])
    ]
    return torch.cat(rows, 1)

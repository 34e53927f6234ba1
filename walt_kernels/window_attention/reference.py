"""The definition of window attention in plain PyTorch: right in float64, differentiable any number of times."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from .._library import is_open

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


def window_indices(
    sizes: Sequence[int], window: Sequence[int], device: torch.device
) -> tuple[list[torch.Tensor], torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """``partition`` and ``merge`` as indices, for sizes that a graph leaves open: it must not depend on their parts.

    All windows are whole, and they are at least two: to a graph, a size of one is another program. Returns frame, row
    and column of their tokens, [windows, N] each; which of the tokens lie inside the video, [windows, N]; and window
    and token of each place in the video, [T, H, W] each.
    """
    counts = [(size + extent - 1) // extent for size, extent in zip(sizes, window, strict=True)]
    count = counts[0] * counts[1] * counts[2]
    windows = torch.arange(count if torch.jit.is_tracing() else torch.sym_max(count, 2), device=device)[:, None]
    tokens = torch.arange(window[0] * window[1] * window[2], device=device)
    inside = torch.ones((), dtype=torch.bool, device=device)
    places: list[torch.Tensor] = []
    window_of = token_of = torch.zeros((), dtype=torch.long, device=device)
    for axis in (2, 1, 0):
        size, count, extent = sizes[axis], counts[axis], window[axis]
        before, rest = windows // count, tokens // extent
        place = (windows - before * count) * extent + tokens - rest * extent  # ONNX has no remainder by a symbolic size
        windows, tokens = before, rest
        inside = inside & (place < size)
        places.insert(0, torch.where(place < size, place, 0))
    for axis in (0, 1, 2):
        place = torch.arange(sizes[axis], device=device).reshape([-1] + [1] * (2 - axis))
        window_of = window_of * counts[axis] + place // window[axis]
        token_of = token_of * window[axis] + place % window[axis]
    return places, inside, (window_of, token_of)


def bias_of(table: torch.Tensor, window: Sequence[int], size: Sequence[int]) -> torch.Tensor:
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
    return (F.layer_norm(x.to(wide), weight.shape, eps=eps) * weight.to(wide)).to(x.dtype)


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
    window: Sequence[int],
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
    """See ``walt_kernels.window_attention``; takes checked inputs."""
    B, T, H, W = q.shape[:4]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = layer_norm(q, q_norm, norm_eps), layer_norm(k, k_norm, norm_eps)
    if context_k is not None:
        context_k = layer_norm(context_k, k_norm, norm_eps)
    frames = None if image is None else image.reshape(*image.shape, *[1] * (4 - image.dim())).expand(B, T, H, W)

    def inside_windows(
        take: Callable[[torch.Tensor], torch.Tensor],
        size: Sequence[int],
        real: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, windows, N, heads, dim] of the windows of ``size`` that ``take`` takes out of a tensor [B, T, H, W, ...].

        ``real`` bool [windows, N] is false for tokens that nobody sees but they themselves.
        """
        pq, pk, pv = take(q), take(k), take(v)
        windows, N = pq.shape[1:3]
        bias = None if bias_table is None else bias_of(bias_table, window, size)
        numbers = torch.arange(N, device=q.device)
        itself = numbers[:, None] == numbers
        visible = None if real is None else (itself | real[:, None])[:, None]
        alone = None
        if frames is not None:
            alone = take(frames)
            others = (itself | ~(alone[..., :, None] | alone[..., None, :]))[:, :, None]
            visible = others if visible is None else visible & others
        if context_k is not None and context_v is not None:
            L = context_k.shape[1]
            pk, pv = (
                torch.cat([x, c[:, None].expand(-1, windows, -1, -1, -1)], 2)
                for x, c in ((pk, context_k), (pv, context_v))
            )
            bias = None if bias is None else F.pad(bias, (0, L))
            visible = None if visible is None else F.pad(visible, (0, L), value=True)
            if context_mask is not None:
                context = F.pad(context_mask, (N, 0), value=True)[:, None, None, None]
                visible = context if visible is None else visible & context
        out = attend(pq, pk, pv, bias, visible, scale)
        return out if alone is None else torch.where(alone[..., None, None], pv, out)

    if any(map(is_open, (T, H, W))):
        (t, h, w), real, (window_of, token_of) = window_indices((T, H, W), window, q.device)
        return inside_windows(lambda x: x[:, t, h, w], window, real)[:, window_of, token_of]

    def one_part(t: Part, h: Part, w: Part) -> torch.Tensor:
        parts, size = (t, h, w), (t[2], h[2], w[2])
        return merge(inside_windows(lambda x: partition(x, parts), size), parts)

    axes = [axis_parts(size, extent) for size, extent in zip((T, H, W), window, strict=True)]
    rows = [torch.cat([torch.cat([one_part(t, h, w) for w in axes[2]], 3) for h in axes[1]], 2) for t in axes[0]]
    return torch.cat(rows, 1)

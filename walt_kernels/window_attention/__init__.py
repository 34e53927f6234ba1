"""Attention inside windows of a video, with Swin bias table, QK norm, image frames and context keys."""

from .op import window_attention

__all__ = ["window_attention"]

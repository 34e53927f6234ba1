"""Group and RMS norm of video by frame, clip or pixel, with modulation and SiLU in one pass and every gradient."""

from .op import video_norm

__all__ = ["video_norm"]

"""The ops of this package under the models of other libraries, which it recognises and never imports."""

from .replace import accelerate, restore
from .streams import stream_decode, stream_encode

__all__ = ["accelerate", "restore", "stream_decode", "stream_encode"]

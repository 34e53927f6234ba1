"""The ops of this package under the models of other libraries, which it recognises and never imports."""

from .replace import accelerate, restore

__all__ = ["accelerate", "restore"]

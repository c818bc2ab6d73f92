"""Knowledge distillation of autoregressive language models on PyTorch Lightning."""

from __future__ import annotations

__version__ = "0.1.0"

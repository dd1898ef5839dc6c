"""torch devices by name."""

import torch

from kd_pipeline.errors import ConfigError

__all__ = ["resolve_device"]


def resolve_device(device: torch.device | str) -> torch.device:
    """A CPU or CUDA device, with its index; `"auto"` is the current GPU if there is one.

    Raises:
        ConfigError: not a device, or torch has no such GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as exc:
        raise ConfigError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:<number>', got {device!r}") from exc
    if resolved.type == "cpu":
        return torch.device("cpu")
    if resolved.type != "cuda" or not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} is not available: torch finds no such GPU; use 'cpu' or 'auto'")
    return torch.device("cuda", torch.cuda.current_device() if resolved.index is None else resolved.index)

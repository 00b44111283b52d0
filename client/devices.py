"""What a site computes on, as its owner wishes, and what can be done when it fails."""

import torch

from common.config import RunConfig
from common.errors import UsageError
from common.net import best_device


def wished(text: str) -> tuple[torch.device, torch.device | None]:
    """The device of `--device`, and the one that may take its place once it fails: "cuda,cpu" allows the CPU."""
    first, comma, spare = text.partition(",")
    if comma and (spare != "cpu" or first == "cpu"):
        raise UsageError(f"--device {text} is not possible: only the CPU can take the place of a GPU, as in cuda,cpu")
    return best_device(RunConfig(device=first).device), torch.device("cpu") if comma else None


def failed(error: BaseException) -> bool:
    """Whether a GPU has failed. It then does nothing more for this process: CUDA has no way back but a new one."""
    text = str(error)
    telling = any(word in text for word in ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error"))
    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and telling)

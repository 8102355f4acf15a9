"""Text on a device: cutting windows on the processor and copying them would take longer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def on_device(index: np.ndarray, device: torch.device) -> Tensor:
    """Numbers (n,) as int64 on the device, without waiting for it."""
    there = torch.from_numpy(index.astype(np.int64))
    if device.type != "cuda":
        return there.to(device)
    return there.pin_memory().to(device, non_blocking=True)


class DeviceText:
    """The ids of a text on a device.

    Args:
        ids: (N,), of any unsigned type.
        device: The device.
    """

    def __init__(self, ids: np.ndarray, device: torch.device) -> None:
        small = ids.astype(np.uint8 if ids.dtype == np.uint8 else np.int32)
        self.ids = torch.from_numpy(small).to(device)

    def windows(self, starts: np.ndarray, length: int) -> Tensor:
        """Windows (n, length) that begin at `starts` (n,), int64."""
        first = on_device(starts, self.ids.device)
        place = first[:, None] + torch.arange(length, device=self.ids.device)
        return self.ids[place].long()

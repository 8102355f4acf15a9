"""Warnings of what will be removed: an error where our code made the call, nobody's business
where a library did.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OURS = (ROOT / "sae_experiments", ROOT / "tests", ROOT / "experiment.py", ROOT / "plot.py")
KINDS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
#: What stands between a caller and what it calls: a module's forward, decorators.
BETWEEN = ("torch.nn.modules.module", "torch.utils._contextlib", "functools", "contextlib")


def caller(warner: FrameType) -> FrameType | None:
    """The first frame outside the package that warns which is more than a passage.

    Args:
        warner: the frame that calls ``warnings.warn``.
    """
    package = str(warner.f_globals.get("__name__", "")).split(".")[0]
    frame: FrameType | None = warner
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.split(".")[0] != package and name not in BETWEEN:
            return frame
        frame = frame.f_back
    return None


def is_ours(frame: FrameType | None) -> bool:
    """Whether the code of a frame lies in this repository, and not in an environment below it."""
    if frame is None:
        return False
    path = Path(frame.f_code.co_filename)
    return any(path == own or own in path.parents for own in OURS)


def refuse() -> None:
    """From now on such a warning about a call of ours is raised as an error."""
    plain = warnings.warn

    def warn(
        message: Any, category: Any = None, stacklevel: int = 1, source: Any = None, **options: Any
    ) -> None:
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        if issubclass(kind, KINDS) and is_ours(caller(sys._getframe(1))):
            raise message if isinstance(message, Warning) else kind(message)
        plain(message, category, stacklevel + 1, source, **options)

    warnings.warn = warn

"""Forward passes of whole windows of text, for which nothing needs to be looked up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from transformers import masking_utils

#: Functions of transformers that read numbers from the device, or ask whether they may, and their
#: answers for whole windows: no text begins within one, and masks are made as in any other pass.
_ANSWERS: dict[str, Any] = {
    "find_packed_sequence_indices": lambda *_, **__: None,
    "is_tracing": lambda *_, **__: False,
}


@contextmanager
def whole_windows() -> Iterator[None]:
    """Within the context, passes of any model read whole windows, without a cache or padding.

    transformers otherwise looks for several texts in one window in every pass, for which a device
    is waited for. While a CUDA graph is captured it cannot look, and would make a mask that leads
    to another kernel.
    """
    answers = {name: answer for name, answer in _ANSWERS.items() if hasattr(masking_utils, name)}
    with mock.patch.multiple(masking_utils, **answers):
        yield

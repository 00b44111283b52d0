"""Why a site cannot answer, as the server may know it: the kind of cause, never a path, a file name or a class.

The site's own log gets the whole story.
"""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from client.devices import failed
from common.errors import UserError
from common.sgd import Diverged

log = logging.getLogger(__name__)

SEE = "see the site's own log"
FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


class Refusal(UserError):
    """An answer that is not given. Its text goes to the server."""


@contextmanager
def told(state: Path) -> Iterator[None]:
    """Turn whatever goes wrong inside into a `Refusal`; `state` is the site's state folder."""
    try:
        yield
    except Refusal as error:
        log.error("refused: %s", error)
        raise
    except Exception as error:
        # anything but these is a defect of ours, to be found by its traceback
        log.error("failed: %s", error, exc_info=not isinstance(error, UserError | OSError))
        raise Refusal(cause(error, state)) from None


def cause(error: Exception, state: Path) -> str:
    text = str(error)
    if isinstance(error, Diverged):
        return text
    if isinstance(error, torch.OutOfMemoryError):
        return "the memory of its GPU is full: free it, or use a smaller train.batch or model"
    if failed(error):
        return f"its GPU failed: {SEE}"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:  # torch has no class for it
        return "its memory is full: free it, or use a smaller train.batch or model"
    if any(reason in text for reason in FULL):
        return "its disk is full"
    if isinstance(error, UserError | OSError):
        return f"it cannot use {'its state folder' if str(state) in text else 'its data'}: {SEE}"
    return f"it failed ({type(error).__name__}): {SEE}"

"""Reading of pickled checkpoints without running the code in them."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch


class UnsafePickle(ValueError):
    """A checkpoint with more than tensors, numbers and containers. The message names what it holds."""


def load_pickled(file: Path) -> Any:
    """The content of a file that torch.save wrote, on the CPU. NumPy's numbers in it are read, too.

    Raises UnsafePickle, ValueError if it is no such file or is damaged, and OSError.
    """
    unpickle: Any = np.float64(0).__reduce__()[0]  # the function that makes a NumPy number
    allowed: list[Any] = [(unpickle, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    allowed += [np.dtype, *(type(np.dtype(code)) for code in ("f4", "f8", "i4", "i8"))]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(allowed):
            warnings.simplefilter("ignore", UserWarning)  # about the pickle protocol; the errors below say what matters
            return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as err:  # bytes that are no pickle raise almost any error
        found = re.search(r"GLOBAL ([\w.]+)", str(err))
        if found is not None:
            raise UnsafePickle(f"it holds {found[1]}, and code in a checkpoint is never run") from err
        raise ValueError("it is no checkpoint of torch.save, or damaged") from err

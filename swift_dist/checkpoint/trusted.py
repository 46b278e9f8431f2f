"""What a checkpoint may hold beside tensors and plain Python values: nothing else is unpickled."""

from __future__ import annotations

from typing import Any


def safe_types() -> list[Any]:
    """Types that checkpoints of this project hold, for ``torch.serialization.safe_globals``: numpy arrays (the state of
    numpy's random generator) and what they are rebuilt with."""
    import numpy as np
    from numpy._core import multiarray

    dtypes = [
        type(np.dtype(kind)) for kind in ("uint8", "uint32", "uint64", "int32", "int64", "float32", "float64", "bool")
    ]
    return [np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar, *dtypes]

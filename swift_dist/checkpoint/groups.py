"""The gloo group that carries a checkpoint's few small messages, whatever backend trains."""

from __future__ import annotations

import torch.distributed as dist


def gloo_group() -> tuple[dist.ProcessGroup, bool]:
    """(group of all ranks that uses gloo for CPU tensors, whether it was made here). Collective if it is made."""
    if "cpu:gloo" in dist.get_backend_config():
        world = dist.group.WORLD
        assert world is not None
        return world, False
    return dist.new_group(backend="gloo"), True

"""Writing what ``from_pretrained`` reads: a folder appears when it is whole, under its name, and not before."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to write into; it takes `folder`'s name, and its place, once the block has ended
    without an error. With one, `folder` is as it was."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    for left_over in (new, old):
        shutil.rmtree(left_over, ignore_errors=True)
    new.mkdir()
    try:
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_model(model: Any, weights: dict[str, torch.Tensor], folder: Path, max_shard_size: str) -> None:
    """Write config.json, generation_config.json and safetensors shards of a transformers model.

    Names on disk are those of the architecture's checkpoints, which transformers maps back from the names in memory.

    Args:
        model: says class and config; its own weights are not read.
        weights: whole tensors by the names of ``model.state_dict()``. Tied ones may be given once or twice.
    """
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})  # alias -> the name that is kept
    whole = dict(weights)
    for alias, kept in tied.items():
        if kept in whole:
            whole.pop(alias, None)
        elif alias in whole:
            whole[kept] = whole.pop(alias)
    expected = [name for name in model.state_dict() if name not in tied]
    missing = [name for name in expected if name not in whole]
    assert not missing, f"{len(missing)} weights are missing, such as {missing[:3]}"
    dtypes: Counter[torch.dtype] = Counter()
    for tensor in whole.values():
        if tensor.is_floating_point():
            dtypes[tensor.dtype] += tensor.numel()
    with written_whole(folder) as new:
        model.save_pretrained(new, state_dict=whole, max_shard_size=max_shard_size)
        # transformers writes the dtype that the model computes in here, which need not be that of the weights
        config = json.loads((new / "config.json").read_text(encoding="utf-8"))
        config["dtype"] = str(dtypes.most_common(1)[0][0]).removeprefix("torch.")
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

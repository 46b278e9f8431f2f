"""Datasets of the Hugging Face hub and of ModelScope, fetched into their own caches and read from there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from swift_dist.errors import JobError


def arrow_files(address: str, config: str | None, split: str) -> list[Path]:
    """Fetch a dataset (once: it stays in the library's cache) and name the Arrow files of one split.

    Args:
        address: ``hf://owner/name`` or ``ms://owner/name``.
        config: its configuration (subset), or None for the only one.
        split: e.g. ``train``.

    Raises:
        JobError: it cannot be fetched, or the library is not installed.
    """
    scheme, name = address.split("://", 1)
    try:
        dataset = _from_hugging_face(name, config, split) if scheme == "hf" else _from_modelscope(name, config, split)
    except ImportError as error:
        raise JobError("input", f"{address} needs a package: {error}", "pip install 'swift-dist[modelscope]'") from None
    except Exception as error:  # whatever the hub's client raises: it all means that the dataset cannot be had
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise JobError("input", f"{address} cannot be fetched: {reason}", "check the name and the network") from None
    files = [Path(entry["filename"]) for entry in dataset.cache_files]
    if not files:
        raise JobError(
            "input", f"{address} left no files in its cache", "save it with save_to_disk and give that folder"
        )
    return files


def _from_hugging_face(name: str, config: str | None, split: str) -> Any:
    import datasets

    return datasets.load_dataset(name, config, split=split)


def _from_modelscope(name: str, config: str | None, split: str) -> Any:
    from modelscope.msdatasets import MsDataset

    dataset = MsDataset.load(name, subset_name=config, split=split)
    return dataset.to_hf_dataset() if hasattr(dataset, "to_hf_dataset") else dataset

"""NEFTune: uniform noise on the embeddings while the model trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from swift_dist.config.section import Section
from swift_dist.tuners.base import Tuner

if TYPE_CHECKING:
    import torch


class Options(Section):
    alpha: float = Field(5.0, gt=0, description="noise lies within alpha / sqrt(tokens of the sequence x hidden size)")


class Neftune(Tuner):
    name = "neftune"
    summary = "noise on embeddings, in training only (NEFTune, arXiv 2310.05914); beside another tuner"
    is_addition = True

    def apply(self, model: Any, options: Options, *, seed: int, trainable: Sequence[str] = ()) -> torch.nn.Module:
        """Hook the model and its embedding. The noise comes from torch's generator, as dropout does: it differs from
        rank to rank, and with their number. Neither weights nor exports know of it."""
        noise = _Noise(options.alpha)
        model.register_forward_pre_hook(noise.look, with_kwargs=True)
        model.get_input_embeddings().register_forward_hook(noise.add)
        return model


class _Noise:
    """Two hooks: the model's, which sees where sequences begin and end, and its embedding's."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.mask: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None

    def look(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.mask, self.positions = kwargs.get("attention_mask"), kwargs.get("position_ids")

    def add(self, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        """The embeddings [B, T, H] with noise; None, which leaves them alone, in evaluation."""
        import torch

        if not module.training:
            return None
        lengths = sequence_lengths(output, self.mask, self.positions)
        bound = self.alpha / (lengths * output.shape[-1]).sqrt()
        noise = torch.empty_like(output, dtype=torch.float32).uniform_(-1, 1) * bound[..., None]
        return output + noise.to(output.dtype)


def sequence_lengths(embedded: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None) -> torch.Tensor:
    """float32 [B, T]: for each token, how many tokens its own sequence has.

    A row of a packed or padding-free batch holds several, each beginning at position 0; padding (0 in `mask`) is not
    counted. The paper's L is of one sequence: with the row's length the noise of packed sequences would be too small.
    """
    import torch

    rows, width = embedded.shape[:2]
    counted = torch.ones(rows, width, device=embedded.device)
    if isinstance(mask, torch.Tensor) and mask.shape == (rows, width):
        counted = (mask != 0).to(counted)
    begins = torch.zeros(rows, width, dtype=torch.bool, device=embedded.device)
    if positions is not None:
        positions = positions[0] if positions.ndim == 3 else positions  # [3, B, T]: time, height, width
        begins |= positions.expand(rows, width) == 0
        begins &= counted.bool()
    begins[:, 0] = True
    sequence = begins.view(-1).cumsum(0) - 1
    lengths = torch.zeros(int(sequence[-1]) + 1, device=embedded.device).index_add_(0, sequence, counted.view(-1))
    return lengths.clamp(min=1)[sequence].view(rows, width)


TUNER = Neftune()

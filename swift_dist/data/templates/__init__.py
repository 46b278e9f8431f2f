"""Templates: from a conversation to token ids, with the weight of each token in the loss."""

from swift_dist.data.templates.base import Encoded

__all__ = ["Encoded"]

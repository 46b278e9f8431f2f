"""Parallel layouts: degrees, validity, rank arithmetic, rank-to-node map, and the model geometry they depend on."""

from swift_dist.parallel.layout import AXES, Axis, Coordinates, ParallelLayout
from swift_dist.parallel.shape import LatentAttention, ModelShape

__all__ = ["AXES", "Axis", "Coordinates", "LatentAttention", "ModelShape", "ParallelLayout"]

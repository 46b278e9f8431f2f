"""Parallel layouts: degrees, validity, rank arithmetic, rank-to-node map, and the model geometry they depend on."""

from swift_dist.parallel.layout import AXES, Axis, Coordinates, ParallelLayout
from swift_dist.parallel.nearest import nearest_layouts, require_valid
from swift_dist.parallel.nodes import Place, crossing_groups, place_ranks
from swift_dist.parallel.rules import Violation, check_layout
from swift_dist.parallel.shape import LatentAttention, ModelShape

__all__ = [
    "AXES",
    "Axis",
    "Coordinates",
    "LatentAttention",
    "ModelShape",
    "ParallelLayout",
    "Place",
    "Violation",
    "check_layout",
    "crossing_groups",
    "nearest_layouts",
    "place_ranks",
    "require_valid",
]

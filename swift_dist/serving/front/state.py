"""What the front is told: which names are answered by which replicas, and in which shares. Values only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Replica:
    """A process that answers OpenAI's API. `id` is unique and never used again."""

    id: str
    host: str
    port: int


@dataclass(frozen=True)
class Version:
    """The replicas of one version of a model.

    Attributes:
        id: of the version, as in ``chat-v3``.
        replicas: that are ready; none of them answers while there is none.
        share: of the model's requests, 0 to 1; those of a model's versions sum to 1.
    """

    id: str
    replicas: tuple[Replica, ...]
    share: float = 1.0


@dataclass(frozen=True)
class Route:
    """One model: its own name and those of its adapters go to the same versions.

    Attributes:
        embeds: it answers /v1/embeddings, and nothing that asks for text; other models the other way round.
    """

    names: tuple[str, ...]
    versions: tuple[Version, ...]
    embeds: bool = False


@dataclass(frozen=True)
class FrontState:
    """Everything that the front routes.

    Attributes:
        routes: one a model. With a single one, a request that names no model goes there.
        control: host and port of the control API, which answers whatever is not generated: /v1/models, adapters,
            /metrics and the verbs of `swift-dist deploy`.
    """

    routes: tuple[Route, ...]
    control: tuple[str, int]

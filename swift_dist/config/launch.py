"""The `launch` section of a job, and that of a deployment: the options of launchers, each declared in its own file."""

from __future__ import annotations

from typing import Any

from swift_dist.config.plugged import plugged

LaunchSection: Any = plugged("swift_dist.launchers", name="LaunchSection")

DeploymentLaunchSection: Any = plugged(
    "swift_dist.launchers", name="DeploymentLaunchSection", keep=lambda module: not module.LAUNCHER.no_deployments
)
"""Of the launchers that take deployments."""

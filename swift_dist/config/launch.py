"""The job's `launch` section: the options of every launcher, each declared in its own file."""

from __future__ import annotations

from typing import Any

from swift_dist.config.plugged import plugged

LaunchSection: Any = plugged("swift_dist.launchers", name="LaunchSection")

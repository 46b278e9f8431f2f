"""Objectives, one file each: ``swift_dist/objectives/<name>.py`` holds an ``Options`` and an ``OBJECTIVE``."""

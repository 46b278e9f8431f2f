"""Tuners, one file each: ``swift_dist/tuners/<name>.py`` holds an ``Options`` and a ``TUNER``."""

"""swift_dist: distributed-first training of large models.

A job file becomes a parallel layout, the layout becomes a gang of Ray actors, the gang runs an engine, and the
engine writes checkpoints that convert, serve and resume anywhere.
"""

__version__ = "0.1.0"

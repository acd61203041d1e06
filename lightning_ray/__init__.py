"""Lightning Ray trains the agents people already run, unmodified, on Ray.

Each package below is one room with one responsibility; docs/architecture.md draws how they meet.
"""

__version__ = "0.1.0"

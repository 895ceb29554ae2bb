"""A pipeline as a repository: saving, pushing, model cards, and code that a repository holds."""

from .repository import push_folder, write_card

__all__ = ["push_folder", "write_card"]

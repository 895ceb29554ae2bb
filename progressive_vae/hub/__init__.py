"""Saving and pushing pipelines, model cards, and code in repositories."""

from .repository import push_folder, write_card

__all__ = ["push_folder", "write_card"]

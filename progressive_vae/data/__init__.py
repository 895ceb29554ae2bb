"""Datasets of images: folders, columns and classes; caches of pixels and codes; augmentation."""

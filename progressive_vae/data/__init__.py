"""Data sets of images: folders, columns and classes; cached pixels and codes; augmentation."""

"""The size of an image."""

Size = tuple[int, int, int]
"""(C, H, W)"""

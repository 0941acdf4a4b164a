"""Classifiers: ours, anybody's, and what can be seen of any of them from outside."""

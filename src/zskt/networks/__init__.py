"""Classifiers: our architectures, loading any other, and observing all of them by hooks."""

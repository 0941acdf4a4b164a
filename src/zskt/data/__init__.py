"""Real images: readers of files, archives and arrays. Nothing in a distillation imports this package."""

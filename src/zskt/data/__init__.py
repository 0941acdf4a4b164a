"""Real images: readers for files, archives and arrays. `import zskt` and a distillation never import this package."""

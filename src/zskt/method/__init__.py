"""What a run repeats: losses, generators, replay buffers, recipes, and the step itself."""

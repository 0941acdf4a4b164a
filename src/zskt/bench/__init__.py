"""What a step costs: the released loop, timings, rooflines."""

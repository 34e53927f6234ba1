"""Training: objectives, the loop, what it writes."""

"""From films and pictures to batches."""

"""`walt demo`."""

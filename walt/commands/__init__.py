"""The commands: each a dataclass of its options with its `run` beside it; `walt.cli` knows their names."""

"""Metrics and the networks behind them."""

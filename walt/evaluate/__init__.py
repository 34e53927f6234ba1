"""How good: metrics and the networks behind them."""

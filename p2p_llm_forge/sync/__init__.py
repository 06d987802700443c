"""How peers agree on weights: DDP, DiLoCo, compression, forecasts."""

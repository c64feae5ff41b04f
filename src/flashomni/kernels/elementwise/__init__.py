"""What lies between the products: norms, modulation, gates, RoPE, forecasts."""

"""When to compute. One file a schedule."""

"""Choosing bits from masses: definitions in torch, and kernels beside them."""

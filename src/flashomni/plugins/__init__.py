"""Plug-ins for the servers of others, experimental; each server finds its own by entry point."""

"""Decisions of the router, pure: no loop, clock, network, chance, logs or settings."""

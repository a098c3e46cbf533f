"""The REST front of the inference router."""

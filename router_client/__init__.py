"""The Python client of the inference router: one stream, shared by all callers of a process."""

"""The inference router: batches the rows of all callers per key and streams the matrices to model servers."""

__version__ = "0.1.0"

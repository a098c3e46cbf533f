"""A model server for tests and first steps: slow, deterministic, and able to misbehave on demand."""

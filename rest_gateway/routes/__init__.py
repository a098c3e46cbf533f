"""The HTTP edge: each route about ten lines, with what they share beside them."""

"""JSON in and out: parsing, validation and what the API document says of it. Knows no protobuf and no web framework."""

"""The gRPC edge of the router: protobuf and status codes end here."""

"""gRPC over HTTP/2: what its server and its clients have in common, and a client."""

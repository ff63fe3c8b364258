"""HTTP/2 (RFC 9113) without any I/O, as much of it as gRPC needs, for either side."""

"""HTTP apart from the API: application, middleware, connections, server."""

"""Everything about HTTP that is no API: the application, what is around each request, its connection, the server."""

"""The Triton side: requests in, text out, and supervision of the engine process. No torch here."""

"""OpenAI's API: what requests may say, how answers and errors look, and the text between."""

"""OpenAI's Responses API: its bodies become chat requests, its answers are items, which are stored."""

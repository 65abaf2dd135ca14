"""The OpenAPI document: operations, and what answers look like. Imported only when somebody asks for it."""

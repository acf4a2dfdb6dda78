"""The config: schema, files, checks, messages."""

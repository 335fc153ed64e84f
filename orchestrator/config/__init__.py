"""What was asked: schema, strict codec, command line."""

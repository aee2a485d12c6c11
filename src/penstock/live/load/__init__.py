"""The load generator: traces replayed against an OpenAI-compatible endpoint, and engines measured from outside."""

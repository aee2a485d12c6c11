"""The real-time world: gateway, engines, migration, load generator."""

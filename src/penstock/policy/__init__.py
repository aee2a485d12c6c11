"""Who decides what. One file per published system, each a composition of parts; the registry names the presets."""

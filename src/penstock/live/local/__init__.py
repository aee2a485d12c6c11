"""Local engines: stock vLLM servers on this machine, started, wired for KV transfer, watched and stopped."""

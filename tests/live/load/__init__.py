"""The load generator and the profiler, against a scripted server and emulated engines."""

"""One file per trace format; each holds one function ``read(path, ...) -> Trace``."""

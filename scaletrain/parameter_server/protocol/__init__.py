"""The agreement of workers and servers: settings, frames, keys, and each parameter's place."""

"""The systems that benches compare, each in a process and an environment of its own."""

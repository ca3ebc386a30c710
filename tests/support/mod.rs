//! Starts the binary in a folder of its own, on free ports, and waits for states.

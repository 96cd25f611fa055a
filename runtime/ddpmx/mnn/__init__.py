"""MNN as a tool: the library, and its converter."""

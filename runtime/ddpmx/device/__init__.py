"""The NVIDIA driver by ctypes, which GPUs it sees, and how many cores there are."""

"""The NVIDIA driver by ctypes, which GPUs it sees, how many cores there are, and libraries' versions."""

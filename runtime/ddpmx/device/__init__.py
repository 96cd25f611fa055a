"""The NVIDIA driver by ctypes, and which GPUs it sees."""

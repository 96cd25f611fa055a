"""Images compressed by a model: the states of its chain, sent one after the other, and what is left of the images."""

from ddpmx.tasks.codec.decode import Decompressed, decompress
from ddpmx.tasks.codec.encode import Compressed, Sent, compress

__all__ = ["Compressed", "Decompressed", "Sent", "compress", "decompress"]

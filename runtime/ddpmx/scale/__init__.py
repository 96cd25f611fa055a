"""Many images by many processes: shards, files that hold ranges of images, Ray, and a repository for Triton."""

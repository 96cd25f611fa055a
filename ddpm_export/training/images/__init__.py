"""Folders of images: which files are read, how one is decoded, and what is kept of that for a resumed run."""

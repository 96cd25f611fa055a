"""Image files: pictures, grids, animations, and the folder of generated images."""

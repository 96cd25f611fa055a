"""Files that people look at: pictures, grids, animations, a folder of generated images."""

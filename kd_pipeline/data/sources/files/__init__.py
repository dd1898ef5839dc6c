"""Sources of image files: folders and lists, local or behind URLs."""

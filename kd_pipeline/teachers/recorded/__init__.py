"""Teacher outputs recorded on disk, and their replay."""

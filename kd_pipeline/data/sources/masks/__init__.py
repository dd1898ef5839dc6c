"""Masks: labels that are images, one for each image of a source."""

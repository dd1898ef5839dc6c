"""`kd-pipeline report`: what run folders hold, collected for a page."""

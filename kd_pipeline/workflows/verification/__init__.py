"""`kd-pipeline verify`: parts of a finished run are done again."""

"""The pages of docs/reference, made from settings and parsers."""

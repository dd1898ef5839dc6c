"""Files of the demo: links to configs/digits.yaml and tools/distill.py, so that an installed package has copies."""

__all__: list[str] = []

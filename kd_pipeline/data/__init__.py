"""The data path, in import order: sources, plan, transforms, DALI graph, reader."""

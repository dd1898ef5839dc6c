"""The data path: source, plan, transform, graph, reader; each imports only from those before it."""

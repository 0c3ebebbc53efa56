"""One module a model family (or a few close ones): which classes are replaced, and by what. See `..patching`."""

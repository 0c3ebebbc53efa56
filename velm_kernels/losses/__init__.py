"""What models are trained by: losses whose scores never exist whole."""

__all__: list[str] = []

"""Data loaders: pinned Debian packages, and the typed samples read from them."""

"""Does an explanation point at the evidence? A retrieval task in which the one right token is known."""

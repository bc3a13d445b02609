"""A small vision-language model of a stock architecture (LLaVA) that names emoji in scenes, and AtMan maps of it."""

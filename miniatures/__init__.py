"""Small real models trained from scripts in this repository, and the data they are trained on."""

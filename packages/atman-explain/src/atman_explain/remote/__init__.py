"""Files that are copied into model repositories: flat, and free of imports that a user may lack."""

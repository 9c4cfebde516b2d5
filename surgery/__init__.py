"""Parts of convert_dba.py: models out of this project, and pretrained ones made into its modes."""

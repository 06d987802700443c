"""The mechanisms behind prepare_data.py and train.py. Importing this package does nothing."""

__version__ = "0.1.0"

"""Measurements and small experiments beside the scripts; nothing here is imported by them."""

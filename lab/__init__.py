"""The demo, reports, benchmarks, and one small experiment for each claim of the paper."""
import lib  # first of all, before torch: see lib/__init__.py

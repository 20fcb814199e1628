"""The demo, reports, benchmarks, and one small experiment for each claim of the paper."""
import lib

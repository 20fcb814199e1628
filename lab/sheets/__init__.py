"""The lab sheets, one claim of the paper a file, and beside each the answer that we measured."""

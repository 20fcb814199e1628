"""Tools and the calls of them: JSON schema and JSON on one side, what the model writes on the other.
"""
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Tool:
    """A tool that a reply may call. parameters: the JSON schema of its arguments, an object."""
    name: str
    description: str = ""
    parameters: dict = field(default_factory=dict)

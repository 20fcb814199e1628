"""Forms: what a reply must look like, as a grammar that the engine follows token by token."""
from tokenizer import Tokenizer


class Form:
    """A form that replies must have, for one tokenizer. A state says what has been written so far;
    `start` is the first one."""

    def __init__(self, tokens: Tokenizer):
        self.tokens = tokens

    def after(self, ids) -> "Form":
        """The same form, of whose text these tokens are written already."""
        raise NotImplementedError

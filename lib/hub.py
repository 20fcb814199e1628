"""The files that transformers and vLLM need beside the weights to chat with a checkpoint.

    tokenizer.json              our ranks and special tokens in the form of the package `tokenizers`
    tokenizer_config.json       which class opens it, and what pads and ends a text
    chat_template.jinja         Tokenizer.chat as a template: a copy of lib/chat_template.jinja
    generation_config.json      the tokens at which a reply ends

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "image", "image": picture},
                                         {"type": "text", "text": "Red?"}]}]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True,
                                           return_dict=True, return_tensors="pt")
    reply = model.generate(**inputs, max_new_tokens=64)

tests/test_hub.py compares ids, pixels and greedy replies of transformers with ours. The files are
written for vLLM too, but were not run with it.

Three differences remain:

- If a user types `<|user|>`, it is plain text here. In transformers the same characters become the
  special token, unless apply_chat_template is called with `sanitize_control_tokens=True`.
- A reply in the history that begins with two white-space characters is cut into other tokens there,
  together with the newline before it. Here that newline was a part of the prompt.
- A text of more than 100,000 characters is cut there (Tokenizer.encode), and not in transformers.
"""
import functools
from pathlib import Path

from lib.common import write_json, write_text
from lib.vocabulary import byte_alphabet
from model import Config
from tokenizer import PATTERN, Tokenizer, tokenizer_of

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
# transformers' classes for GLM-OCR's preprocessing [R]
CLASSES = {"image_processor_type": "Glm46VImageProcessor", "processor_class": "Glm46VProcessor"}


def save_hub_files(config: Config, folder):
    """Write the four files to `folder`. A model with a released tokenizer keeps the files that came
    with it; one whose tokenizer is unknown gets none."""
    folder = Path(folder)
    if config.vocabulary:       # its folder may be gone: a run removes its older checkpoints
        for name, contents in tokenizer_of(config).files.items():
            (folder / name).write_bytes(contents)
    elif config.n_ranks:
        tokens = tokenizer_of(config)
        write_json(folder / "tokenizer.json", tokenizer_json(config.n_ranks))
        write_json(folder / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": CLASSES["processor_class"],
            "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "padding_side": "left",
            "model_max_length": config.text.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"]})
        write_text(folder / "chat_template.jinja", TEMPLATE.read_text(encoding="utf-8"))
        write_json(folder / "generation_config.json", {
            "do_sample": False, "eos_token_id": list(tokens.stops),
            "pad_token_id": tokens.special["<|endoftext|>"]})


# ---- tokenizer.json -----------------------------------------------------------------------------

def halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that tiktoken joins last when it encodes `token`.

    tiktoken knows ranks only: it always joins the two neighbours whose concatenation has the lowest
    rank. `tokenizers` wants to know which pairs can be joined. One pair for each token is enough:
    whatever stands around a token's bytes, these are joined in the same order as alone, since no
    other merge reaches into them before they are one token.
    """
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = joined.index(min(joined))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


@functools.lru_cache(maxsize=4)
def tokenizer_json(n_ranks: int) -> dict:
    """The contents of tokenizer.json: Tokenizer(n_ranks) for the package `tokenizers`."""
    tokens = Tokenizer(n_ranks)
    ranks = {tokens.decode_bytes([i]): i for i in range(n_ranks)}
    letters = {byte: letter for letter, byte in byte_alphabet().items()}

    def spelt(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [halves(token, ranks) for token in ranks if len(token) > 1]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags} for name, i in tokens.special.items()],
        "normalizer": None,
        # First cut by our pattern, then spell each part's bytes, without ByteLevel's own pattern.
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated",
             "invert": False},
            byte_level | {"use_regex": False}]},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": False},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spelt(token): i for token, i in ranks.items()},
            "merges": [f"{spelt(left)} {spelt(right)}" for left, right in merges]}}
